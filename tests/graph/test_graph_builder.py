"""Building graphs: einsum, labels, broadcasting, casts, repeats, and the messages of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import (
    Builder,
    GraphError,
    contraction_sizes,
    distinct,
    parse_labels,
)
from planner.graph.core import Op
from planner.values import reference


def built() -> Builder:
    b = Builder()
    b.input("x", (2, 3, 4), ("B", "S", "D"), "f32")
    b.input("w", (4, 5), ("D", "F"), "f32")
    b.input("square", (3, 3), ("S", "S"), "f32")
    return b


@pytest.mark.parametrize("spec", ["B S D, D F -> B S F", "BSD,DF->BSF", "bsd , df -> bsf"])
def test_einsum_values(spec: str) -> None:
    b = built()
    y = b.einsum(spec, "x", "w")
    inputs = reference.random_inputs(b.graph([y]))
    expected = np.einsum("bsd,df->bsf", inputs["x"], inputs["w"])
    np.testing.assert_allclose(reference.evaluate(b.graph([y]), inputs)[y], expected)


@pytest.mark.parametrize(
    ("spec", "operands"),
    [
        ("n s h, m s h -> n m", [(2, 3, 4), (5, 3, 4)]),
        ("a b, b c, c -> a", [(2, 3), (3, 4), (4,)]),
        ("a b ->", [(2, 3)]),
        ("a b -> b a", [(2, 3)]),
        ("a, b -> b a", [(2,), (3,)]),
    ],
)
def test_einsum_is_numpys(spec: str, operands: list[tuple[int, ...]]) -> None:
    b = Builder()
    names = [
        b.input(f"x{i}", s, [f"d{j}" for j in range(len(s))], "f32")
        for i, s in enumerate(operands)
    ]
    y = b.einsum(spec, *names)
    inputs = reference.random_inputs(b.graph([y]))
    expected = np.einsum(spec.replace(" ", ""), *(inputs[n] for n in names))
    np.testing.assert_allclose(reference.evaluate(b.graph([y]), inputs)[y], expected)


@pytest.mark.parametrize(
    ("text", "rank", "labels"),
    [
        ("B S D", 3, ("B", "S", "D")),
        ("BSD", 3, ("B", "S", "D")),
        ("batch", 1, ("batch",)),
        ("batch", None, ("batch",)),
        ("", 0, ()),
    ],
)
def test_labels(text: str, rank: int | None, labels: tuple[str, ...]) -> None:
    assert parse_labels(text, rank) == labels


def test_labels_are_made_distinct() -> None:
    assert distinct(("S", "S", "T", "S")) == ("S", "S'", "T", "S''")


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda b: b.einsum("B S D -> B S", "x", "w"), "names 1 operands, 2 are given"),
        (lambda b: b.einsum("B S D, D F", "x", "w"), "has no '->'"),
        (lambda b: b.einsum("B S, D F -> B", "x", "w"), "'x' has 3 dimensions ['B', 'S', 'D']"),
        (lambda b: b.einsum("B S D, S F -> B", "x", "w"), "'S' is 3 elsewhere, but 4 in 'w'"),
        (lambda b: b.einsum("B S D -> B Q", "x"), "result dimension 'Q' is in no operand"),
        (lambda b: b.einsum("B S D -> B B", "x"), "repeats a dimension"),
        (lambda b: b.einsum("B S D -> B", "y"), "unknown tensor 'y'"),
        (lambda b: b.pointwise("p", ex.neg(ex.x(0)), "square"), "two dimensions of the same name"),
        (
            lambda b: b.pointwise("p", ex.add(ex.x(0), ex.x(1)), "x", "w"),
            "p: dimension 'S' is 3 elsewhere",
        ),
        (lambda b: b.repeat("loop", 0), "a repeat runs at least once, not 0 times"),
        (lambda b: b.enter("x"), "a carry belongs to a repeat"),
        (lambda b: b.repeat("loop", 2).graph([]), "a repeat is still open"),
        (lambda b: b.end_repeat([]), "only a repeat can be closed"),
        (lambda b: layers.softmax(b, "x", "T"), "'T' is not a dimension of 'x'"),
        (lambda b: layers.group_norm(b, "x", "w", None, 3), "4 channels do not divide into 3"),
    ],
)
def test_errors_name_the_cause(apply: Callable[[Builder], Any], message: str) -> None:
    with pytest.raises(GraphError) as error:
        apply(built())
    assert message in str(error.value)


def test_a_carry_keeps_its_shape() -> None:
    b = built()
    r = b.repeat("loop", 2)
    entry = r.enter("x")
    out = r.einsum("B S D, D F -> B S F", entry, "w")
    with pytest.raises(GraphError, match=r"'x' enters as \[2, 3, 4\] but leaves as \[2, 3, 5\]"):
        r.end_repeat([("x", entry, out)])


def test_parameters_are_not_stacked_three_times() -> None:
    b = Builder()
    inner = b.repeat("a", 2).repeat("b", 2)
    inner.param("w", (3,), ("D",))
    assert b.tensors["a.b.w"].shape == (2, 2, 3)
    assert b.tensors["a.b.w"].dims == ("repeats", "layers", "D")
    with pytest.raises(GraphError, match="stacked by two repeats, not by three"):
        inner.repeat("c", 2).param("w", (3,), ("D",))


def test_parameters_are_cast_once_per_scope() -> None:
    b = Builder(compute="bf16", param_dtype="f32")
    p = b.param("p", (4,), ("D",))
    assert b.use(p) == b.use(p) == "p.cast"
    assert (b.lookup("p").dtype, b.lookup("p.cast").dtype) == ("f32", "bf16")
    assert b.use("p.cast") == "p.cast"
    same = Builder(compute="f32", param_dtype="f32")
    assert same.use(same.param("p", (4,), ("D",))) == "p"


def test_names_are_numbered_over_all_scopes() -> None:
    b = built()
    first = b.pointwise("h", ex.neg(ex.x(0)), "x")
    r = b.repeat("loop", 2)
    inside = [r.pointwise("h", ex.neg(ex.x(0)), "x") for _ in range(2)]
    assert [first, *inside, b.unique("h")] == ["h", "loop.h", "loop.h_2", "h_2"]


def only_op(apply: Callable[[Builder], Any]) -> Op:
    b = built()
    apply(b)
    (op,) = b.nodes
    assert isinstance(op, Op)
    return op


@pytest.mark.parametrize(
    ("apply", "sizes"),
    [
        (lambda b: b.einsum("B S D, D F -> B S F", "x", "w"), (1, 6, 5, 4)),
        (lambda b: b.einsum("B S D, B T D -> B S T", "x", "x"), (2, 3, 3, 4)),
        (lambda b: b.einsum("S T, B S D -> B T D", "square", "x"), (1, 3, 8, 3)),
        (lambda b: b.einsum("D F, B S D -> B S F", "w", "x"), (1, 5, 6, 4)),
        (lambda b: b.einsum("B S D, B S D -> B", "x", "x"), None),  # the vector unit's work
        (lambda b: b.einsum("B S D -> B", "x"), None),
        (lambda b: b.einsum("B S D, D F -> B S D F", "x", "w"), None),
        (lambda b: b.pointwise("p", ex.square(ex.x(0)), "x"), None),
    ],
)
def test_matmul_sizes(apply: Callable[[Builder], Any], sizes: Any) -> None:
    assert contraction_sizes(only_op(apply)) == sizes
