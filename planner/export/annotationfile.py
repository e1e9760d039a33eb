"""annotations.json: written with the stamp of what was planned, read with or without one.

A hand-written file may be just `{"tensor": [["x"], []]}`; then nothing can be stale. `of` says
whether it has a plan's tensors, as they lie, or what a program asks of the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from planner.annotations import Axes, as_lists
from planner.errors import InputError
from planner.export.jsontext import checked, pretty, read_json, read_text
from planner.export.stamp import Stamp, signature
from planner.pins import Meaning

FORMAT = "shardplan-annotations"


class StampDocument(BaseModel):
    """The stamp as JSON holds it."""

    model_config = ConfigDict(extra="forbid")
    model: str
    model_hash: str
    mesh: str
    mesh_hash: str
    axes: dict[str, int]

    @classmethod
    def of(cls, stamp: Stamp) -> StampDocument:
        return cls(
            model=stamp.model, model_hash=stamp.model_hash, mesh=stamp.mesh,
            mesh_hash=stamp.mesh_hash, axes=dict(stamp.axes),
        )  # fmt: skip

    def stamp(self) -> Stamp:
        axes = tuple(self.axes.items())
        return Stamp(self.model, self.model_hash, self.mesh, self.mesh_hash, axes)


@dataclass(frozen=True)
class AnnotationFile:
    file: str
    annotations: Mapping[str, Axes]
    stamp: Stamp | None = None
    meaning: Meaning = Meaning.PROGRAM


def dump(stamp: Stamp, annotations: Mapping[str, Axes], meaning: Meaning = Meaning.PLAN) -> str:
    return pretty(
        {
            "format": FORMAT, "schema_version": 1, "generator": signature(),
            "made_for": StampDocument.of(stamp).model_dump(),
            "of": meaning.value,
            "annotations": as_lists(annotations),
        }
    )  # fmt: skip


def load(path: Path) -> AnnotationFile:
    """Raises InputError for a file that holds no annotations."""
    if path.suffix == ".py":
        raise InputError(f"{path} is Python", "name the annotations.json beside it")
    value = read_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object of tensors, such as {{\"w\": [[\"x\"], []]}}")
    if value.get("format") != FORMAT:
        if "format" in value:
            raise InputError(f"{path} holds {value['format']!r}, not {FORMAT!r}")
        return AnnotationFile(str(path), _annotations(value, str(path)))
    made_for = checked(StampDocument, value.get("made_for"), f"{path}: made_for")
    annotations = _annotations(value.get("annotations"), str(path))
    return AnnotationFile(str(path), annotations, made_for.stamp(), _meaning(value, str(path)))


def _meaning(value: Mapping[str, Any], file: str) -> Meaning:
    known = {m.value: m for m in (Meaning.PLAN, Meaning.PROGRAM)}
    given = value.get("of", Meaning.PROGRAM.value)
    if given not in known:
        raise InputError(f"{file}: of: {' or '.join(known)}, not {given!r}")
    return known[given]


def _annotations(value: Any, file: str) -> dict[str, Axes]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: annotations must be an object")
    return {name: _axes(name, dims, file) for name, dims in value.items()}


def _axes(name: str, dims: Any, file: str) -> Axes:
    """One dimension is null, an axis, or a list of axes."""
    if not isinstance(dims, list):
        raise InputError(f"{file}: {name}: expected one entry per dimension, such as [[\"x\"], []]")
    found = []
    for dim in dims:
        axes = [] if dim is None else [dim] if isinstance(dim, str) else dim
        if not isinstance(axes, list) or not all(isinstance(a, str) for a in axes):
            raise InputError(f"{file}: {name}: a dimension is a list of axis names, not {dim!r}")
        found.append(tuple(axes))
    return tuple(found)
