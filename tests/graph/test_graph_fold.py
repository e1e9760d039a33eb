"""Layers written out fold to the loop of `repeat`: the same numbers, never a false fold."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.core import Graph, Loop, Op
from planner.graph.fold import Folded, fold
from planner.graph.layers import rms_norm
from planner.values import reference

WIDTH, HIDDEN = 8, 16
Body = Callable[[Builder, str, str, str], str]  # (builder, prefix, carried, read by all) → carried


def random_body(seed: int) -> Body:
    """A chain of norms, products and sums, with residuals and a read of what all layers read."""

    def body(b: Builder, prefix: str, x: str, common: str) -> str:
        rng = random.Random(seed)
        start = x
        for i in range(rng.randint(1, 4)):
            name = f"{prefix}op{i}"
            kind = rng.choice(("norm", "mlp", "residual", "common"))
            if kind == "norm":
                x = rms_norm(b, x, b.param(f"{name}.scale", [WIDTH], ["D"]), name)
            elif kind == "mlp":
                wide = b.param(f"{name}.wi", [WIDTH, HIDDEN], ["D", "F"])
                back = b.param(f"{name}.wo", [HIDDEN, WIDTH], ["F", "D"])
                h = b.einsum("B D, D F -> B F", x, wide, name=f"{name}.h")
                x = b.einsum("B F, F D -> B D", h, back, name=f"{name}.y")
            else:
                other = start if kind == "residual" else common
                x = b.pointwise(name, ex.add(ex.x(0), ex.x(1)), x, other)
        last = b.param(f"{prefix}last", [WIDTH, WIDTH], ["D", "E"])
        y = b.einsum("B D, D E -> B E", x, last, name=f"{prefix}last.y")
        return b.pointwise(f"{prefix}out", ex.add(ex.x(0), ex.x(1)), start, y)

    return body


def written_out(body: Body, times: int) -> Graph:
    b = Builder(compute="f32")
    x, common = _inputs(b)
    for i in range(times):
        x = body(b, f"layer{i}.", x, common)
    return b.graph([_loss(b, x)])


def rolled(body: Body, times: int) -> Graph:
    b = Builder(compute="f32")
    x, common = _inputs(b)
    inner = b.repeat("layers", times)
    entry = inner.enter(x)
    (x,) = inner.end_repeat([(x, entry, body(inner, "", entry, common))])
    return b.graph([_loss(b, x)])


def _inputs(b: Builder) -> tuple[str, str]:
    x = b.input("x", [4, WIDTH], ["B", "D"], "f32")
    return b.pointwise("start", ex.mul(ex.x(0), ex.c(0.5)), x), b.pointwise("common", ex.x(0), x)


def _loss(b: Builder, x: str) -> str:
    return b.map("loss", [(x, "BD")], (), ex.mul(ex.x(0), ex.c(0.1)))


def loops(graph: Graph) -> list[Loop]:
    return [node for node in graph.nodes if isinstance(node, Loop)]


def stacked(folded: Folded, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of the folded graph from those of the written-out one."""
    members = folded.members
    return {
        name: np.stack([values[m] for m in members[name]]) if name in members else values[name]
        for name in folded.graph.inputs
    }


def assert_same_loss(graph: Graph, folded: Folded) -> None:
    values = reference.random_inputs(graph)
    wanted = reference.evaluate(graph, values)
    found = reference.evaluate(folded.graph, stacked(folded, values))
    for name in graph.outputs:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9)


def shape_of(graph: Graph) -> list[object]:
    """A graph without its names: ops, rules and loops in order."""
    return [
        (n.kind, n.rule, repr(n.attrs)) if isinstance(n, Op)
        else (n.times, len(n.carries), len(n.reads), len(n.shared), shape_of(n.body))
        for n in graph.nodes
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), times=st.integers(2, 6))
def test_random_layers_fold_to_the_loop_that_repeat_builds(seed: int, times: int) -> None:
    body = random_body(seed)
    graph = written_out(body, times)
    folded = fold(graph)
    assert shape_of(folded.graph) == shape_of(rolled(body, times))
    assert folded.graph.parameter_count == graph.parameter_count
    assert_same_loss(graph, folded)


def test_a_stack_knows_the_parameters_it_stands_for() -> None:
    folded = fold(written_out(random_body(0), 5))
    assert folded.members["layer0.last"] == tuple(f"layer{i}.last" for i in range(5))
    assert folded.graph.tensors["layer0.last"].shape == (5, WIDTH, WIDTH)


