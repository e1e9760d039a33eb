"""The search over mesh shapes finds what planning every shape finds, whatever the processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
from small_models import decoder

import meshes
from planner.model import Model
from planner.planning import Options, plan_model, surrogate_bound
from planner.search import candidates as module
from planner.search.candidates import FITS, IMPOSSIBLE, SLOWER, TOO_LARGE, Trial, front, search
from planner.search.pool import Processes, in_turn

ROOMY = Options(headroom=0.0)


def model(**training: object) -> Model:
    return decoder(
        batch=16, positions=64, vocabulary=512, width=256, hidden=1024, heads=8, head=32,
        **training,
    )


def one_process(_: int) -> AbstractContextManager[Processes]:
    return nullcontext(in_turn)


def all_candidates(name: str, most: int = 2) -> list[Trial]:
    return [Trial(mesh) for mesh in meshes.every_mesh(meshes.resolve(name), most)]


@pytest.mark.parametrize("name", ["tpu-v3:2x1", "dgx-a100-80gb:2x2"])
def test_finds_the_best_of_all_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    candidates = all_candidates(name)
    trials = search(model(), candidates, ROOMY)
    each = [plan_model(model(), c.mesh, ROOMY).timing.step_time_s for c in candidates]
    assert trials[0].outcome == FITS
    assert trials[0].step_time_s <= min(each) * (1 + module.SAME)
    assert len(trials) == len(candidates)


@pytest.mark.parametrize("name", ["tpu-v3:2x1", "tpu-v4:2x2x1"])
def test_bounds_hold_where_nothing_overlaps(name: str) -> None:
    for candidate in all_candidates(name):
        found = plan_model(model(), candidate.mesh, ROOMY).timing.step_time_s
        assert surrogate_bound(model(), candidate.mesh) <= found * (1 + 1e-9)


@pytest.mark.slow
def test_three_axes_are_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    trials = search(model(), all_candidates("tpu-v4:4x4x4", 3), ROOMY)
    few = [t.step_time_s for t in trials if len(t.mesh.axes) < 3]
    assert trials[0].step_time_s <= min(few)
    assert {len(t.mesh.axes) for t in trials} == {1, 2, 3}


def test_processes_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = all_candidates("tpu-v3:2x1")
    spread = search(model(), candidates, ROOMY)
    monkeypatch.setattr(module, "processes", one_process)
    assert search(model(), candidates, ROOMY) == spread


def test_what_was_ruled_out_has_a_bound_that_rules_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    monkeypatch.setattr(module, "AHEAD", 1)
    trials = search(model(), all_candidates("tpu-v4:4x8x1"), ROOMY)
    best = trials[0].step_time_s
    slower = [t for t in trials if t.outcome == SLOWER]
    assert slower
    assert all(t.bound_s >= best * (1 - module.SAME) for t in slower)


def test_if_nothing_fits_the_least_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    topology = meshes.resolve("tpu-v4:2x1x1")
    candidates = [Trial(meshes.logical(topology, {name: 2})) for name in ("x", "y")]
    trials = search(model(), candidates, Options(memory_bytes=2**20))
    assert {t.outcome for t in trials} == {TOO_LARGE}
    assert trials[0].plan is not None
    assert trials[0].explanation
    peaks = [t.peak_bytes for t in trials if t.peak_bytes is not None]
    assert trials[0].peak_bytes == min(peaks)


def test_constraints_rule_shapes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    pinned = Model(
        "pinned", model().graph, model().training, 1024, constraints={"table": (("y",), ())}
    )
    trials = search(pinned, all_candidates("tpu-v4:2x2x1"), ROOMY)
    assert len(trials[0].mesh.axes) == 2
    assert [t.mesh.names for t in trials if t.outcome == IMPOSSIBLE] == [("x",)]


def test_out_of_time_leaves_out_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processes", one_process)
    trials = search(model(), all_candidates("tpu-v4:2x2x1"), Options(time_limit_s=1e-6))
    assert all(t.plan is None for t in trials)


def trial(step: float, peak: int, outcome: str = FITS) -> Trial:
    return replace(
        all_candidates("tpu-v4:1x1x1")[0], outcome=outcome, step_time_s=step, peak_bytes=peak
    )


def test_front_holds_what_nothing_beats() -> None:
    fast, small, beaten = trial(1.0, 100), trial(2.0, 50), trial(3.0, 60)
    assert front([beaten, small, fast, trial(0.5, 10, TOO_LARGE)]) == [fast, small]
