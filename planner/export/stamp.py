"""What an exported file was made for: hashes of the model and the mesh, and when it is stale.

Hashes and their comparison only; each format decides where it keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from meshes import LogicalMesh
from planner.model import Model

DISTRIBUTION = "shardplan"


def tool_version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+source"


def signature() -> str:
    """How every file written here begins; `files` replaces only files that hold it."""
    return f"written by {DISTRIBUTION} {tool_version()}"


class Stale(Exception):
    """A file made for another model or mesh: `reasons`, and the command that makes it anew."""

    def __init__(self, file: str, reasons: tuple[str, ...], refresh: str) -> None:
        super().__init__(f"{file} is stale: {'; '.join(reasons)}")
        self.file, self.reasons, self.refresh = file, reasons, refresh


@dataclass(frozen=True)
class Stamp:
    """Names are for people, hashes decide."""

    model: str
    model_hash: str
    mesh: str
    mesh_hash: str
    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, model: Model, mesh: LogicalMesh) -> Stamp:
        topology = mesh.topology
        return cls(model.name, model_hash(model), topology.name, mesh_hash(mesh), mesh.axes)

    @property
    def shape(self) -> Mapping[str, int]:
        return dict(self.axes)

    @property
    def shape_text(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)

    def differences(self, now: Stamp) -> tuple[str, ...]:
        """Why a file with this stamp does not hold for `now`; empty if it does."""
        found = []
        if self.model_hash != now.model_hash:
            found.append(f"the model {now.model} has changed since")
        if self.axes != now.axes:
            found.append(f"it was made for mesh {self.shape_text}, not {now.shape_text}")
        elif self.mesh_hash != now.mesh_hash:
            found.append(f"it was made for {self.mesh}, and {now.mesh} is priced differently")
        return tuple(found)


def model_hash(model: Model) -> str:
    """The front end's digest, or one over the graph for models made without a file."""
    if model.digest:
        return model.digest
    what = (model.graph, model.workload, sorted(model.constraints.items()))
    return hashlib.sha256(repr(what).encode()).hexdigest()


def mesh_hash(mesh: LogicalMesh) -> str:
    """Over the machine, and how the axes lie on it."""
    what = (mesh.topology.fingerprint, mesh.axes, mesh.parts)
    return hashlib.sha256(repr(what).encode()).hexdigest()
