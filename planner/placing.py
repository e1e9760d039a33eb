"""The mesh of a run: which machine, and which logical shape of it.

Command-line options beat the model file. A Machine keeps the text of a mesh file, so that a
plan can be read again where that file is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import meshes
from meshes import LogicalMesh, Topology
from planner.errors import InputError
from planner.model import Model

Layout = Mapping[str, Mapping[str, int]]

AUTO = "auto"
MAX_AUTOMATIC = 5  # shapes considered where none is given, the most natural first
SUGGESTIONS = ("tpu-v4:4x4x4", "tpu-v5e:16x16", "dgx-h100:16")


@dataclass(frozen=True)
class Machine:
    """A topology, the shape of its logical mesh, and how the user named it.

    `shape` is None where the best is looked for: among all if `auto` was asked for, else among
    a few natural ones. `text` is that of a mesh file, None for a catalogue name. `layout`: how
    the axes of a given shape are to lie on the links, None for the best way.
    """

    argument: str
    topology: Topology
    shape: Mapping[str, int] | None
    every: bool = False
    text: str | None = None
    layout: Layout | None = None

    @property
    def portable_argument(self) -> str:
        """The machine as a plan file names it: without folders of this machine."""
        return self.argument if self.text is None else Path(self.argument).name

    def meshes(self) -> list[LogicalMesh]:
        """The candidates that can be laid on the links; MeshError if a wanted one cannot."""
        if self.shape is not None:
            return [meshes.logical(self.topology, self.shape, self.layout)]
        if self.every:
            return meshes.every_mesh(self.topology)
        shapes = meshes.candidate_shapes(self.topology)[:MAX_AUTOMATIC]
        return [meshes.logical(self.topology, shape) for shape in shapes]


def place(model: Model, mesh: str | None, shape: str | None, folder: Path) -> Machine:
    """The machine for `model`; raises InputError without any mesh, MeshError for a bad one."""
    wanted = mesh or model.mesh
    if wanted is None:
        raise InputError(
            f"{model.name}: no mesh in the model file and no --mesh",
            "try " + ", ".join(f"--mesh {name}" for name in SUGGESTIONS),
        )
    path = _mesh_file(wanted, folder if mesh is None else Path())
    text = None if path is None else _read(path)
    topology = meshes.resolve(wanted if path is None else str(path))
    chosen = _shape(model, mesh, shape)
    if isinstance(chosen, str):
        return Machine(wanted, topology, None, True, text)
    layout = model.layout if wanted == model.mesh and chosen == model.shape else None
    return Machine(wanted, topology, chosen, False, text, layout)


def _shape(model: Model, mesh: str | None, shape: str | None) -> Mapping[str, int] | str | None:
    """The wanted shape, AUTO for the best of all, None if nothing is said."""
    if shape is not None:
        return parse_shape(shape)
    # The file's shape belongs to the file's mesh: with another mesh it means nothing.
    if model.shape is None or mesh not in (None, model.mesh):
        return None
    return parse_shape(model.shape) if isinstance(model.shape, str) else dict(model.shape)


def parse_shape(text: str) -> dict[str, int] | str:
    """`x=32,y=64` → sizes by axis, `auto` → AUTO. InputError for anything else."""
    if text.strip() == AUTO:
        return AUTO
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if not (name.isidentifier() and size.isdigit() and int(size) >= 1):
            raise InputError(f"--shape {text!r}: cannot read {item!r}", "write x=32,y=64 or auto")
        if name in sizes:
            raise InputError(f"--shape {text!r}: axis {name!r} appears twice")
        sizes[name] = int(size)
    return sizes


def _mesh_file(wanted: str, folder: Path) -> Path | None:
    """The path if `wanted` is a file, looked for beside the model file first."""
    beside = folder / wanted
    if beside.is_file():
        return beside
    if wanted.endswith((".yaml", ".yml")) or Path(wanted).is_file():
        return Path(wanted)
    return None


def _read(path: Path) -> str | None:
    """Text of a mesh file; unreadable ones are left for `meshes.resolve` to complain about."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
