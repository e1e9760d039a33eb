"""A mesh by catalogue name or by path of a mesh file."""

from __future__ import annotations

from meshes.catalogue import from_name
from meshes.topology import Topology


def resolve(name_or_path: str) -> Topology:
    """Topology of `tpu-v3:32x32`, `dgx-a100-80gb:128x8`; MeshError otherwise."""
    return from_name(name_or_path)
