"""What the hardware is: chips, physical topologies, and logical meshes laid over them.

    topology = meshes.resolve("tpu-v3:32x32")
    mesh = meshes.logical(topology, {"x": 32, "y": 64})

Nothing here knows what an operation costs; that is costmodels' business.
"""

from __future__ import annotations

from meshes.catalogue import catalogue_text, names
from meshes.chip import Chip, MatrixUnit, canonical_dtype
from meshes.errors import MeshError
from meshes.links import Group, Level, Part
from meshes.mesh import LogicalMesh, candidate_shapes, default_axes, logical
from meshes.resolve import resolve
from meshes.shapes import alike, axis_names, every_mesh
from meshes.topology import Dimension, Topology

__all__ = [
    "Chip", "Dimension", "Group", "Level", "LogicalMesh", "MatrixUnit", "MeshError", "Part",
    "Topology", "alike", "axis_names", "candidate_shapes", "canonical_dtype", "catalogue_text",
    "default_axes", "every_mesh", "logical", "names", "resolve",
]  # fmt: skip
