"""Scalar expressions as JAX source text: operators, jnp functions, and the dtype that results.

Only text is made here; which arrays stand for the operands is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from planner.graph import expr as ex
from planner.sharding.spec import Spec

JNP_DTYPES = {
    "f64": "jnp.float64", "f32": "jnp.float32", "bf16": "jnp.bfloat16", "f16": "jnp.float16",
    "i64": "jnp.int64", "i32": "jnp.int32", "i16": "jnp.int16", "i8": "jnp.int8",
    "u8": "jnp.uint8", "u32": "jnp.uint32", "bool": "jnp.bool_",
}  # fmt: skip

COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">"}
OPERATORS = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
CALLS = {
    "exp": "jnp.exp", "log": "jnp.log", "tanh": "jnp.tanh", "sqrt": "jnp.sqrt",
    "rsqrt": "lax.rsqrt", "sigmoid": "jax.nn.sigmoid", "gelu": "jax.nn.gelu", "abs": "jnp.abs",
    "sign": "jnp.sign", "max": "jnp.maximum", "min": "jnp.minimum", "floor": "jnp.floor",
    "stop": "lax.stop_gradient",
}  # fmt: skip
WEAK = "weak"  # a Python number: takes the dtype of whatever it meets
_RANK = {"bool": 0, "i8": 1, "u8": 1, "i16": 2, "i32": 3, "u32": 3, "i64": 4, WEAK: 5}


@dataclass(frozen=True)
class Writer:
    """Writes expressions: `operands[i]` is the text of operand i, `dtypes[i]` its dtype,
    `indices[f]` the text of the index array of factor f."""

    operands: Sequence[str]
    dtypes: Sequence[str]
    indices: Mapping[str, str]

    def text(self, e: ex.Expr, level: int = 0) -> str:
        """Source of `e`, in parentheses if an operator of precedence `level` is around it."""
        kind = e[0]
        if kind == "x":
            return self.operands[e[1]]
        if kind == "c":
            return number(e[1])
        if kind == "i":
            return self.indices[e[1]]
        if kind in COMPARISONS:
            # As a number: 1 where it holds. Bare comparisons are written by `condition`.
            return f"jnp.where({self.condition(e)}, 1.0, 0.0)"
        special = _SPECIAL.get(kind)
        written = special(self, e) if special else None
        if written is not None:
            return written
        if kind in OPERATORS:
            return self._operator(e, level)
        if kind == "neg":
            return _wrapped(f"-{self.text(e[1], 3)}", level >= 2)
        return f"{CALLS[kind]}({', '.join(self.text(part) for part in e[1:])})"

    def condition(self, e: ex.Expr) -> str:
        """`e` ≠ 0 as a boolean array."""
        if e[0] in COMPARISONS:
            return f"{self.text(e[1], 1)} {COMPARISONS[e[0]]} {self.text(e[2], 1)}"
        return f"{self.text(e, 1)} != 0"

    def _operator(self, e: ex.Expr, level: int) -> str:
        sign, own = OPERATORS[e[0]]
        left = self.text(e[1], own)
        # a - (b + c), a / (b · c): the right operand needs a tighter binding.
        right = self.text(e[2], own + 1 if e[0] in ("sub", "div") else own)
        return _wrapped(f"{left} {sign} {right}", own < level)

    def dtype(self, e: ex.Expr) -> str:
        """What JAX's promotion gives for the text of `e`."""
        kind = e[0]
        if kind == "x":
            return self.dtypes[e[1]]
        if kind == "c":
            return WEAK
        if kind == "i":
            return "i32"
        if kind in COMPARISONS:
            return WEAK
        parts = e[2:] if kind == "where" else e[1:]
        found = promoted([self.dtype(part) for part in parts])
        if _RANK.get(found, 9) <= 4 and kind not in ("add", "sub", "mul", "max", "min", "where"):
            return WEAK  # integers become floats
        return found


def promoted(dtypes: Sequence[str]) -> str:
    """JAX's result dtype; two different 16-bit floats give f32."""
    floats = {d for d in dtypes if d not in _RANK}
    if not floats:
        return max(dtypes, key=_RANK.__getitem__)
    if len(floats) == 1:
        return floats.pop()
    return "f64" if "f64" in floats else "f32"


def number(value: float) -> str:
    """Whole numbers without a point, as long as JAX takes them for 32-bit integers."""
    return str(int(value)) if abs(value) < 2**31 and value == int(value) else repr(value)


def partition(spec: Spec) -> str:
    """P(…) with one entry per dimension."""
    entries = [
        "None" if not d else f'"{d[0]}"' if len(d) == 1 else str(tuple(d)).replace("'", '"')
        for d in spec.dims
    ]
    return f"P({', '.join(entries)})"


def _wrapped(text: str, needed: bool) -> str:
    return f"({text})" if needed else text


def _square_or_silu(w: Writer, e: ex.Expr) -> str | None:
    left, right = e[1], e[2]
    if left == right and left[0] != "c":
        return f"jnp.square({w.text(left)})"
    if right == ("sigmoid", left):
        return f"jax.nn.silu({w.text(left)})"
    for condition, value in ((left, right), (right, left)):
        if condition[0] in COMPARISONS and value[0] not in COMPARISONS:
            return f"jnp.where({w.condition(condition)}, {w.text(value)}, 0)"
    return None


def _relu(w: Writer, e: ex.Expr) -> str | None:
    return f"jax.nn.relu({w.text(e[1])})" if e[2] == ex.c(0) else None


def _where(w: Writer, e: ex.Expr) -> str:
    return f"jnp.where({w.condition(e[1])}, {w.text(e[2])}, {w.text(e[3])})"


def _gelu_slope(w: Writer, e: ex.Expr) -> str:
    value = w.text(e[1])
    return f"jax.jvp(jax.nn.gelu, ({value},), (jnp.ones_like({value}),))[1]"


_SPECIAL: dict[str, Callable[[Writer, ex.Expr], str | None]] = {
    "mul": _square_or_silu, "max": _relu, "where": _where, "dgelu": _gelu_slope,
}  # fmt: skip
