"""Scalar expressions: what an elementwise or map-reduce op computes at one point.

An expression is plain data, a nested tuple:

    ("x", i)          operand i of the op
    ("c", 2.0)        a constant
    ("i", "S")        the global index of factor S at this point (masks, one-hot)
    (fn, e1, ...)     a function of FUNCTIONS

Evaluation in NumPy, symbolic derivatives, substitution and simplification live here;
nothing in this module knows about tensors, shapes or sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Expr = tuple[Any, ...]

_GELU_C = math.sqrt(2.0 / math.pi)  # tanh approximation of GELU, Hendrycks & Gimpel 2016
_GELU_A = 0.044715


def x(i: int) -> Expr:
    return ("x", i)


def c(value: float) -> Expr:
    return ("c", float(value))


def index(factor: str) -> Expr:
    return ("i", factor)


def _gelu(v: Any) -> Any:
    return 0.5 * v * (1.0 + np.tanh(_GELU_C * (v + _GELU_A * v**3)))


def _dgelu(v: Any) -> Any:
    t = np.tanh(_GELU_C * (v + _GELU_A * v**3))
    return 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * _GELU_C * (1.0 + 3.0 * _GELU_A * v**2)


def _sigmoid(v: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * v))


# name -> (arity, NumPy implementation)
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / b),
    "neg": (1, lambda a: -a),
    "exp": (1, np.exp),
    "log": (1, np.log),
    "tanh": (1, np.tanh),
    "sqrt": (1, np.sqrt),
    "rsqrt": (1, lambda a: 1.0 / np.sqrt(a)),
    "sigmoid": (1, _sigmoid),
    "gelu": (1, _gelu),
    "dgelu": (1, _dgelu),
    "abs": (1, np.abs),
    "sign": (1, np.sign),
    "max": (2, np.maximum),
    "min": (2, np.minimum),
    "floor": (1, np.floor),
    "eq": (2, lambda a, b: (a == b) * 1.0),
    "ge": (2, lambda a, b: (a >= b) * 1.0),
    "gt": (2, lambda a, b: (a > b) * 1.0),
    "where": (3, lambda p, a, b: np.where(p != 0, a, b)),
    "stop": (1, lambda a: a),
}


def add(a: Expr, b: Expr) -> Expr:
    if a == c(0):
        return b
    return a if b == c(0) else ("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    if b == c(0):
        return a
    return neg(b) if a == c(0) else ("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    if a == c(0) or b == c(0):
        return c(0)
    if a[0] == "c" and b[0] == "c":
        return c(a[1] * b[1])
    if a == c(1):
        return b
    return a if b == c(1) else ("mul", a, b)


def div(a: Expr, b: Expr) -> Expr:
    if a == c(0):
        return c(0)
    return a if b == c(1) else ("div", a, b)


def neg(a: Expr) -> Expr:
    return c(-a[1]) if a[0] == "c" else ("neg", a)


def call(fn: str, *args: Expr) -> Expr:
    """The function `fn` of FUNCTIONS applied to `args`, with trivial cases simplified."""
    simple: dict[str, Callable[..., Expr]] = {
        "add": add, "sub": sub, "mul": mul, "div": div, "neg": neg,
    }  # fmt: skip
    return simple[fn](*args) if fn in simple else (fn, *args)


def whole_part(a: Expr, divisor: int) -> Expr:
    """⌊a / divisor⌋ of whole numbers, also where a chip's division is not exact."""
    return ("floor", div(add(a, c(0.5)), c(divisor)))


def silu(a: Expr) -> Expr:
    return mul(a, ("sigmoid", a))


def relu(a: Expr) -> Expr:
    return ("max", a, c(0))


def square(a: Expr) -> Expr:
    return mul(a, a)


def evaluate(e: Expr, args: Sequence[Any], indices: Mapping[str, Any]) -> Any:
    """Value of `e`; `args[i]` are broadcastable arrays, `indices[f]` index arrays."""
    if e[0] == "x":
        return args[e[1]]
    if e[0] == "c":
        return e[1]
    if e[0] == "i":
        return indices[e[1]]
    return FUNCTIONS[e[0]][1](*(evaluate(part, args, indices) for part in e[1:]))


def _leaf(e: Expr) -> bool:
    return e[0] in ("x", "c", "i")


def derivative(e: Expr, i: int) -> Expr:
    """∂e/∂x_i, simplified; comparisons, `floor`, `sign` and `stop` have derivative 0."""
    if _leaf(e):
        return c(1.0 if e == ("x", i) else 0.0)
    if i not in arguments(e):
        return c(0)
    return _RULES[e[0]](e, i)


def _d_mul(e: Expr, i: int) -> Expr:
    return add(mul(derivative(e[1], i), e[2]), mul(e[1], derivative(e[2], i)))


def _d_div(e: Expr, i: int) -> Expr:
    top = div(derivative(e[1], i), e[2])
    bottom = derivative(e[2], i)
    if bottom == c(0):
        return top
    return sub(top, mul(bottom, div(e[1], mul(e[2], e[2]))))


