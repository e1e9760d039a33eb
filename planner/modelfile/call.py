"""Expressions of the op language onto a builder: arithmetic, calls, what arguments may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.graph.builder import Builder, GraphError
from planner.graph.core import Tensor
from planner.modelfile import functions
from planner.modelfile.diagnostics import nearest
from planner.modelfile.functions import FUNCTIONS, Argument, Context, Function
from planner.modelfile.language import OPERATORS, offset_of
from planner.modelfile.sizes import Dims, SizeError, bounded, compute, is_number

_LISTED = "docs/model-files.md lists the functions"
# What other libraries call the functions.
_OTHER_NAMES = {
    "swish": "silu", "matmul": "einsum", "dot": "einsum", "lookup": "gather", "take": "gather",
    "softmax_cross_entropy": "cross_entropy", "concatenate": "concat", "permute": "transpose",
    "view": "reshape", "argsort": "sort", "conv2d": "conv", "astype": "cast",
}  # fmt: skip


class OpError(ValueError):
    """An op that cannot be: code, message, hint, offset in its text."""

    def __init__(self, code: str, message: str, offset: int, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.offset, self.hint = code, message, offset, hint


class Ref(str):
    """A tensor of the graph, by its name there."""


@dataclass(frozen=True)
class Evaluator:
    """`lookup` gives the meaning of a name: a Ref or a number; it raises OpError or Unknown."""

    b: Builder
    dims: Dims
    text: str
    lookup: Callable[[str, int], Any]

    def value(self, node: ast.expr, name: str) -> Any:
        """What `node` is: a Ref, a pair of them, a number, text, a list, None. `name` is what
        its tensor is called if it is new."""
        at = offset_of(node, self.text)
        if isinstance(node, ast.Name):
            return self.lookup(node.id, at)
        if isinstance(node, ast.Call):
            return self._call(node, name, at)
        if isinstance(node, ast.BinOp):
            return self._binary(node, name, at)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node, name, at)
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item, name) for item in node.elts]
        if isinstance(node, ast.Constant):
            return self._bounded(node.value, at)
        raise OpError("op-syntax", "not part of the language", at)

    def _bounded(self, value: Any, at: int) -> Any:
        try:
            return bounded(value, at) if is_number(value) else value
        except SizeError as error:
            raise OpError(error.code, error.message, at) from None

    # ---- arithmetic ------------------------------------------------------------------------

    def _operand(self, node: ast.expr, name: str) -> Any:
        value = self.value(node, name)
        if isinstance(value, Ref):
            return Ref(self.b.use(value))
        if is_number(value):
            return value
        raise OpError(
            "bad-argument", f"{_described(value)} is no tensor or number",
            offset_of(node, self.text),
        )  # fmt: skip

    def _binary(self, node: ast.BinOp, name: str, at: int) -> Any:
        operator = OPERATORS[type(node.op)]
        left = self._operand(node.left, f"{name}.left")
        right = self._operand(node.right, f"{name}.right")
        if is_number(left) and is_number(right):
            try:
                return compute(operator, left, right, at)
            except SizeError as error:
                raise OpError(error.code, error.message, at) from None
        try:
            return Ref(functions.operate(Context(self.b, name, self.dims), operator, left, right))
        except GraphError as error:
            hint = self._shapes((left, right))
            raise OpError("bad-op", _without_name(error, name), at, hint) from None

    def _shapes(self, values: Sequence[Any]) -> str:
        """What the tensors among the values look like."""
        refs = dict.fromkeys(v for v in values if isinstance(v, Ref))
        return "; ".join(f"{_plain(v)} is {described(self.b.lookup(v))}" for v in refs)

    def _unary(self, node: ast.UnaryOp, name: str, at: int) -> Any:
        operand = self._operand(node.operand, name)
        if isinstance(node.op, ast.UAdd):
            return operand
        if is_number(operand):
            return -operand
        return Ref(functions.negative(Context(self.b, name, self.dims), operand))

    # ---- calls ---------------------------------------------------------------------------

    def _call(self, node: ast.Call, name: str, at: int) -> Any:
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        found = FUNCTIONS.get(called)
        if found is None:
            other = _OTHER_NAMES.get(called)
            hint = f"it is called {other} here" if other else nearest(called, FUNCTIONS, _LISTED)
            raise OpError("unknown-function", f"unknown function '{called}'", at, hint)
        positional, keywords = self._arguments(found, node, name, at)
        try:
            result = found.call(Context(self.b, name, self.dims), *positional, **keywords)
        except GraphError as error:
            code = "bad-einsum" if called == "einsum" else "bad-op"
            hint = self._shapes(positional + list(keywords.values()))
            raise OpError(code, _without_name(error, name), at, hint) from None
        return Ref(result) if isinstance(result, str) else tuple(map(Ref, result))

    def _arguments(
        self, f: Function, node: ast.Call, name: str, at: int
    ) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        given: set[str] = set()
        for i, item in enumerate(node.args):
            argument = _positional(f, i)
            if argument is None:
                place = offset_of(item, self.text)
                raise OpError("bad-argument", f"{f.name} takes fewer arguments", place, _usage(f))
            given.add(argument.name)
            positional.append(self._argument(f, argument, item, name))
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            argument = self._keyword(f, keyword, given)
            given.add(argument.name)
            keywords[argument.name] = self._argument(f, argument, keyword.value, name)
        lacking = [a.name for a in f.arguments if a.required and a.name not in given]
        if lacking:
            raise OpError("bad-argument", f"{f.name} lacks '{lacking[0]}'", at, _usage(f))
        return positional, keywords

    def _keyword(self, f: Function, keyword: ast.keyword, given: set[str]) -> Argument:
        place = offset_of(keyword, self.text)
        known = {a.name: a for a in f.arguments if not a.several}
        argument = known.get(keyword.arg or "")
        if argument is None:
            hint = nearest(keyword.arg or "", known, _usage(f))
            raise OpError("bad-argument", f"{f.name} has no '{keyword.arg}'", place, hint)
        if argument.name in given:
            raise OpError("bad-argument", f"'{argument.name}' is given twice", place, _usage(f))
        return argument

    def _argument(self, f: Function, argument: Argument, node: ast.expr, name: str) -> Any:
        """The value of one argument, of the kind the function wants."""
        kind, place = argument.kind, offset_of(node, self.text)
        if kind in _LABELLED:
            value = self._labels(node, name)
        else:
            value = self.value(node, f"{name}.{_inner(node, argument)}")
        if value is None and argument.optional:
            return None
        if kind in _TENSORS:
            value = self._tensor(f, argument, value, place)
        elif not _ACCEPTS[kind](value):
            message = f"'{argument.name}' of {f.name} must be {_WANTED[kind]}"
            raise OpError("bad-argument", f"{message}, not {_described(value)}", place, _usage(f))
        return int(value) if kind == "Size" else value

    def _tensor(self, f: Function, argument: Argument, value: Any, place: int) -> Any:
        what = f"'{argument.name}' of {f.name} must be"
        if isinstance(value, tuple):
            raise OpError("bad-argument", f"{what} one tensor, not two", place, "take them apart")
        if not isinstance(value, Ref):
            if argument.kind == "Operand" and is_number(value):
                return value
            raise OpError("bad-argument", f"{what} a tensor, not {_described(value)}", place)
        tensor = self.b.lookup(value)
        if argument.kind == "Ids" and not tensor.dtype.startswith("i"):
            raise OpError(
                "bad-argument", f"{what} whole numbers, '{value}' is {tensor.dtype}", place,
                'declare ids as "i32[B, S]"',
            )  # fmt: skip
        return Ref(self.b.use(value))

    def _labels(self, node: ast.expr, name: str) -> Any:
        """A value in which plain names are names of dimensions, not tensors or numbers."""
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.List | ast.Tuple):
            return [self._labels(item, name) for item in node.elts]
        return self.value(node, name)


def _inner(node: ast.expr, argument: Argument) -> str:
    """Last part of the name of a tensor that is computed inside a call."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id
    return argument.name


