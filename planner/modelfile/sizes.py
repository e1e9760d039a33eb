"""Dims and sizes: named numbers, arithmetic on them, and declarations such as "i32[B, S]"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from planner.graph.builder import distinct
from planner.modelfile.diagnostics import nearest
from planner.modelfile.fields import LARGEST
from planner.modelfile.language import OPERATORS, OpSyntax, offset_of, parse_expression
from planner.modelfile.scalars import number_of

Number = int | float

_DECLARATION = re.compile(r"\s*([A-Za-z][A-Za-z0-9]*)?\s*\[([^\[\]]*)\]\s*")
DTYPES = ("i32", "i64", "f32", "bf16", "f16")
_MOST_BITS = 400  # of an intermediate result
# Dimensions that loops and accumulation put in front of a tensor's own.
RESERVED = ("layers", "repeats", "micro")


class SizeError(ValueError):
    """A size that cannot be: stable code, message, hint, offset in the text."""

    def __init__(self, code: str, message: str, hint: str = "", offset: int = 0) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.offset = code, message, hint, offset


class Unknown(Exception):
    """A value that depends on something already reported: nothing more to say."""


@dataclass
class Dims:
    """Sizes by name. A name in `broken` was given, but wrongly: what uses it is Unknown.

    `lost`: no size could be read at all, so no name is wrong.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    lost: bool = False

    def __getitem__(self, name: str) -> int:
        if name in self.broken or (self.lost and name not in self.sizes):
            raise Unknown
        if name not in self.sizes:
            raise SizeError(
                "undefined-dim", f"dim '{name}' is not defined",
                nearest(name, self.sizes, "add it to dims"),
            )  # fmt: skip
        return self.sizes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sizes or name in self.broken


def evaluate(value: int | str, dims: Dims) -> int:
    """A size: a number, a dim, or arithmetic on dims. SizeError, or Unknown."""
    if isinstance(value, int):
        return value
    text = value
    if text in dims:
        return dims[text]
    try:
        node = parse_expression(text)
    except OpSyntax as error:
        raise SizeError("bad-size", error.message, error.hint, error.offset) from None
    return as_size(arithmetic(node, text, dims), text)


def as_size(value: Number, text: str, offset: int = 0) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise SizeError("not-divisible", f"'{text}' is {value:g}, no whole number", "", offset)
    if not 0 < value <= LARGEST:
        raise SizeError("bad-value", f"'{text}' is {value:g}, must be from 1 to 2^48", "", offset)
    return value


def arithmetic(node: ast.expr, text: str, dims: Dims) -> Number:
    """The number that `node` (of the language) is, all names being dims."""
    at = offset_of(node, text)
    if isinstance(node, ast.Name):
        try:
            return dims[node.id]
        except SizeError as error:
            raise SizeError(error.code, error.message, error.hint, at) from None
    if isinstance(node, ast.Constant) and is_number(node.value):
        return bounded(node.value, at)
    if isinstance(node, ast.UnaryOp):
        operand = arithmetic(node.operand, text, dims)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        left, right = (arithmetic(n, text, dims) for n in (node.left, node.right))
        return compute(OPERATORS[type(node.op)], left, right, at)
    raise SizeError("bad-size", "a size is made of numbers and dims", "", at)


