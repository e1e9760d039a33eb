"""Parts of a graph computed alone: together they are the whole, or there is a reason against it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from scaled_zoo import TINY, scaled

from planner.graph.core import Graph
from planner.graph.parting import NotAlone, part_alone
from planner.modelfile import load_model
from planner.values import reference

COUNT = 4


def whole_and_sum_of_parts(graph: Graph, seed: tuple[str, int]) -> tuple[float, float]:
    part, split = part_alone(graph, COUNT, seed, (), loss=True)
    inputs = reference.random_inputs(graph)
    out = graph.outputs[0]

    def piece(number: int) -> Mapping[str, np.ndarray]:
        return {
            n: np.split(np.asarray(x), COUNT, split[n])[number] if n in split else x
            for n, x in inputs.items()
        }

    parts = [float(reference.evaluate(part, piece(k))[out]) for k in range(COUNT)]
    return float(reference.evaluate(graph, inputs)[out]), sum(parts)


@pytest.mark.parametrize("name", ["gpt3-175b", "glam-1.2t", "llama3-8b", "t5-11b", "vit-22b"])
def test_losses_of_parts_add_up(name: str) -> None:
    graph = scaled(name, TINY[name], 8, "training.compute=f32").graph
    data = next(n for n in graph.inputs if graph.tensors[n].role != "parameter")
    whole, parts = whole_and_sum_of_parts(graph, (data, 0))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_any_dimension_will_do() -> None:
    """Features of an elementwise model, which its parameters have too, will not."""
    text = """
training: {batch: B}
graph:
  inputs: {x: "f32[B, D]"}
  params: {w: "[D]"}
  ops:
    - loss = mean(square(x * w))
dims: {B: 8, D: 16}
"""
    graph = load_model(text, "small").graph
    whole, parts = whole_and_sum_of_parts(graph, ("x", 0))
    assert parts == pytest.approx(whole, rel=1e-5)
    with pytest.raises(NotAlone, match="parameter w"):
        part_alone(graph, COUNT, ("x", 1), (), loss=True)
    with pytest.raises(NotAlone, match="no equal part for each of 3"):
        part_alone(graph, 3, ("x", 0), (), loss=True)


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ("loss = mean(square(sum(x, over=[B])))", "not linear"),
        ("loss = mean(max(x, over=[B]))", "maximum"),
        ("loss = mean(square(w))", "the loss is no sum"),
    ],
)
def test_what_needs_other_parts_is_refused(ops: str, reason: str) -> None:
    text = f"""
training: {{batch: B}}
graph:
  inputs: {{x: "f32[B, D]"}}
  params: {{w: "[D]"}}
  ops:
    - unused = sum(x * w)
    - {ops}
dims: {{B: 8, D: 16}}
"""
    graph = load_model(text, "small").graph
    with pytest.raises(NotAlone, match=reason):
        part_alone(graph, COUNT, ("x", 0), (), loss=True)


def test_batch_norm_needs_the_batch() -> None:
    graph = scaled("resnet-50", TINY["resnet-50"], 8).graph
    data = next(n for n in graph.inputs if graph.tensors[n].role != "parameter")
    with pytest.raises(NotAlone):
        part_alone(graph, COUNT, (data, 0), (), loss=True)
