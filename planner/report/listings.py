"""What exists: built-in models, machines, the schema of model files. Text for stdout."""

from __future__ import annotations

from collections.abc import Iterable

import meshes
from planner import zoo
from planner.errors import InputError, nearest
from planner.report.document import as_json

_SHAPES = 6  # candidate shapes shown for a machine


def models() -> str:
    """One line per model: its name and the first comment of its file."""
    return _columns((name, _summary(zoo.text(name))) for name in zoo.names())


def model(name: str) -> str:
    """The model file, to copy and change."""
    if name not in zoo.names():
        near = nearest(name, zoo.names())
        hint = f"did you mean {' or '.join(near)}?" if near else "`plan models` lists them"
        raise InputError(f"no built-in model {name!r}", hint)
    return zoo.text(name)


def _summary(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.removeprefix("#").strip()


def machines() -> str:
    return _columns(meshes.names())


def mesh(name: str) -> str:
    """The catalogue entry, or with sizes what the machine is and how it could be cut."""
    if ":" not in name and not name.endswith((".yaml", ".yml")):
        return meshes.catalogue_text(name)
    topology = meshes.resolve(name)
    lines = [topology.describe(), *(f"note: {note}" for note in topology.notes), "shapes:"]
    for shape in meshes.candidate_shapes(topology)[:_SHAPES]:
        sizes = ",".join(f"{axis}={size}" for axis, size in shape.items())
        lines.append(f"  --shape {sizes:<24} {meshes.logical(topology, shape).assignment()}")
    return "\n".join(lines)


def schema() -> str:
    from planner.modelfile import schema as model_schema

    return as_json(model_schema())


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)
