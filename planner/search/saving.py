"""`remat: auto`: what to save for the backward pass, as candidates of a search on one mesh.

The fixed policies, and a chain of sets between full recomputation and none. Each is planned with
an integer program of its own: saving and sharding are decided one inside the other, not in one
program.
"""

from __future__ import annotations

from costmodels.program import ITEM_BYTES
from meshes import LogicalMesh
from planner.graph.core import Op
from planner.graph.derive import training_step
from planner.graph.saving import chain
from planner.model import AUTO, FIXED_POLICIES, Model, Remat, Training
from planner.pins import in_loops
from planner.search.candidates import Trial
from planner.sharding.choices import Choice
from planner.sharding.formulate import choice_seconds


def candidates(model: Model, mesh: LogicalMesh) -> list[Trial]:
    """The fixed policies and the chain on `mesh`."""
    keep = tuple(in_loops(model.constraints, model.members))
    tensors = training_step(model, keep).all_tensors()

    def seconds(op: Op) -> float:
        """Of the op on one device: its parts on many keep the proportions."""
        whole = Choice(((),) * len(op.rule.factors))
        return float(choice_seconds(op, [whole], tensors, mesh)[0])

    sets = chain(model, seconds, ITEM_BYTES, keep)
    choices: list[Remat] = [*FIXED_POLICIES, *sets]
    return [Trial(mesh, remat) for remat in choices]


def is_open(model: Model) -> bool:
    """Whether the model leaves it to the planner what is saved."""
    return isinstance(model.workload, Training) and model.workload.remat == AUTO
