"""Reading the contest's JSON problem format, fast and within bounded memory.

Only text → arrays belongs here, and every complaint about the text. The file is scanned once;
each innermost array of numbers is found by its brackets and looked up by its own bytes, so a
matrix that occurs a thousand times (layers repeat) is parsed and stored once. A 1 GB file thus
needs its own size plus the distinct matrices.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FORBIDDEN = 10**18
"""Costs from here on mean "never" (the contest's definition for edges)."""
GZIP_MAGIC = b"\x1f\x8b"
_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|NaN|-?Infinity')
LARGEST = 2**63 - 1
PLAIN = b"0123456789-, \t\r\n"


class BadProblem(ValueError):
    """A file that is no problem: where, what is wrong, and what would be right."""

    def __init__(self, code: str, where: str, message: str, hint: str = "") -> None:
        self.code, self.where, self.message, self.hint = code, where, message, hint
        super().__init__(f"{where}: {message}" + (f" ({hint})" if hint else ""))


@dataclass(frozen=True)
class RawProblem:
    """The file's integers. Equal arrays may be one object."""

    name: str
    intervals: Ints
    """[nodes, 2], half-open."""
    costs: list[Ints]
    usages: list[Ints]
    edges: Ints
    """[edges, 2]."""
    edge_costs: list[Ints]
    """Flat, row by row: [strategies of the first node × of the second]."""
    usage_limit: int


def read(path: Path) -> RawProblem:
    """The problem in `path` (gzip is recognised by content). Raises BadProblem."""
    return parse(_bytes(path), str(path))


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
        if magic != GZIP_MAGIC:
            return path.read_bytes()
        with gzip.open(path) as packed:
            return packed.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise BadProblem(
            "gzip", str(path), f"damaged gzip data: {error}", "copy it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadProblem("unreadable", str(path), f"cannot be read: {reason}") from error


class _Scanner:
    """One pass over the text. Arrays without brackets or quotes inside become int64 arrays."""

    def __init__(self, text: bytes, where: str) -> None:
        self.text, self.where, self.at = text, where, 0
        self.known: dict[bytes, Ints | list[Any]] = {}

    def fail(self, message: str, hint: str = "") -> BadProblem:
        line = self.text.count(b"\n", 0, self.at) + 1
        column = self.at - self.text.rfind(b"\n", 0, self.at)
        return BadProblem("json", f"{self.where}:{line}:{column}", message, hint)

    def peek(self) -> bytes:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
        return self.text[self.at : self.at + 1]

    def expect(self, mark: bytes) -> None:
        found = self.peek()
        if found != mark:
            got = found.decode(errors="replace") or "the end of the file"
            hint = "the file is cut off" if not found else ""
            raise self.fail(f"expected {mark.decode()!r}, got {got!r}", hint)
        self.at += 1

    def value(self) -> Any:
        mark = self.peek()
        if mark == b"{":
            return self.object()
        if mark == b"[":
            return self.array()
        match = _SCALAR.match(self.text, self.at)
        if match is None:
            self.expect(b"{")
            raise self.fail("expected a value")
        self.at = match.end()
        return self.decode(match.group())

    def decode(self, piece: bytes) -> Any:
        try:
            return json.loads(piece)
        except ValueError as error:
            raise self.fail(f"not valid JSON: {error}") from error

    def object(self) -> dict[str, Any]:
        self.expect(b"{")
        found: dict[str, Any] = {}
        if self.peek() == b"}":
            self.at += 1
            return found
        while True:
            if self.peek() != b'"':
                self.expect(b'"')
            key = self.value()
            self.expect(b":")
            if key in found:
                raise self.fail(f"{key!r} occurs twice")
            found[key] = self.value()
            if self.peek() == b"}":
                self.at += 1
                return found
            self.expect(b",")

    def array(self) -> Ints | list[Any]:
        """Flat arrays through the cache; others item by item."""
        self.expect(b"[")
        close = self.text.find(b"]", self.at)
        if close < 0:
            self.at = len(self.text)
            raise self.fail("an array is never closed", "the file is cut off")
        inner = self.peek()
        if inner not in (b"[", b"{", b'"'):
            piece = self.text[self.at : close]
            found = self.known.get(piece)
            if found is None:
                found = self.known[piece] = self.numbers(piece)
            self.at = close + 1
            return found
        items: list[Any] = []
        while True:
            items.append(self.value())
            if self.peek() == b"]":
                self.at += 1
                return items
            self.expect(b",")

    def numbers(self, piece: bytes) -> Ints:
        values = self.decode(b"[" + piece + b"]")
        if not piece.translate(None, PLAIN):
            # Whole numbers only, as nearly always: no need to look at each.
            with contextlib.suppress(OverflowError):
                return np.array(values, dtype=np.int64)
        for k, v in enumerate(values):
            if type(v) is not int:
                v = self.whole(v, k)
                values[k] = v
            if not -LARGEST <= v <= LARGEST:
                raise self.fail(f"item {k} is {v}, which does not fit 64 bits")
        return np.array(values, dtype=np.int64)

    def whole(self, value: Any, k: int) -> int:
        """1e18 and 3.0 are integers to everybody; NaN, 0.5 and true are not."""
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise self.fail(f"item {k} is {value!r}, expected an integer")


def parse(text: bytes, where: str) -> RawProblem:
    """The problem in a JSON text. `where` names it in messages. Raises BadProblem."""
    scanner = _Scanner(text, where)
    tree = scanner.value()
    if scanner.peek():
        raise scanner.fail("text after the end of the problem")
    problem = _member(tree, "problem", dict, where, "")
    nodes = _member(problem, "nodes", dict, where, "problem.")
    edges = _member(problem, "edges", dict, where, "problem.")
    limit = _member(problem, "usage_limit", (int, float), where, "problem.")
    if isinstance(limit, bool) or limit != limit or limit != int(min(limit, 1e300)) or limit < 0:
        raise BadProblem("limit", where, f"problem.usage_limit is {limit}, expected an integer ≥ 0")
    raw = RawProblem(
        str(problem.get("name", "")),
        _pairs(nodes, "intervals", where, "problem.nodes."),
        _arrays(nodes, "costs", where, "problem.nodes."),
        _arrays(nodes, "usages", where, "problem.nodes."),
        _pairs(edges, "nodes", where, "problem.edges."),
        _arrays(edges, "costs", where, "problem.edges."),
        int(limit),
    )  # fmt: skip
    _check(raw, where)
    return raw


def _member(tree: Any, key: str, kind: Any, where: str, path: str) -> Any:
    if not isinstance(tree, dict) or key not in tree:
        raise BadProblem("missing", where, f"{path}{key} is missing", "is it a contest problem?")
    if not isinstance(tree[key], kind):
        raise BadProblem("type", where, f"{path}{key} is not what was expected: {kind}")
    return tree[key]


def _arrays(tree: Any, key: str, where: str, path: str) -> list[Ints]:
    found = _member(tree, key, (list, np.ndarray), where, path)
    if isinstance(found, np.ndarray) and len(found):
        raise BadProblem("type", where, f"{path}{key}: expected an array of arrays")
    for k, row in enumerate(found):
        if not isinstance(row, np.ndarray):
            raise BadProblem("type", where, f"{path}{key}[{k}]: expected an array of integers")
    return list(found)


def _pairs(tree: Any, key: str, where: str, path: str) -> Ints:
    rows = _arrays(tree, key, where, path)
    for k, row in enumerate(rows):
        if len(row) != 2:
            raise BadProblem("shape", where, f"{path}{key}[{k}] has {len(row)} numbers, expected 2")
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _check(raw: RawProblem, where: str) -> None:
    """Sizes, indices and signs; the first thing wrong is reported."""
    count = len(raw.costs)
    for name, other in (("usages", len(raw.usages)), ("intervals", len(raw.intervals))):
        if other != count:
            text = f"problem.nodes.{name} has {other} entries, costs has {count}"
            raise BadProblem("shape", where, text)
    if len(raw.edges) != len(raw.edge_costs):
        text = f"problem.edges.nodes has {len(raw.edges)} entries, costs has {len(raw.edge_costs)}"
        raise BadProblem("shape", where, text)
    for n, (cost, usage) in enumerate(zip(raw.costs, raw.usages, strict=True)):
        _check_node(n, cost, usage, where)
    backwards = np.flatnonzero(raw.intervals[:, 0] > raw.intervals[:, 1])
    if len(backwards):
        n = int(backwards[0])
        a, b = raw.intervals[n].tolist()
        raise BadProblem("interval", where, f"problem.nodes.intervals[{n}] is [{a}, {b}]",
                         "start must not be after stop")  # fmt: skip
    sizes = np.array([len(c) for c in raw.costs], dtype=np.int64)
    _check_edges(raw, sizes, where)


def _check_node(n: int, cost: Ints, usage: Ints, where: str) -> None:
    if len(cost) == 0:
        raise BadProblem("shape", where, f"problem.nodes.costs[{n}] is empty", "one per strategy")
    if len(usage) != len(cost):
        text = f"problem.nodes.usages[{n}] has {len(usage)} entries, costs[{n}] has {len(cost)}"
        raise BadProblem("shape", where, text)
    for name, values in (("costs", cost), ("usages", usage)):
        if values.min() < 0:
            text = f"problem.nodes.{name}[{n}] has the negative entry {values.min()}"
            raise BadProblem("negative", where, text)


def _check_edges(raw: RawProblem, sizes: Ints, where: str) -> None:
    bad = np.flatnonzero(((raw.edges < 0) | (raw.edges >= len(sizes))).any(axis=1))
    if len(bad):
        k = int(bad[0])
        ends, last = raw.edges[k].tolist(), len(sizes) - 1
        text = f"problem.edges.nodes[{k}] is {ends}, but nodes are 0 … {last}"
        raise BadProblem("index", where, text)
    lengths = np.array([len(c) for c in raw.edge_costs], dtype=np.int64)
    wanted = sizes[raw.edges[:, 0]] * sizes[raw.edges[:, 1]] if len(raw.edges) else lengths
    bad = np.flatnonzero(lengths != wanted)
    if len(bad):
        k = int(bad[0])
        i, j = raw.edges[k].tolist()
        text = (
            f"problem.edges.costs[{k}] has {lengths[k]} entries, expected {sizes[i]} × {sizes[j]}"
        )
        raise BadProblem("shape", where, text)
    for k, cost in enumerate(raw.edge_costs):
        if cost.min() < 0:
            text = f"problem.edges.costs[{k}] has the negative entry {cost.min()}"
            raise BadProblem("negative", where, text)
