"""Named architectures of a file, checked: whole models, and stacks of layers among the ops."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter

from meshes.yamltree import Scalar, Table
from planner.graph.builder import Builder, GraphError
from planner.modelfile import fields
from planner.modelfile.diagnostics import Findings, nearest
from planner.modelfile.scalars import plain_data
from planner.modelfile.sizes import Dims, Unknown
from planner.modelfile.validate import validated

Kind = TypeVar("Kind")
OWN_KEYS = ("name", "carry", "memory")  # of a stack; all others are settings


@dataclass(frozen=True)
class StackEntry:
    """An `architecture:` among the ops of a graph, as it is written."""

    item: Table
    table: Table
    title: Scalar
    carry: Scalar
    memory: Scalar | None


def stack_entry(item: object) -> StackEntry | None:
    """The entry if `item` of a list of ops is one and whole."""
    if not isinstance(item, Table):
        return None
    table = item.get("architecture")
    if not isinstance(table, Table):
        return None
    title, carry, memory = (table.get(name) for name in OWN_KEYS)
    if not isinstance(title, Scalar) or not isinstance(carry, Scalar):
        return None
    return StackEntry(item, table, title, carry, memory if isinstance(memory, Scalar) else None)


def chosen(node: Table, kinds: Mapping[str, Kind], findings: Findings) -> Kind | None:
    """What `kinds` has for the `kind` of an architecture; None (noted) if that is missing."""
    kind = node.get("kind")
    if not isinstance(kind, Scalar):
        place = kind.place if kind else node.place
        known = f"one of {', '.join(kinds)}"
        findings.add("missing-key", "'architecture' lacks the key 'kind'", place, known)
        return None
    if kind.value not in kinds:
        message = f"unknown architecture '{kind.value}'"
        hint = nearest(kind.value, kinds, f"one of {', '.join(kinds)}")
        findings.add("unknown-architecture", message, kind.place, hint)
        return None
    return kinds[kind.value]


def values(node: Table, dims: Dims) -> dict[str, Any] | None:
    """The settings as given, dims by their sizes; None if such a dim is broken."""
    found = plain_data(node)
    for name, value in found.items():
        if isinstance(value, str) and value in dims:
            try:
                found[name] = dims[value]
            except Unknown:  # reported where the dim is defined
                return None
    return dict(found)


def settings(
    parent: Table, model: type[BaseModel], given: dict[str, Any] | None, findings: Findings
) -> BaseModel | None:
    """`given`, made of what `parent` has as architecture, as a `model`; None (noted) if wrong."""
    if given is None:
        return None
    found: BaseModel | None = validated(
        TypeAdapter(model), parent, "architecture", findings, given, model
    )
    return found


def build_stack(
    b: Builder, entry: StackEntry, x: str, memory: str | None, dims: Dims, findings: Findings
) -> str | None:
    """The layers of `entry` on x [B, S, D]; None (noted) if they cannot be."""
    stack = chosen(entry.table, fields.stacks(), findings)
    if stack is None or _outside(entry.table, stack.outside, findings):
        return None
    given = values(entry.table, dims)
    if given is not None:
        given = {"d_model": b.lookup(x).shape[-1]} | {
            key: value for key, value in given.items() if key not in OWN_KEYS
        }
    checked = settings(entry.item, stack.settings, given, findings)
    if checked is None:
        return None
    try:
        built: str = stack.build(b, entry.title.value, x, checked, memory)
    except GraphError as error:
        findings.add("bad-architecture", str(error), entry.table.place)
        return None
    return built


def _outside(table: Table, keys: Collection[str], findings: Findings) -> bool:
    """Whether settings of a whole model stand in a stack (noted)."""
    found = [key for key, _ in table.entries if key.value in keys]
    for key in found:
        message = f"'{key.value}' is about what surrounds the layers: the graph says it"
        findings.add("unknown-key", message, key.place, "remove it")
    return bool(found)