def _chain(outer: Callable[[Expr], Expr]) -> Callable[[Expr, int], Expr]:
    return lambda e, i: mul(outer(e), derivative(e[1], i))


def _d_max(e: Expr, i: int) -> Expr:
    return ("where", ("ge", e[1], e[2]), derivative(e[1], i), derivative(e[2], i))


def _d_min(e: Expr, i: int) -> Expr:
    return ("where", ("ge", e[2], e[1]), derivative(e[1], i), derivative(e[2], i))


def _zero(e: Expr, i: int) -> Expr:
    return c(0)


_RULES: dict[str, Callable[[Expr, int], Expr]] = {
    "add": lambda e, i: add(derivative(e[1], i), derivative(e[2], i)),
    "sub": lambda e, i: sub(derivative(e[1], i), derivative(e[2], i)),
    "mul": _d_mul,
    "div": _d_div,
    "neg": lambda e, i: neg(derivative(e[1], i)),
    "exp": _chain(lambda e: e),
    "log": _chain(lambda e: div(c(1), e[1])),
    "tanh": _chain(lambda e: sub(c(1), square(e))),
    "sqrt": _chain(lambda e: div(c(0.5), e)),
    "rsqrt": _chain(lambda e: mul(c(-0.5), mul(e, square(e)))),
    "sigmoid": _chain(lambda e: mul(e, sub(c(1), e))),
    "gelu": _chain(lambda e: ("dgelu", e[1])),
    "abs": _chain(lambda e: ("sign", e[1])),
    "max": _d_max,
    "min": _d_min,
    "where": lambda e, i: ("where", e[1], derivative(e[2], i), derivative(e[3], i)),
    **dict.fromkeys(("eq", "ge", "gt", "floor", "sign", "stop"), _zero),
}


def arguments(e: Expr) -> frozenset[int]:
    """The operands that `e` reads."""
    if e[0] == "x":
        return frozenset((e[1],))
    if _leaf(e):
        return frozenset()
    return frozenset().union(*(arguments(part) for part in e[1:]))


def compared(e: Expr) -> frozenset[int]:
    """The operands that `e` reads in comparisons."""
    if _leaf(e):
        return frozenset()
    if e[0] in ("eq", "ge", "gt"):
        return arguments(e)
    return frozenset().union(*(compared(part) for part in e[1:]))


def index_factors(e: Expr) -> frozenset[str]:
    """The factors whose index `e` reads."""
    if e[0] == "i":
        return frozenset((e[1],))
    if _leaf(e):
        return frozenset()
    return frozenset().union(*(index_factors(part) for part in e[1:]))


def substitute(e: Expr, args: Mapping[int, Expr], factors: Mapping[str, str] | None = None) -> Expr:
    """`e` with operands replaced by expressions and index factors renamed."""
    if e[0] == "x":
        return args.get(e[1], e)
    if e[0] == "i":
        return ("i", (factors or {}).get(e[1], e[1]))
    if e[0] == "c":
        return e
    return call(e[0], *(substitute(part, args, factors) for part in e[1:]))


def operations(e: Expr) -> int:
    """Number of different scalar operations in `e`: the vector-unit work at one point.

    A subexpression that occurs twice is computed once, as every compiler does.
    """
    found: set[Expr] = set()
    pending = [e]
    while pending:
        part = pending.pop()
        if not _leaf(part) and part not in found:
            found.add(part)
            pending.extend(part[1:])
    return len(found)


def size(e: Expr) -> int:
    """Number of nodes of `e` as a tree."""
    return 1 if _leaf(e) else 1 + sum(size(part) for part in e[1:])


def product_of(e: Expr) -> tuple[int, ...] | None:
    """Operands whose plain product (times constants) is `e`, or None: a contraction."""
    if e[0] == "x":
        return (e[1],)
    if e[0] == "c":
        return ()
    if e[0] in ("neg", "stop"):
        return product_of(e[1])
    if e[0] == "div" and e[2][0] == "c":
        return product_of(e[1])
    if e[0] != "mul":
        return None
    left, right = product_of(e[1]), product_of(e[2])
    return None if left is None or right is None else left + right


def linear_in(e: Expr, group: frozenset[int]) -> bool:
    """Whether e(.., t·x_g, ..) = t·e(.., x_g, ..): homogeneous and additive in `group`.

    If so, partial sums of all operands of the group give a partial sum of the result.
    """
    if not arguments(e) & group:
        return e == c(0)
    if e[0] == "x":
        return e[1] in group
    if e[0] in ("add", "sub"):
        return linear_in(e[1], group) and linear_in(e[2], group)
    if e[0] == "neg":
        return linear_in(e[1], group)
    if e[0] == "mul":
        left, right = bool(arguments(e[1]) & group), bool(arguments(e[2]) & group)
        return left != right and linear_in(e[1] if left else e[2], group)
    if e[0] == "div":
        return not arguments(e[2]) & group and linear_in(e[1], group)
    if e[0] == "where":
        return not arguments(e[1]) & group and all(linear_in(p, group) for p in e[2:])
    return False
