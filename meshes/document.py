"""A YAML mapping with positions: reads typed values, and says where a wrong one stands.

Catalogue entries and users' mesh files both come through here. A constant is either plain
(`70e9`) or a mapping with `value` and its provenance (`mark`, `source`, `note`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import yaml

from meshes.errors import MeshError
from meshes.quantity import quantity

MARKS = ("datasheet", "paper", "derived", "fitted", "assumed")


@dataclass(frozen=True)
class Section:
    """One mapping of a file: `path` is its dotted name, `node` the YAML node under it."""

    file: str
    path: str
    node: yaml.MappingNode

    def error(self, message: str, hint: str = "", at: yaml.Node | None = None) -> MeshError:
        mark = (at or self.node).start_mark
        where = f"{self.path}: " if self.path else ""
        return MeshError(
            "bad-file", where + message, hint,
            file=self.file, line=mark.line + 1, column=mark.column + 1,
        )  # fmt: skip

    def items(self) -> Iterator[tuple[str, yaml.Node]]:
        for key, value in self.node.value:
            yield str(key.value), value

    def names(self) -> list[str]:
        return [name for name, _ in self.items()]

    def has(self, key: str) -> bool:
        return key in self.names()

    def allow(self, allowed: Iterable[str]) -> None:
        """Raise for a duplicate key, or one that is not allowed (with the nearest that is)."""
        allowed, seen = list(allowed), set()
        for key, _ in self.node.value:
            if key.value in seen:
                raise self.error(f"key {key.value!r} appears twice", "keep one of them", key)
            seen.add(key.value)
            if key.value not in allowed:
                near = difflib.get_close_matches(str(key.value), allowed, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
                raise self.error(f"unknown key {key.value!r}", hint, key)

    def child(self, key: str) -> yaml.Node:
        for name, node in self.items():
            if name == key:
                return node
        raise self.error(f"missing key {key!r}", f"has: {', '.join(self.names()) or 'nothing'}")

    def section(self, key: str) -> Section:
        node = self.child(key)
        if not isinstance(node, yaml.MappingNode):
            raise self.error(f"{key!r} must be a mapping", at=node)
        return Section(self.file, f"{self.path}.{key}" if self.path else key, node)

    def sections(self, key: str) -> list[Section]:
        """A list of mappings."""
        node = self.child(key)
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(f"{key!r} must be a list", at=node)
        result = []
        for i, item in enumerate(node.value):
            if not isinstance(item, yaml.MappingNode):
                raise self.error(f"{key}[{i}] must be a mapping", at=item)
            result.append(Section(self.file, f"{key}[{i}]", item))
        return result

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        node = self._value(key)
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(f"{key!r} must be text", at=node)
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
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(f"{key!r} must be a list", at=node)
        return tuple(str(item.value) for item in node.value)

    def counts(self, key: str) -> tuple[int, ...]:
        node = self._value(key)
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(f"{key!r} must be a list of numbers", at=node)
        return tuple(int(self._number(key, item)) for item in node.value)

    def _number(self, key: str, node: yaml.Node) -> float:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(f"{key!r} must be a number", "for example 16GiB or 900e9", node)
        try:
            return quantity(node.value)
        except ValueError as error:
            raise self.error(f"{key!r}: {error}", at=node) from None

    def _value(self, key: str) -> yaml.Node:
        """The node of a constant, with or without its provenance around it."""
        node = self.child(key)
        if isinstance(node, yaml.MappingNode):
            inner = Section(self.file, f"{self.path}.{key}", node)
            if inner.has("value"):
                return inner.child("value")
        return node


def parse(text: str, file: str) -> Section:
    """The top-level mapping of a YAML document; MeshError with line and column."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise MeshError(
            "bad-yaml", f"not valid YAML: {error.problem}", file=file,
            line=mark.line + 1 if mark else None, column=mark.column + 1 if mark else None,
        ) from None  # fmt: skip
    except yaml.YAMLError as error:
        raise MeshError("bad-yaml", f"not valid YAML: {error}", file=file) from None
    if not isinstance(node, yaml.MappingNode):
        raise MeshError("bad-file", "a mesh file is a YAML mapping", file=file, line=1, column=1)
    return Section(file, "", node)
