"""Scores with known answers."""

from __future__ import annotations

import pytest

from planner.validation.layouts import Layout
from planner.validation.predict import Prediction
from planner.validation.runs import Measured, Run
from planner.validation.scores import Row, kendall_tau, regret, score


def row(measured_s: float, predicted_s: float, run_id: str = "r", group: str = "g") -> Row:
    run = Run(run_id, run_id, "", {}, Layout(), Measured(measured_s), group=group)
    return Row(run, Prediction(predicted_s, 0.5, 0.6, 10, True))


def test_errors() -> None:
    found = score([row(1.0, 1.1), row(2.0, 1.8), row(4.0, 4.0)])
    assert found.mean_abs_error == pytest.approx(0.2 / 3)
    assert found.median_abs_error == pytest.approx(0.1)
    assert found.max_abs_error == pytest.approx(0.1)
    assert found.bias == pytest.approx(0.0)


def test_utilization_counts_as_the_step_time_it_means() -> None:
    run = Run("r", "r", "", {}, Layout(), Measured(hfu=0.66))
    found = Row(run, Prediction(1.0, 0.5, 0.6, 10, True))
    assert found.error == pytest.approx(0.1)  # the step takes as much longer
    assert found.points == pytest.approx(-0.06)


@pytest.mark.parametrize(
    ("predicted", "tau"),
    [((1, 2, 3, 4), 1.0), ((4, 3, 2, 1), -1.0), ((1, 2, 4, 3), 4 / 6), ((1, 1, 1, 1), 0.0)],
)
def test_kendall_tau(predicted: tuple[float, ...], tau: float) -> None:
    rows = [row(m, p) for m, p in zip((1, 2, 3, 4), predicted, strict=True)]
    assert kendall_tau(rows) == pytest.approx(tau)


def test_regret_is_what_choosing_by_prediction_costs() -> None:
    rows = [row(1.0, 3.0), row(1.2, 2.0), row(2.0, 2.5)]
    assert regret(rows) == pytest.approx(0.2)
    assert score(rows).max_regret == pytest.approx(0.2)
    assert score([row(1.0, 3.0, group="a"), row(2.0, 1.0, group="b")]).mean_regret is None


def test_runs_that_were_out_of_memory_count_by_their_verdict() -> None:
    run = Run("r", "r", "", {}, Layout(), Measured(out_of_memory=True))
    rows = [Row(run, Prediction(1.0, 0.5, 0.6, 10, fits)) for fits in (True, False)]
    found = score(rows)
    assert (found.memory_verdicts, found.right_memory_verdicts) == (2, 1)
    assert found.mean_abs_error is None
