"""Weights of communication that follow the simulator: averages, and better plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

import meshes
from planner.planning import NoPromise, Options, Planning, plan_model
from planner.sharding.flow import Conversion, Place
from planner.source import find
from planner.weighting import GUESSES, LEAST, Exposure, settled


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
    model = find("llama3-8b").load()
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
