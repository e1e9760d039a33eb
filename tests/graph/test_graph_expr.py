"""Scalar expressions: derivatives, substitution, and what is claimed about linearity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graph_support import expressions
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph import expr as ex

POINTS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


def value(e: ex.Expr, at: list[float]) -> float:
    return float(ex.evaluate(e, [np.float64(v) for v in at], {"S": 3}))


@settings(max_examples=200, deadline=None)
@given(expressions(3, ("S",), kinks=False), POINTS, st.integers(0, 2))
def test_derivative_is_the_slope(e: ex.Expr, at: list[float], i: int) -> None:
    h = 1e-5
    above, below = (value(e, [v + s * h * (j == i) for j, v in enumerate(at)]) for s in (1, -1))
    slope = value(ex.derivative(e, i), at)
    scale = max(1.0, abs(slope), abs(above))
    # Third derivatives of these expressions can reach a few thousand: h² times that.
    assert abs((above - below) / (2 * h) - slope) < 1e-5 * scale


X, Y = ex.x(0), ex.x(1)


@pytest.mark.parametrize(
    ("e", "at", "slope"),
    [
        (("abs", X), -3.0, -1.0),
        (("abs", X), 3.0, 1.0),
        (ex.relu(X), -1.0, 0.0),
        (ex.relu(X), 2.0, 1.0),
        (("max", ex.mul(ex.c(3), X), ex.square(X)), 2.0, 3.0),
        (("max", ex.mul(ex.c(3), X), ex.square(X)), 4.0, 8.0),
        (("min", ex.mul(ex.c(3), X), ex.square(X)), 4.0, 3.0),
        (("where", ("gt", X, ex.c(1)), ex.square(X), ex.c(7)), 2.0, 4.0),
        (("where", ("gt", X, ex.c(1)), ex.square(X), ex.c(7)), 0.5, 0.0),
        (ex.mul(("stop", X), X), 5.0, 5.0),
        (("floor", X), 1.5, 0.0),
        (("sign", X), 1.5, 0.0),
        (ex.mul(("ge", X, ex.c(0)), ex.square(X)), 3.0, 6.0),
        (ex.silu(X), 0.0, 0.5),
        (("gelu", X), 0.0, 0.5),
        (("sigmoid", X), 0.0, 0.25),
        (("rsqrt", X), 4.0, -1 / 16),
        (("log", X), 4.0, 0.25),
    ],
)
def test_derivatives_known_by_hand(e: ex.Expr, at: float, slope: float) -> None:
    assert value(ex.derivative(e, 0), [at]) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (("gelu", ex.c(1)), 0.8411919906082768),  # tanh approximation, by hand
        (("sigmoid", ex.c(2)), 1 / (1 + math.exp(-2))),
        (("where", ("eq", ex.c(2), ex.index("S")), ex.c(1), ex.c(5)), 5),
        (("where", ("eq", ex.c(3), ex.index("S")), ex.c(1), ex.c(5)), 1),
        (("dgelu", ex.c(0)), 0.5),
        (("sigmoid", ex.c(-800)), 0.0),  # no overflow
    ],
)
def test_values_known_by_hand(e: ex.Expr, expected: float) -> None:
    assert value(e, []) == pytest.approx(expected, rel=1e-12)


@given(expressions(2, ("S",)), expressions(2, ("S",)), POINTS)
@settings(deadline=None)
def test_substitution_is_composition(e: ex.Expr, inner: ex.Expr, at: list[float]) -> None:
    composed = ex.substitute(e, {0: inner})
    expected = value(e, [value(inner, at), at[1]])
    assert value(composed, at) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_substitution_renames_factors() -> None:
    e = ex.add(ex.index("S"), ("tanh", ex.index("T")))
    assert ex.index_factors(ex.substitute(e, {}, {"S": "Q"})) == {"Q", "T"}


@given(
    expressions(2, ("S",)),
    st.sampled_from([frozenset({0}), frozenset({1}), frozenset({0, 1})]),
    POINTS,
    POINTS,
)
@settings(max_examples=300, deadline=None)
def test_linear_means_additive(
    e: ex.Expr, group: frozenset[int], at: list[float], other: list[float]
) -> None:
    """Where `linear_in` says yes, the parts of a sum may be taken one by one."""
    if not ex.linear_in(e, group):
        return
    first = [other[i] if i in group else at[i] for i in range(2)]
    second = [at[i] - other[i] if i in group else at[i] for i in range(2)]
    total = value(e, first) + value(e, second)
    assert total == pytest.approx(value(e, at), rel=1e-6, abs=1e-6)


def test_linear_in_known_cases() -> None:
    both = frozenset({0, 1})
    assert ex.linear_in(ex.sub(X, ex.mul(ex.c(2), Y)), both)
    assert ex.linear_in(ex.mul(X, ("exp", Y)), frozenset({0}))
    assert not ex.linear_in(ex.mul(X, Y), both)
    assert not ex.linear_in(ex.add(X, ex.c(1)), frozenset({0}))
    assert not ex.linear_in(ex.add(X, Y), frozenset({0}))
    assert not ex.linear_in(("tanh", X), frozenset({0}))


def test_products_are_recognised() -> None:
    assert ex.product_of(ex.mul(ex.c(0.5), ex.mul(X, ex.neg(Y)))) == (0, 1)
    assert ex.product_of(ex.div(ex.mul(X, Y), ex.c(3))) == (0, 1)
    assert ex.product_of(ex.div(X, Y)) is None
    assert ex.product_of(ex.add(X, Y)) is None


def test_operations_are_counted() -> None:
    assert ex.operations(X) == 0
    assert ex.operations(ex.silu(X)) == 2
    assert ex.operations(ex.square(("tanh", X))) == 2  # tanh is computed once
    assert ex.size(ex.square(("tanh", X))) == 5
    assert ex.operations(ex.add(ex.mul(X, Y), ("exp", X))) == 3
