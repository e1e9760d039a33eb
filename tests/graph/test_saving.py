"""Chains of values to save: they grow, recompute less and less, and change no value."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from graph_support import CASES, model, transformer

from costmodels.program import ITEM_BYTES
from planner.graph.core import Graph, Op
from planner.graph.derive import training_step
from planner.graph.saving import LINKS, chain, saved_values
from planner.model import Model
from planner.values import reference

MODELS = {
    "transformer": lambda: transformer(),
    "accumulated": lambda: transformer(accumulation_steps=2),
    "conv blocks": lambda: model(CASES["conv blocks"]),
    "nested loops": lambda: model(CASES["nested loops"]),
}


def work(op: Op) -> float:
    return float(prod(f.size for f in op.rule.factors))


def redone(step: Graph) -> float:
    return sum(n * work(op) for op, n in step.walk() if op.phase == "recompute")


def saving(model: Model, remat: str | tuple[str, ...]) -> Graph:
    return training_step(model.decided(remat))


@pytest.mark.parametrize("name", MODELS)
def test_chains_grow_and_recompute_less(name: str) -> None:
    made = MODELS[name]()
    sets = chain(made, work, ITEM_BYTES)
    assert 0 < len(sets) <= LINKS
    for less, more in pairwise(sets):
        assert set(less) < set(more)
    costs = [redone(saving(made, remat)) for remat in ("full", *sets, "none")]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[1] >= costs[-1]


@pytest.mark.parametrize("name", MODELS)
def test_saving_changes_no_value(name: str) -> None:
    made = MODELS[name]()
    plain = saving(made, "none")
    inputs = reference.random_inputs(plain)
    expected = reference.evaluate(plain, inputs)
    for remat in chain(made, work, ITEM_BYTES):
        found = reference.evaluate(saving(made, remat), inputs)
        for out in plain.outputs:
            np.testing.assert_allclose(found[out], expected[out], rtol=1e-9, atol=1e-11)


def test_what_is_named_is_saved_and_no_more() -> None:
    made = transformer()
    names = chain(made, work, ITEM_BYTES)[0]
    step = saving(made, names)
    stacks = {n for n, t in step.tensors.items() if t.role == "residual"}
    always = {n for n, t in saving(made, "full").tensors.items() if t.role == "residual"}
    assert stacks == always | {f"{name}.saved" for name in names}


def test_undecided_is_full() -> None:
    made = transformer()
    assert saving(made, "auto") == saving(made, "full")


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_parts_of_the_batch_save_what_the_batch_does(remat: str) -> None:
    whole, parts = (transformer(accumulation_steps=n, remat=remat) for n in (1, 2))
    assert saved_values(parts) == saved_values(whole)
    assert len(saved_values(parts)) >= 1