def _positional(f: Function, i: int) -> Argument | None:
    """The argument that takes position `i`."""
    for k, argument in enumerate(f.arguments):
        if argument.several or k == i:
            return argument
    return None


def _usage(f: Function) -> str:
    return f"usage: {f.signature}"


def _without_name(error: GraphError, name: str) -> str:
    """The message without the op's name in front: the place says it."""
    return _plain(re.sub(rf"^{re.escape(name)}[.\w]*: ", "", str(error)))


def _plain(text: str) -> str:
    """Without the marks of slices and casts that the builder puts behind names."""
    return re.sub(r"(\[i\])+|\.cast(?![\w])", "", text)


def described(tensor: Tensor) -> str:
    """Type, dimensions and sizes: bf16[B=8, S=16]."""
    sizes = ", ".join(f"{d}={n}" for d, n in zip(tensor.dims, tensor.shape, strict=True))
    return f"{tensor.dtype}[{sizes}]"


def _described(value: Any) -> str:
    if isinstance(value, Ref):
        return f"the tensor '{value}'"
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, tuple):
        return "two tensors"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return str(value)
    return f"{value:g}"


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value) if value == value else False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Ref)


def _is_list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


def _either(*tests: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(test(value) for test in tests)


def _is_dim(value: Any) -> bool:
    return _is_text(value) or _is_int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and value > 0


_TENSORS = ("Tensor", "Ids", "Operand")
_LABELLED = ("Text", "Dim", "DimList", "Order")
_ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "Text": _is_text,
    "Size": _is_size,
    "Number": is_number,
    "Flag": lambda value: isinstance(value, bool),
    "Dim": _is_dim,
    "DimList": _either(_is_text, _is_list_of(_is_text)),
    "Order": _either(_is_text, _is_list_of(_is_dim)),
    "PerDim": _either(_is_int, _is_list_of(_is_int)),
    "Padding": _either(
        _is_text, _is_int, _is_list_of(_either(_is_int, _is_list_of(_is_int)))
    ),
}  # fmt: skip
_WANTED = {
    "Text": "text in quotes", "Size": "a whole number of at least 1", "Number": "a number",
    "Flag": "True or False", "Dim": "the name or number of a dimension",
    "DimList": 'names of dimensions such as "S D"', "Order": 'an order such as "B N S H"',
    "PerDim": "a whole number, or a list of them",
    "Padding": '"same", "valid", a number, or a list',
}  # fmt: skip