def is_number(value: object) -> TypeGuard[Number]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def bounded(value: Number, offset: int) -> Number:
    """`value`, unless it is too large to go on with (9**9**9)."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise SizeError("bad-size", "no reasonable number", "", offset)
    return value


def compute(operator: str, left: Number, right: Number, offset: int) -> Number:
    """`left operator right`; SizeError for what has no (reasonable) result."""
    try:
        result = _compute(operator, left, right)
    except ZeroDivisionError:
        raise SizeError("bad-size", "division by zero", "", offset) from None
    except OverflowError:
        raise SizeError("bad-size", "no reasonable number", "", offset) from None
    if isinstance(result, complex):
        raise SizeError("bad-size", "no reasonable number", "", offset)
    return bounded(result, offset)


def _compute(operator: str, left: Number, right: Number) -> Number:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator == "/":
        whole = isinstance(left, int) and isinstance(right, int) and left % right == 0
        return left // right if whole else left / right
    if operator == "//":
        return left // right
    if abs(right) > _MOST_BITS:
        raise OverflowError
    result: Number = left**right
    return result


def resolve(given: Mapping[str, int | str]) -> tuple[dict[str, int], dict[str, SizeError]]:
    """Sizes of dims that may be made of each other, and what is wrong with the rest."""
    solver = _Resolver(given)
    for name in given:
        solver.get(name, ())
    return solver.sizes, solver.errors


class _Resolver:
    def __init__(self, given: Mapping[str, int | str]) -> None:
        self.given = given
        self.sizes: dict[str, int] = {}
        self.errors: dict[str, SizeError] = {}
        self.silent: set[str] = set()

    def get(self, name: str, waiting: tuple[str, ...]) -> None:
        if name in self.sizes or name in self.errors or name in self.silent:
            return
        if name in waiting:
            circle = " → ".join((*waiting[waiting.index(name) :], name))
            self.errors[name] = SizeError("cycle", f"dims go round in a circle: {circle}")
            return
        value = self.given[name]
        # Chains of dims are as short as people write them; this bounds the recursion.
        if len(waiting) > 100:
            self.errors[name] = SizeError("bad-size", "made of more than 100 other dims")
            return
        for other in _names(value):
            if other in self.given:
                self.get(other, (*waiting, name))
        if name in self.errors:  # part of a circle
            return
        self._evaluate(name, value)

    def _evaluate(self, name: str, value: int | str) -> None:
        known = Dims({k: v for k, v in self.sizes.items() if k != name})
        known.broken = (self.errors.keys() | self.silent) - {name}
        try:
            size = evaluate(value, known)
            self.sizes[name] = as_size(size, str(value))
        except SizeError as error:
            self.errors[name] = error
        except Unknown:
            self.silent.add(name)


def _names(value: int | str) -> Iterable[str]:
    if isinstance(value, int):
        return []
    try:
        node = parse_expression(value)
    except OpSyntax:
        return []
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


@dataclass(frozen=True)
class Declaration:
    """`dtype` is empty if the text names none; `dims` are the (distinct) names."""

    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]


def declaration(text: str, dims: Dims) -> Declaration:
    """The tensor that "i32[B, S]" declares; SizeError (with offset), or Unknown."""
    match = _DECLARATION.fullmatch(text)
    if not match:
        raise SizeError(
            "bad-declaration", f"'{text[:60]}' declares no tensor", 'write "f32[B, S]" or "[D, F]"'
        )
    dtype = match[1] or ""
    if dtype and dtype not in DTYPES:
        raise SizeError("bad-declaration", f"unknown type '{dtype}'", nearest(dtype, DTYPES))
    shape, labels = [], []
    start = match.start(2)
    words = match[2].split(",") if match[2].strip() else []
    for word in words:
        label, size = _dimension(word, start, dims)
        shape.append(size)
        labels.append(label)
        start += len(word) + 1
    # Distinct from each other and from what loops put in front of them.
    return Declaration(dtype, tuple(shape), distinct((*RESERVED, *labels))[len(RESERVED) :])


def _dimension(word: str, start: int, dims: Dims) -> tuple[str, int]:
    """Name and size of one dimension; a number names itself."""
    name = word.strip()
    start += len(word) - len(word.lstrip())
    number = number_of(name)
    try:
        if not name:
            raise SizeError("bad-declaration", "a dimension is missing between the commas")
        size = as_size(number, name) if number is not None else evaluate(name, dims)
    except SizeError as error:
        raise SizeError(error.code, error.message, error.hint, start + error.offset) from None
    return name, size
