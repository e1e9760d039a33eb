"""The single-device meaning of a Graph: evaluates it whole, op by op, loops unrolled.

The yardstick for lowered programs; no sharding is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.graph.core import Graph, Loop, Op
from planner.values import kernels

Array = NDArray[Any]
Values = dict[str, Array]


def evaluate(graph: Graph, inputs: Mapping[str, Array]) -> Values:
    """All outer tensors of `graph` for the given `inputs` (float64 inside)."""
    values: Values = dict(inputs)
    _run(graph, values)
    return values


def _run(graph: Graph, values: Values) -> None:
    for node in graph.nodes:
        if isinstance(node, Op):
            results = kernels.evaluate(node, [values[i] for i in node.ins], {})
            values.update(zip(node.outs, results, strict=True))
        else:
            _run_loop(node, values)


def _run_loop(loop: Loop, values: Values) -> None:
    state = {k.entry: values[k.init] for k in loop.carries}
    stacks: dict[str, list[Array]] = {s.outer: [] for s in loop.writes}
    order = range(loop.times)
    for i in reversed(order) if loop.reverse else order:
        inner: Values = {name: values[name] for name in loop.shared}
        inner.update({s.inner: values[s.outer][i] for s in loop.reads})
        inner.update(state)
        _run(loop.body, inner)
        state = {k.entry: inner[k.exit] for k in loop.carries}
        for s in loop.writes:
            stacks[s.outer].append(inner[s.inner])
    values.update({k.result: state[k.entry] for k in loop.carries})
    for name, slices in stacks.items():
        values[name] = np.stack(slices[::-1] if loop.reverse else slices)


def random_inputs(graph: Graph, seed: int = 0) -> Values:
    """Small random inputs of the right shapes: ids within range, states positive."""
    rng = np.random.default_rng(seed)
    largest = _id_range(graph)
    values: Values = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if tensor.dtype.startswith("i"):
            values[name] = rng.integers(0, largest, tensor.shape)
        elif tensor.role == "state":
            values[name] = rng.uniform(0.1, 1.0, tensor.shape)
        else:
            values[name] = rng.normal(size=tensor.shape) * 0.5
    return values


def _id_range(graph: Graph) -> int:
    """Smallest size of a factor that ids are compared with (vocabulary)."""
    sizes = []
    for op, _ in graph.walk():
        exprs = op.attrs.get("exprs", ())
        if any(graph_t.dtype.startswith("i") for graph_t in _operands(graph, op)):
            for e in exprs:
                names = _id_factors(e, op)
                sizes += [f.size for f in op.rule.factors if f.name in names]
    return min(sizes, default=2)


def _id_factors(e: Any, op: Op) -> frozenset[str]:
    from planner.graph import expr as ex

    return ex.index_factors(e)


def _operands(graph: Graph, op: Op) -> list[Any]:
    tensors = graph.all_tensors()
    return [tensors[i] for i in op.ins if i in tensors]
