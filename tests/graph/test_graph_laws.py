"""Factor rules are true: of every op, forward and backward, evaluated in pieces."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from graph_support import (
    CASES,
    check_rule,
    check_split,
    cut,
    divisors,
    executed,
    expressions,
    join,
    step_of,
    transformer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph import structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Op
from planner.graph.derive import training_step
from planner.graph.vjp import VJPS
from planner.values import reference


@pytest.mark.parametrize("case", CASES)
def test_rules_of_all_ops_of_a_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(CASES[case])
    ops = executed(step, reference.random_inputs(step), monkeypatch)
    assert {op.phase for op, _ in ops} >= {"forward", "backward", "update"}
    for op, args in ops:
        check_rule(op, args)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor"])
def test_rules_of_a_transformer_step(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training_step(transformer(optimizer=optimizer, accumulation_steps=2))
    for op, args in executed(step, reference.random_inputs(step), monkeypatch):
        check_rule(op, args)


@pytest.mark.parametrize("case", [c for c in CASES if "conv" in c or "reshape" in c])
def test_shards_alone_tell_their_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels other than `map` take sizes of parallel factors from the arrays, not the rule."""
    step = step_of(CASES[case])
    checked = 0
    for op, args in executed(step, reference.random_inputs(step), monkeypatch):
        major = {dim[0] for dims in (*op.rule.ins, *op.rule.outs) for dim in dims if dim}
        minor = {f for dims in (*op.rule.ins, *op.rule.outs) for dim in dims for f in dim[1:]}
        for i, factor in enumerate(op.rule.factors):
            if op.kind == "map" or factor.kind != "parallel" or i not in major - minor:
                continue
            for pieces in divisors(factor.size):
                check_split(op, args, i, pieces, localised=False)
                checked += 1
    assert checked


# ---- random geometries, shapes, expressions ------------------------------------------------------


def random_args(b: Builder, op: Op, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=b.lookup(t).shape) for t in op.ins]


def check_with_gradients(b: Builder, seed: int) -> None:
    """The last op of `b` and the gradient ops of all its operands obey their rules."""
    op = next(n for n in reversed(b.nodes) if isinstance(n, Op))
    out = b.lookup(op.outs[0])
    g = b.input("g", out.shape, out.dims, "f32")
    before = len(b.nodes)
    VJPS[op.kind](b, op, {op.outs[0]: g}, range(len(op.ins)))
    ops = [op, *(n for n in b.nodes[before:] if isinstance(n, Op))]
    assert len(ops) > 1
    for node in ops:
        check_rule(node, random_args(b, node, seed))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Builder, int]:
    rank = draw(st.integers(1, 2))
    per_dim = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    taps, stride, dilation = draw(per_dim), draw(per_dim), draw(per_dim)
    groups, per_group = draw(st.sampled_from([(1, 4), (2, 2), (4, 1), (2, 1)]))
    features = groups * draw(st.integers(1, 2))
    reaches = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    spatial = [r + draw(st.integers(0, 3)) for r in reaches]
    padding = draw(
        st.sampled_from(["same", "valid"])
        | st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=rank, max_size=rank)
    )
    b = Builder(compute="f32")
    names = ["H", "W"][:rank]
    x = b.input("x", (2, *spatial, groups * per_group), ("B", *names, "C"), "f32")
    w = b.input("w", (*taps, per_group, features), (*(f"k{n}" for n in names), "I", "O"), "f32")
    op = draw(st.sampled_from([windows.conv, windows.conv_transpose]))
    if op is windows.conv_transpose and not isinstance(padding, str):
        padding = "valid"  # cropping more than there is would be an error
    op(b, x, w, stride=stride, dilation=dilation, padding=padding, groups=groups)
    return b, draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_convolutions_of_any_geometry(case: tuple[Builder, int]) -> None:
    check_with_gradients(*case)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two factorisations of one number, with ones thrown in."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=1, max_size=5))
    found = []
    for _ in range(2):
        order = draw(st.permutations(primes))
        cuts = sorted(draw(st.sets(st.integers(0, len(primes)), max_size=3)))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(primes)], strict=True)]
        found.append([prod(p) for p in parts])
    return found[0], found[1]


@given(shapes(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_reshapes_of_any_shape(pair: tuple[list[int], list[int]], seed: int) -> None:
    before, after = pair
    b = Builder()
    x = b.input("x", before, [f"a{i}" for i in range(len(before))], "f32")
    structural.reshape(b, x, after, [f"b{i}" for i in range(len(after))])
    check_with_gradients(b, seed)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_maps_of_any_expression(data: st.DataObject) -> None:
    labels = ("A", "B", "C")
    sizes = dict(zip(labels, (2, 4, 3), strict=True))
    b = Builder()
    operands = []
    for i in range(data.draw(st.integers(1, 3))):
        own = data.draw(st.permutations(labels))[: data.draw(st.integers(1, 3))]
        name = b.input(f"x{i}", [sizes[d] for d in own], own, "f32")
        operands.append((name, own))
    value = data.draw(expressions(len(operands), labels))
    out = data.draw(st.permutations(labels))[: data.draw(st.integers(0, 3))]
    combiner = data.draw(st.sampled_from(["sum", "max"]))
    b.map("y", operands, out, value, sizes=sizes, combiner=combiner)
    op = b.nodes[-1]
    assert isinstance(op, Op)
    check_rule(op, random_args(b, op, 0))


# ---- the checks can fail ------------------------------------------------------------------------


def test_a_wrong_rule_is_found() -> None:
    """Declaring the dimension of a running sum parallel breaks the law."""
    b = Builder()
    x = b.input("x", (4,), ("S",), "f32")
    structural.cumsum(b, x, "S")
    op = b.nodes[-1]
    assert isinstance(op, Op)
    lie = tuple(replace(f, kind="parallel") for f in op.rule.factors)
    wrong = replace(op, rule=replace(op.rule, factors=lie))
    with pytest.raises(AssertionError):
        check_rule(wrong, [np.ones(4)])


def test_a_cut_is_undone_by_join() -> None:
    array = np.arange(24.0).reshape(2, 12)
    dims, sizes = ((0,), (1, 2)), [2, 3, 4]
    parts = [cut(array, dims, sizes, 2, slice(2 * i, 2 * i + 2)) for i in range(2)]
    assert parts[0].shape == (2, 6)
    np.testing.assert_array_equal(join(parts, dims, [2, 3, 2], 2), array)
