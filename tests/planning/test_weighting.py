"""Weights of communication that follow the simulator: averages, and better plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import decoder

import meshes
from costmodels.exposure import exposed_shares
from planner import planning as module
from planner.planning import NoPromise, Options, Planning, plan_model
from planner.sharding.flow import Conversion, Place
from planner.source import find
from planner.weighting import GUESSES, LEAST, Exposure, Seen, settled


def moved(tensor: str, phase: str) -> Conversion:
    here = Place("home", home=0)
    return Conversion(here, here, tensor, (4,), "f32", 1, 0, "use", phase=phase)


def test_the_average_of_rounds_and_guesses_for_the_rest() -> None:
    exposure = Exposure()
    exposure.see({("w", "forward"): 1.0, ("x", "forward"): 0.0})
    exposure.see({("w", "forward"): 0.5})
    conversions = [moved("w", "forward"), moved("w", "backward"), moved("x", "forward")]
    assert exposure.counts(conversions, [0.1, 0.2, 0.3]) == [0.75, 0.2, LEAST]
    for _ in range(40):
        exposure.see({("w", "forward"): 0.0})
    assert exposure.counts(conversions[:1], [0.1]) == [LEAST]


def test_rest_takes_three_rounds() -> None:
    assert not settled([1.0, 1.0])
    assert settled([5.0, 1.0, 1.001, 1.0])
    assert not settled([1.0, 1.0, 1.01])


def test_what_was_exposed_leads_to_faster_plans_than_guesses() -> None:
    model = find("llama3-8b", ("training.reduce_once=true",)).load()
    mesh = meshes.logical(meshes.resolve(model.mesh or ""), {"data": 16, "model": 8})
    planning = Planning(model, mesh, Options(), {}, None)
    guessed = [planning.fitting(planning.counts(w)).seconds for w in GUESSES]
    found = plan_model(model, mesh)
    assert found.fits
    assert found.timing.step_time_s < 0.97 * min(guessed)


def test_what_has_no_promise_is_given_up() -> None:
    model = find("llama3-8b").load()
    mesh = meshes.logical(meshes.resolve(model.mesh or ""), {"data": 16, "model": 8})
    step_s = plan_model(model, mesh).timing.step_time_s
    with pytest.raises(NoPromise):
        plan_model(model, mesh, Options(to_beat_s=0.9 * step_s))
    again = plan_model(model, mesh, replace(Options(), to_beat_s=step_s))
    assert again.timing.step_time_s == step_s


def three_axes() -> meshes.LogicalMesh:
    topology = meshes.resolve("dgx-a100-80gb:2")
    return meshes.logical(topology, {"data": 4, "model": 2, "extra": 2})


def test_many_axes_begin_with_what_the_best_of_their_joined_meshes_exposes() -> None:
    model, mesh = decoder(batch=16, positions=64, vocabulary=512, width=256), three_axes()
    known, exposed = {}, {}
    for sizes in ({"data": 8, "model": 2}, {"data": 4, "model": 4}):
        joined = meshes.logical(mesh.topology, sizes)
        found = plan_model(model, joined)
        shares = exposed_shares(found.program, joined)
        known[meshes.alike(joined)] = Seen(found.timing.step_time_s, shares)
        exposed[found.timing.step_time_s] = shares
    alone = Planning(model, mesh, Options(), {}, None)
    told = Planning(model, mesh, Options(known=known), {}, None)
    first = Exposure()
    first.see(exposed[min(exposed)])
    expected = first.counts(told.flow.conversions, told.counts(GUESSES[0]))
    assert next(iter(alone.countings([]))) == pytest.approx(expected)
    assert next(iter(told.countings([]))) == pytest.approx(expected)
    assert alone.solving_s > 0 == told.solving_s


def test_many_axes_are_not_solved_if_joined_they_are_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, mesh = decoder(batch=16, positions=64, vocabulary=512, width=256), three_axes()
    joined = [
        meshes.logical(mesh.topology, s) for s in ({"data": 8, "model": 2}, {"data": 4, "model": 4})
    ]
    known = {meshes.alike(m): Seen(1.0, {}) for m in joined}
    monkeypatch.setattr(module, "solve", None)
    with pytest.raises(NoPromise):
        plan_model(model, mesh, Options(known=known, to_beat_s=0.9))
