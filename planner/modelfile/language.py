"""The text of one op: `a, b = function("spec", x, key=1) + y`. Parsed, never run.

Python's parser reads it; only names, numbers, texts, lists, calls of plain names and arithmetic
are let through. Meaning (tensors, functions, shapes) belongs to `compile.py`.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass

MAX_CHARACTERS = 4000  # of one op; a long attention call has 200
MAX_DEPTH = 40  # nesting of one expression

OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Pow: "**",
}  # fmt: skip


class OpSyntax(ValueError):
    """Text that is no op: what is wrong and at which character."""

    def __init__(self, message: str, offset: int, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.offset, self.hint = message, offset, hint


@dataclass(frozen=True)
class Statement:
    """`targets`: (name, offset of the name in the text); `text` is what offsets count in."""

    text: str
    targets: tuple[tuple[str, int], ...]
    value: ast.expr

    @property
    def canonical(self) -> str:
        """The same for all spellings of one op."""
        names = ", ".join(name for name, _ in self.targets)
        return f"{names} = {ast.unparse(self.value)}"


def parse_statement(text: str) -> Statement:
    """The op that `text` spells; OpSyntax if it spells none."""
    module = _parsed(text)
    if len(module.body) != 1 or not isinstance(module.body[0], ast.Assign):
        raise OpSyntax("an op is written name = function(…)", _first(text))
    assign = module.body[0]
    if len(assign.targets) != 1:
        raise OpSyntax("one '=' in an op", _first(text), "write one op for each result")
    target = assign.targets[0]
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    targets = []
    for part in parts:
        if not isinstance(part, ast.Name):
            raise OpSyntax("results are plain names", offset_of(part, text))
        targets.append((part.id, offset_of(part, text)))
    check(assign.value, text)
    return Statement(text, tuple(targets), assign.value)


def parse_expression(text: str) -> ast.expr:
    """Arithmetic on its own (a size such as 4*D); OpSyntax if it is none."""
    module = _parsed(text)
    if len(module.body) != 1 or not isinstance(module.body[0], ast.Expr):
        raise OpSyntax("expected a number, a dim, or arithmetic on them", _first(text))
    check(module.body[0].value, text)
    return module.body[0].value


def _first(text: str) -> int:
    return len(text) - len(text.lstrip())


def _parsed(text: str) -> ast.Module:
    if len(text) > MAX_CHARACTERS:
        raise OpSyntax(f"longer than {MAX_CHARACTERS} characters", 0, "split it into several ops")
    # Blanks at the front would be an indentation: parsed without, offsets are put right.
    stripped = text.lstrip()
    lead = len(text) - len(stripped)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful Python is no concern of a model file
            module = ast.parse(stripped)
    except SyntaxError as error:
        raise _syntax(error, stripped, lead) from None
    except (RecursionError, MemoryError, ValueError):
        raise OpSyntax("not understood: nested too deeply", lead) from None
    _check_depth(module, text)
    return module


def _syntax(error: SyntaxError, stripped: str, lead: int) -> OpSyntax:
    lines = stripped.split("\n")
    line = min(max(error.lineno or 1, 1), len(lines))
    before = sum(len(part) + 1 for part in lines[: line - 1])
    column = min(max((error.offset or 1) - 1, 0), max(len(lines[line - 1]) - 1, 0))
    message = (error.msg or "not understood").split(". ")[0]
    return OpSyntax(f"not understood: {message}", lead + before + column)


def _check_depth(module: ast.Module, text: str) -> None:
    """No expression is nested deeper than MAX_DEPTH, so that walking it needs no care."""
    level: list[ast.AST] = [module]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise OpSyntax("nested too deeply", _first(text), "split it into several ops")


def check(node: ast.expr, text: str) -> None:
    """OpSyntax unless `node` is made of what the language has."""
    if isinstance(node, ast.Call):
        _check_call(node, text)
    elif isinstance(node, ast.BinOp):
        if type(node.op) not in OPERATORS:
            hint = "a matrix product is einsum(…)" if isinstance(node.op, ast.MatMult) else ""
            raise OpSyntax("the operators are + - * / // **", offset_of(node.right, text), hint)
        check(node.left, text)
        check(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        check(node.operand, text)
    elif isinstance(node, ast.List | ast.Tuple):
        for item in node.elts:
            check(item, text)
    elif isinstance(node, ast.Constant):
        if node.value is not None and not isinstance(node.value, bool | int | float | str):
            raise OpSyntax("no such value", offset_of(node, text))
    elif not isinstance(node, ast.Name):
        what = _NAMES.get(type(node), "this")
        raise OpSyntax(f"{what} is not part of the language", offset_of(node, text))


_NAMES: dict[type[ast.AST], str] = {
    ast.Attribute: "a dotted name", ast.Subscript: "indexing", ast.Compare: "a comparison",
    ast.Lambda: "lambda", ast.IfExp: "if", ast.BoolOp: "and/or", ast.Dict: "a dictionary",
}  # fmt: skip


def _check_call(node: ast.Call, text: str) -> None:
    if not isinstance(node.func, ast.Name):
        raise OpSyntax("only functions called by their plain name", offset_of(node.func, text))
    for argument in node.args:
        if isinstance(argument, ast.Starred):
            raise OpSyntax("'*' arguments are not supported", offset_of(argument, text))
        check(argument, text)
    for keyword in node.keywords:
        if keyword.arg is None:
            raise OpSyntax("'**' arguments are not supported", offset_of(keyword.value, text))
        check(keyword.value, text)


def offset_of(node: ast.expr | ast.keyword, text: str) -> int:
    """Character of `text` at which `node` begins (Python counts UTF-8 bytes, per line)."""
    lead = _first(text)
    lines = text[lead:].split("\n")
    before = sum(len(line) + 1 for line in lines[: node.lineno - 1])
    column = len(lines[node.lineno - 1].encode()[: node.col_offset].decode(errors="ignore"))
    return lead + before + column
