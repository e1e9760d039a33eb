"""A YAML mapping with positions: reads typed values, and says where a wrong one stands.

Catalogue entries and users' mesh files both come through here. A constant is either plain
(`70e9`) or a mapping with `value` and its provenance (`mark`, `source`, `note`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshes.errors import MeshError
from meshes.quantity import quantity
from meshes.yamltree import Listing, Node, Scalar, Table, YamlProblem
from meshes.yamltree import parse as parse_tree

MARKS = ("datasheet", "paper", "derived", "fitted", "assumed")


@dataclass(frozen=True)
class Section:
    """One mapping of a file: `path` is its dotted name, `node` the mapping itself."""

    path: str
    node: Table

    def error(
        self, message: str, hint: str = "", at: Node | None = None, code: str = "bad-value"
    ) -> MeshError:
        place = (at or self.node).place
        where = f"{self.path}: " if self.path else ""
        return MeshError(
            code, where + message, hint, file=place.source.file,
            line=place.line, column=place.column, source=place.text,
        )  # fmt: skip

    def items(self) -> Iterator[tuple[str, Node]]:
        for key, value in self.node.entries:
            yield key.value, value

    def names(self) -> list[str]:
        return [name for name, _ in self.items()]

    def has(self, key: str) -> bool:
        return key in self.names()

    def allow(self, allowed: Iterable[str]) -> None:
        """Raise for a key that is not allowed (with the nearest that is)."""
        allowed = list(allowed)
        for key, _ in self.node.entries:
            if key.value not in allowed:
                near = difflib.get_close_matches(key.value, allowed, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
                raise self.error(f"unknown key {key.value!r}", hint, key, "unknown-key")

    def child(self, key: str) -> Node:
        for name, node in self.items():
            if name == key:
                return node
        has = f"has: {', '.join(self.names()) or 'nothing'}"
        raise self.error(f"missing key {key!r}", has, code="missing-key")

    def wrong_type(self, message: str, at: Node, hint: str = "") -> MeshError:
        return self.error(message, hint, at, "wrong-type")

    def section(self, key: str) -> Section:
        node = self.child(key)
        if not isinstance(node, Table):
            raise self.wrong_type(f"{key!r} must be a mapping", node)
        return Section(f"{self.path}.{key}" if self.path else key, node)

    def sections(self, key: str) -> list[Section]:
        """A list of mappings."""
        node = self.child(key)
        if not isinstance(node, Listing):
            raise self.wrong_type(f"{key!r} must be a list", node)
        result = []
        for i, item in enumerate(node.items):
            if not isinstance(item, Table):
                raise self.wrong_type(f"{key}[{i}] must be a mapping", item)
            result.append(Section(f"{key}[{i}]", item))
        return result

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        node = self._value(key)
        if not isinstance(node, Scalar):
            raise self.wrong_type(f"{key!r} must be text", node)
        return str(node.value)

    def number(self, key: str, default: float | None = None) -> float:
        """A quantity in SI units."""
        if default is not None and not self.has(key):
            return default
        return self._number(key, self._value(key))

    def positive(self, key: str, default: float | None = None) -> float:
        number = self.number(key, default)
        if number == 0:
            raise self.error(f"{key!r} must be positive", at=self._value(key))
        return number

    def count(self, key: str, default: int | None = None) -> int:
        number = self.number(key, default)
        if number != int(number) or number < 1:
            raise self.error(f"{key!r} must be a whole number of at least 1", at=self._value(key))
        return int(number)

    def texts(self, key: str) -> tuple[str, ...]:
        node = self._value(key)
        if not isinstance(node, Listing):
            raise self.wrong_type(f"{key!r} must be a list", node)
        for item in node.items:
            if not isinstance(item, Scalar):
                raise self.wrong_type(f"{key!r} must be a list of names", item)
        return tuple(item.value for item in node.items if isinstance(item, Scalar))

    def counts(self, key: str) -> tuple[int, ...]:
        node = self._value(key)
        if not isinstance(node, Listing):
            raise self.wrong_type(f"{key!r} must be a list of numbers", node)
        numbers = [self._number(key, item) for item in node.items]
        for number, item in zip(numbers, node.items, strict=True):
            if number != int(number):
                raise self.error(f"{key!r} must be whole numbers", at=item)
        return tuple(int(number) for number in numbers)

    def _number(self, key: str, node: Node) -> float:
        if not isinstance(node, Scalar):
            raise self.wrong_type(f"{key!r} must be a number", node, "for example 16GiB or 900e9")
        try:
            return quantity(node.value)
        except ValueError as error:
            raise self.error(f"{key!r}: {error}", at=node) from None

    def _value(self, key: str) -> Node:
        """The node of a constant, with or without its provenance around it."""
        node = self.child(key)
        if isinstance(node, Table):
            inner = Section(f"{self.path}.{key}", node)
            if inner.has("value"):
                return inner.child("value")
        return node


def parse(text: str, file: str) -> Section:
    """The top-level mapping of a YAML document; MeshError with line and column."""
    try:
        document = parse_tree(text, file)
    except YamlProblem as problem:
        raise from_yaml(problem) from None
    if not isinstance(document.root, Table):
        top = Section("", Table(document.root.place, []))
        raise top.wrong_type("a mesh file is a YAML mapping", document.root)
    root = Section("", document.root)
    for key in document.repeated:
        message = f"key {key.value!r} appears twice"
        raise root.error(message, "keep one of them", key, "duplicate-key")
    return root


def from_yaml(problem: YamlProblem) -> MeshError:
    place = problem.place
    return MeshError(
        problem.code, problem.message, problem.hint, file=place.source.file,
        line=place.line, column=place.column, source=place.text,
    )  # fmt: skip
