"""Sums over parts of a batch, moved to where their summands are made."""

from __future__ import annotations

import graph_support as support
import numpy as np

from planner.graph.core import Loop
from planner.graph.derive import training_step
from planner.graph.early import sums_at_once
from planner.values import reference


def test_sums_stand_behind_their_summands_and_add_up_to_the_same() -> None:
    step = training_step(support.transformer(accumulation_steps=2))
    moved = sums_at_once(step)
    inputs = reference.random_inputs(step)
    expected, found = (reference.evaluate(graph, inputs) for graph in (step, moved))
    for name in (*step.outputs, *step.aliases):
        np.testing.assert_array_equal(found[name], expected[name])
    parts = next(n for n in moved.nodes if isinstance(n, Loop) and n.of_parts)
    position = {o: i for i, n in enumerate(parts.body.nodes) for o in n.outs}
    loops = [position[n.outs[0]] for n in parts.body.nodes if isinstance(n, Loop)]
    assert position["loss.sum"] < max(loops), "the loss is known before the backward pass"
    assert position["table.grad.sum"] > max(loops), "the embedding's gradient comes last"


def test_a_step_in_one_part_stays_as_it_is() -> None:
    step = training_step(support.transformer())
    assert sums_at_once(step).nodes == step.nodes
