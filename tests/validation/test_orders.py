"""Published choices come out in the order in which they were measured, and fit if they did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from planner.validation import suitefile
from planner.validation.predict import predict
from planner.validation.runs import Run
from planner.validation.scores import Row, kendall_tau, regret

ALPA = suitefile.load("alpa").runs


def rows(runs: Sequence[Run]) -> list[Row]:
    return [Row(run, predict(run)) for run in runs]


@pytest.mark.parametrize("group", ["2 V100", "4 V100", "8 V100"])
def test_logical_meshes_of_v100(group: str) -> None:
    """Which shape is best depends on how GPUs are wired."""
    found = rows([r for r in ALPA if r.group == group and r.measured.step_time_s])
    assert len(found) > 1
    assert kendall_tau(found) == 1
    assert regret(found) == 0
    assert all(abs(row.error or 0) < 0.15 for row in found)


def test_what_ran_out_of_memory() -> None:
    """Gradients of all layers lie whole until one collective sums them: on eight GPUs that decides
    whether data parallelism with split states fits."""
    found = rows([r for r in ALPA if "8g" in r.id])
    assert {row.run.id: row.predicted.fits for row in found} == {
        run.id: not run.measured.out_of_memory for run in ALPA if "8g" in run.id
    }