def chain(kinds: str) -> Graph:
    """One layer per letter: a, b and c are different functions; b also has another width."""
    b = Builder(compute="f32")
    x, _ = _inputs(b)
    for i, kind in enumerate(kinds):
        hidden = HIDDEN * 2 if kind == "b" else HIDDEN
        wide = b.param(f"l{i}.wi", [WIDTH, hidden], ["D", "F"])
        back = b.param(f"l{i}.wo", [hidden, WIDTH], ["F", "D"])
        h = b.einsum("B D, D F -> B F", x, wide, name=f"l{i}.h")
        h = b.pointwise(f"l{i}.act", ex.mul(ex.x(0), ex.c(3.0 if kind == "c" else 2.0)), h)
        y = b.einsum("B F, F D -> B D", h, back, name=f"l{i}.y")
        x = b.pointwise(f"l{i}.out", ex.add(ex.x(0), ex.x(1)), x, y)
    return b.graph([_loss(b, x)])


@pytest.mark.parametrize(
    ("kinds", "times"),
    [
        ("aaaa", [4]),
        ("baaaa", [4]),  # the first layer is different
        ("aaaab", [4]),
        ("abababab", [4]),  # a period of two layers
        ("cabababab", [4]),
        ("aaabbb", [3, 3]),
        ("aacaa", [2, 2]),  # one attribute differs
        ("abc", []),
        ("a", []),
    ],
)
def test_what_folds_and_what_does_not(kinds: str, times: list[int]) -> None:
    graph = chain(kinds)
    folded = fold(graph)
    assert [loop.times for loop in loops(folded.graph)] == times
    assert_same_loss(graph, folded)


def _with_reader(read: Callable[[Builder, list[str], list[str]], str]) -> Graph:
    b = Builder(compute="f32")
    x, _ = _inputs(b)
    weights, made = [], []
    for i in range(4):
        weights.append(b.param(f"w{i}", [WIDTH, WIDTH], ["D", "E"]))
        x = b.einsum("B D, D E -> B E", x, weights[-1], name=f"y{i}")
        made.append(x)
    return b.graph([_loss(b, read(b, made, weights))])


def test_a_value_read_after_the_run_cuts_it_there() -> None:
    graph = _with_reader(lambda b, y, w: b.pointwise("skip", ex.add(ex.x(0), ex.x(1)), y[1], y[3]))
    folded = fold(graph)
    assert [loop.times for loop in loops(folded.graph)] == [2, 2]
    assert_same_loss(graph, folded)


def test_a_parameter_read_elsewhere_is_no_part_of_a_stack() -> None:
    graph = _with_reader(lambda b, y, w: b.einsum("B D, D E -> B E", y[3], w[0], name="tied"))
    folded = fold(graph)
    assert all("w0" not in names for names in folded.members.values())
    assert_same_loss(graph, folded)


def test_a_layer_that_reads_two_layers_back_is_not_folded() -> None:
    b = Builder(compute="f32")
    x, before = _inputs(b)
    for i in range(5):
        w = b.param(f"w{i}", [WIDTH, WIDTH], ["D", "E"])
        y = b.einsum("B D, D E -> B E", x, w, name=f"y{i}")
        before, x = x, b.pointwise(f"x{i}", ex.add(ex.x(0), ex.x(1)), y, before)
    graph = b.graph([_loss(b, x)])
    assert_same_loss(graph, fold(graph))


def test_folding_128_layers_takes_no_time() -> None:
    """Linear: four times the layers take about four times as long, never sixteen."""
    body = random_body(3)
    taken = []
    for times in (128, 512):
        graph = written_out(body, times)
        (loop,) = loops(fold(graph).graph)
        assert loop.times == times
        taken.append(min(_seconds(graph) for _ in range(3)))  # others' garbage is collected too
    assert taken[1] < 10 * max(taken[0], 0.01)


def _seconds(graph: Graph) -> float:
    start = time.process_time()
    fold(graph)
    return time.process_time() - start


PINNED = {"one": {"l2.wi": "a"}, "all alike": {f"l{i}.wi": "a" for i in range(6)}}


@pytest.mark.parametrize("pins", PINNED.values(), ids=PINNED)
def test_what_is_asked_of_one_layer_holds_for_all(pins: dict[str, str]) -> None:
    assert [loop.times for loop in loops(fold(chain("aaaaaa"), pins).graph)] == [6]


CONTRADICTIONS = {
    "of a parameter": {"l0.wi": "a", "l3.wi": "b", "l1.wi": "a", "l2.wi": "a"},
    "of a value": {f"l{i}.h": "a" if i < 3 else "b" for i in range(6)},
    "of what is carried": {f"l{i}.out": "a" if i < 3 else "b" for i in range(6)},
    "of what enters": {"start": "a", "l3.out": "b"},
}


@pytest.mark.parametrize("pins", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_layers_asked_for_different_things_are_no_loop(pins: dict[str, str]) -> None:
    graph = chain("aaaaaa")
    folded = fold(graph, pins)
    found = loops(folded.graph)
    assert all(loop.times < 6 for loop in found)
    for names in folded.members.values():
        assert len({pins[name] for name in names if name in pins}) < 2
    for carry in (carry for loop in found for carry in loop.carries):
        lying_alike = (carry.init, *folded.members[carry.exit])
        assert len({pins[name] for name in lying_alike if name in pins}) < 2
    assert_same_loss(graph, folded)
