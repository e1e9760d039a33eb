"""Pipelines as candidates of a search: how many stages, on which shape, in how many microbatches.

Only where the model has a pipeline: its axis then may have any size, and the number of
microbatches is open where the file leaves it at one. A candidate that differs from the file in
more than its mesh says so as a setting, which is what the user would give to get that plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import meshes
from meshes import LogicalMesh, MeshError, Topology
from planner.model import Model

STAGES = (4, 8, 2, 16)  # the likeliest first
INNER = (8, 4, 16, 2, 1)  # devices of the second axis within a stage, the likeliest first
PER_STAGE = (4, 8, 2)  # microbatches for every stage, the likeliest first
MICROBATCHES = "training.pipeline_microbatches"


def unstaged(model: Model, found: Sequence[LogicalMesh]) -> list[LogicalMesh]:
    """Meshes on which nothing is dealt out in stages: the pipeline's axis has one device."""
    if model.pipeline is None:
        return list(found)
    return [meshes.logical(m.topology, {model.pipeline.axis: 1, **dict(m.axes)}) for m in found]


def staged(model: Model, topology: Topology) -> Iterator[tuple[LogicalMesh, str]]:
    """Meshes with stages, and the setting of microbatches that goes with each (empty where the
    file says how many there are); the likeliest first."""
    if model.pipeline is None:
        return
    stages = [p for p in STAGES if topology.devices % p == 0]
    per_stage = PER_STAGE if model.training.pipeline_microbatches == 1 else (0,)
    for ratio in per_stage:
        for inner in INNER:
            for p in stages:
                data, uneven = divmod(topology.devices, p * inner)
                if uneven or (data == 1 < inner) or model.training.batch % max(1, ratio * p):
                    continue
                mesh = _mesh(model.pipeline.axis, p, inner, topology)
                if mesh is not None:
                    yield mesh, f"{MICROBATCHES}={ratio * p}" if ratio else ""


def _mesh(axis: str, stages: int, inner: int, topology: Topology) -> LogicalMesh | None:
    """Stages, then data, then `inner`; None where that cannot be laid on the links."""
    names = [name for name in meshes.axis_names(topology) if name != axis]
    sizes = [n for n in (topology.devices // (stages * inner), inner) if n > 1]
    shape = {axis: stages, **dict(zip(names, sizes, strict=False))}
    try:
        return meshes.logical(topology, shape)
    except MeshError:
        return None
