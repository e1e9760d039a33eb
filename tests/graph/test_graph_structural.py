"""Reshape rules known by hand, values against NumPy, errors of the structural ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from planner.graph import structural
from planner.graph.builder import Builder, GraphError
from planner.graph.core import Op
from planner.graph.primitive import vector_operations
from planner.graph.structural import reshape_rule
from planner.values import reference

X = np.random.default_rng(0).normal(size=(2, 5, 3))


def built() -> tuple[Builder, str]:
    b = Builder()
    return b, b.input("x", X.shape, ("B", "S", "D"), "f32")


def last(b: Builder) -> Op:
    op = b.nodes[-1]
    assert isinstance(op, Op)
    return op


def factors(before: Sequence[int], after: Sequence[int]) -> tuple[Any, Any, Any]:
    rule = reshape_rule(
        before, [f"a{i}" for i in range(len(before))], after, [f"b{i}" for i in range(len(after))]
    )
    return [(f.size, f.kind) for f in rule.factors], list(rule.ins[0]), list(rule.outs[0])


P, K = "parallel", "blocked"


@pytest.mark.parametrize(
    ("before", "after", "expected", "ins", "outs"),
    [
        ((8, 12), (8, 3, 4), [(8, P), (3, P), (4, P)], [(0,), (1, 2)], [(0,), (1,), (2,)]),
        ((8, 3, 4), (8, 12), [(8, P), (3, P), (4, P)], [(0,), (1,), (2,)], [(0,), (1, 2)]),
        ((6, 4), (24,), [(6, P), (4, P)], [(0,), (1,)], [(0, 1)]),
        ((6, 4), (3, 8), [(3, P), (2, P), (4, P)], [(0, 1), (2,)], [(0,), (1, 2)]),
        ((5, 1), (1, 1, 5), [(5, P)], [(0,), ()], [(), (), (0,)]),
        ((1,), (), [], [()], []),
        ((4, 3), (6, 2), [(2, P), (2, K), (3, K), (3, K), (2, K)],
         [(0, 1), (3,)], [(0, 2), (4,)]),
        ((4, 3, 5), (6, 2, 5), [(2, P), (2, K), (3, K), (3, K), (2, K), (5, P)],
         [(0, 1), (3,), (5,)], [(0, 2), (4,), (5,)]),
    ],
)  # fmt: skip
def test_reshape_rules(before: Any, after: Any, expected: Any, ins: Any, outs: Any) -> None:
    assert factors(before, after) == (expected, ins, outs)


def test_reshape_factors_carry_the_names_of_the_finer_side() -> None:
    b = Builder()
    x = b.input("x", (2, 6), ("B", "HD"), "f32")
    structural.reshape(b, x, (2, 3, -1), ("B", "H", "D"))
    assert [f.name for f in last(b).rule.factors] == ["B", "H", "D"]


CASES: dict[str, tuple[Callable[[Builder, str], str], Callable[[np.ndarray], np.ndarray]]] = {
    "reshape": (
        lambda b, x: structural.reshape(b, x, (-1, 3), ("P", "D")), lambda a: a.reshape(10, 3)
    ),
    "transpose": (
        lambda b, x: structural.transpose(b, x, ("D", "B", -2)), lambda a: a.transpose(2, 0, 1)
    ),
    "concat": (
        lambda b, x: structural.concat(b, [x, x], 1), lambda a: np.concatenate([a, a], 1)
    ),
    "slice": (lambda b, x: structural.slice_dim(b, x, "S", -4, 5, 2), lambda a: a[:, 1:5:2]),
    "pad": (
        lambda b, x: structural.pad(b, x, -1, 1, 2, value=7),
        lambda a: np.pad(a, [(0, 0), (0, 0), (1, 2)], constant_values=7),
    ),
    "cumsum": (lambda b, x: structural.cumsum(b, x, "S"), lambda a: np.cumsum(a, 1)),
    "cumsum from the end": (
        lambda b, x: structural.cumsum(b, x, "S", reverse=True),
        lambda a: np.cumsum(a[:, ::-1], 1)[:, ::-1],
    ),
    "cumsum of the others before": (
        lambda b, x: structural.cumsum(b, x, "D", exclusive=True),
        lambda a: np.stack([0 * a[..., 0], a[..., 0], a[..., 0] + a[..., 1]], -1),
    ),
    "sort": (lambda b, x: structural.sort(b, x, "S")[0], lambda a: np.sort(a, 1)),
    "sort descending": (
        lambda b, x: structural.sort(b, x, "S", descending=True)[0],
        lambda a: np.sort(a, 1)[:, ::-1],
    ),
    "positions": (
        lambda b, x: structural.sort(b, x, "S")[1], lambda a: np.argsort(a, 1)
    ),
    "top_k": (
        lambda b, x: structural.top_k(b, x, 2, "S")[0], lambda a: np.sort(a, 1)[:, :2:-1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_shapes(case: str) -> None:
    ours, numpy = CASES[case]
    b, x = built()
    name = ours(b, x)
    found = reference.evaluate(b.graph([name]), {"x": X})[name]
    expected = numpy(X)
    assert b.lookup(name).shape == expected.shape
    np.testing.assert_allclose(found, expected)


def test_positions_are_integers_without_gradient() -> None:
    b, x = built()
    values, places = structural.top_k(b, x, 2, "S", label="k", name="best")
    assert (b.lookup(places).dtype, places) == ("i32", "best.indices")
    assert b.lookup(values).dims == ("B", "k", "D")
    assert structural.VJPS["sort"](b, last(b), {places: "nothing"}, [0]) == {}


def test_equal_entries_keep_their_order() -> None:
    b = Builder()
    x = b.input("x", (4,), ("S",), "f32")
    _, places = structural.top_k(b, x, 3)
    found = reference.evaluate(b.graph([places]), {"x": np.array([1.0, 2.0, 2.0, 1.0])})
    assert found[places].tolist() == [1, 2, 0]


def test_the_changed_dimension_is_blocked_and_others_parallel() -> None:
    def kinds(b: Builder) -> dict[str, str]:
        return {f.name: f.kind for f in last(b).rule.factors}

    b, x = built()
    structural.concat(b, [x, x], "S")
    assert kinds(b) == {"B": P, "S": K, "D": P, "S.0": K, "S.1": K}
    structural.pad(b, x, "D", 0, 1)
    assert kinds(b) == {"B": P, "S": P, "D": K, "D.out": K}
    structural.cumsum(b, x, "B")
    assert kinds(b) == {"B": K, "S": P, "D": P}


def test_padding_with_a_value_is_not_linear() -> None:
    b, x = built()
    structural.pad(b, x, "S", 1, 0)
    assert last(b).rule.linear == ((0,),)
    structural.pad(b, x, "S", 1, 0, value=1)
    assert last(b).rule.linear == ()


def test_work_counts_comparisons_and_additions_but_no_moves() -> None:
    b, x = built()
    structural.sort(b, x, "S")
    assert vector_operations(last(b)) == 30 * 3  # log₂ 5 rounded up
    structural.cumsum(b, x, "S")
    assert vector_operations(last(b)) == 30
    structural.reshape(b, x, (30,), ("P",))
    assert vector_operations(last(b)) == 0


def test_parameters_are_cast_on_use() -> None:
    b = Builder(compute="bf16")
    p = b.param("p", (4,), ("D",))
    for name in (
        structural.reshape(b, p, (2, 2), ("A", "B")),
        structural.concat(b, [p, p], 0),
        structural.top_k(b, p, 2)[0],
    ):
        assert b.lookup(name).dtype == "bf16"
    assert sum(n.name == "p.cast" for n in b.nodes) == 1


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda b, x: structural.reshape(b, x, (4, 7), ("A", "B")), "has 30 elements"),
        (lambda b, x: structural.reshape(b, x, (-1, 7), ("A", "B")), "has 30 elements"),
        (lambda b, x: structural.reshape(b, x, (-1, -1), ("A", "B")), "is no shape"),
        (lambda b, x: structural.reshape(b, x, (30,), ("A", "B")), "but names ['A', 'B']"),
        (lambda b, x: structural.transpose(b, x, ("B", "S")), "is no order of the dimensions"),
        (lambda b, x: structural.transpose(b, x, ("B", "B", "S")), "is no order"),
        (lambda b, x: structural.slice_dim(b, x, "T", 0, 1), "has no dimension 'T'"),
        (lambda b, x: structural.slice_dim(b, x, 3, 0, 1), "none is number 3"),
        (lambda b, x: structural.slice_dim(b, x, "S", 0, 6), "[0:6:1] is no part"),
        (lambda b, x: structural.slice_dim(b, x, "S", 3, 3), "[3:3:1] is no part"),
        (lambda b, x: structural.pad(b, x, "S", -1, 0), "must not be negative"),
        (lambda b, x: structural.top_k(b, x, 6, "S"), "6 of the 5 entries of 'S'"),
        (lambda b, x: structural.concat(b, [], "S"), "nothing to concatenate"),
        (
            lambda b, x: structural.concat(
                b, [x, structural.slice_dim(b, x, "D", 0, 1)], "S"
            ),
            "does not continue 'x' f32[2, 5, 3] along 'S'",
        ),
    ],
)
def test_errors_name_the_cause(apply: Callable[[Builder, str], Any], message: str) -> None:
    b, x = built()
    with pytest.raises(GraphError) as error:
        apply(b, x)
    assert message in str(error.value)


def test_an_ambiguous_dimension_name_is_an_error() -> None:
    b = Builder()
    x = b.input("x", (3, 3), ("S", "S"), "f32")
    with pytest.raises(GraphError, match="more than one dimension 'S'"):
        structural.cumsum(b, x, "S")
    assert b.lookup(structural.cumsum(b, x, 1)).shape == (3, 3)
