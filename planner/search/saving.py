"""`remat: auto`: what to save for the backward pass, as candidates of a search on one mesh.

The fixed policies, and what the integer program of sharding and saving decides (planner.saving).
Where it cannot decide everything (pipelines, loops inside of bodies), also sets of a chain between
full recomputation and none.
"""

from __future__ import annotations

from costmodels.program import ITEM_BYTES
from meshes import LogicalMesh
from planner import saving
from planner.graph.core import Loop, Op
from planner.graph.derive import training_step
from planner.graph.recompute import OPEN
from planner.graph.saving import chain
from planner.model import AUTO, FIXED_POLICIES, Model, Training
from planner.pins import in_loops
from planner.search.candidates import Trial
from planner.sharding.choices import Choice
from planner.sharding.formulate import choice_seconds


def candidates(model: Model, mesh: LogicalMesh) -> list[Trial]:
    """What may be saved on `mesh`."""
    found = [Trial(mesh, remat) for remat in FIXED_POLICIES]
    together = saving.is_possible(model, mesh)
    if together:
        found += [Trial(mesh, OPEN, weights=w) for w in saving.weightings(mesh)]
    if not together or _has_loops_in_bodies(model):
        found += [Trial(mesh, remat) for remat in _chain(model, mesh)]
    return found


def _has_loops_in_bodies(model: Model) -> bool:
    """Whether a body recomputes a loop: of
    what is in it the integer program saves nothing."""
    graph = training_step(model.decided("full"))
    bodies = (loop.body.nodes for loop in graph.loops())
    return any(isinstance(n, Loop) and n.phase == "recompute" for body in bodies for n in body)


def _chain(model: Model, mesh: LogicalMesh) -> list[tuple[str, ...]]:
    keep = tuple(in_loops(model.constraints, model.members))
    tensors = training_step(model, keep).all_tensors()

    def seconds(op: Op) -> float:
        """Of the op on one device: its parts on many keep the proportions."""
        whole = Choice(((),) * len(op.rule.factors))
        return float(choice_seconds(op, [whole], tensors, mesh)[0])

    return chain(model, seconds, ITEM_BYTES, keep)


def is_open(model: Model) -> bool:
    """Whether the model leaves it to the planner what is saved."""
    return isinstance(model.workload, Training) and model.workload.remat == AUTO
