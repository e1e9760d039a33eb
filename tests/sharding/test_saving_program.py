"""The ILP of sharding and saving: as good as planning every set of saved values by itself."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

import pytest
from small_models import decoder, weighted_sum

import meshes
from meshes import LogicalMesh
from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.derive import CHOOSES, OPEN, training_step
from planner.graph.saving import saved_values
from planner.ilp import solve
from planner.model import Model, Training
from planner.planning import ENOUGH_GAP, OVERLAP_WEIGHTS, NothingFits, Options, Planning
from planner.saving import SavingPlanning, saving_bound

PLAIN = OVERLAP_WEIGHTS[0]
SETS = 2  # values that the body of `layers_of` may save, beyond its entry: 2**5 sets
Values = tuple[str, ...]


def layers_of(remat: str | Values, tokens: int = 4096, width: int = 256) -> Model:
    """A loop of two products with gates; five values, of which some are made from others."""
    b = Builder()
    x = b.input("x", (tokens, width), ("B", "D"))
    r = b.repeat("layers", 8)
    entry = r.enter(x)
    w1, w2 = r.param("w1", (width, 4 * width), ("D", "F")), r.param("w2", (4 * width, width), ("F", "D"))
    h = r.einsum("BD,DF->BF", entry, w1, name="h")
    act = r.pointwise("act", ("gelu", ex.x(0)), h)
    y = r.einsum("BF,FD->BD", act, w2, name="y")
    gated = r.pointwise("gated", ("tanh", ex.x(0)), y)
    w3 = r.param("w3", (width, width), ("D", "E"))
    z = r.einsum("BD,DE->BE", gated, w3, name="z")
    out = r.pointwise("out", ex.add(ex.x(0), ("tanh", ex.x(1))), entry, z)
    (x,) = r.end_repeat([(x, entry, out)])
    loss = weighted_sum(b, x)
    return Model("layers", b.graph([loss]), Training(tokens, "sgd", remat=remat), tokens)


@cache
def mesh(topology: str = "dgx-a100-40gb:1", x: int = 4) -> LogicalMesh:
    return meshes.logical(meshes.resolve(topology), {"x": x, "y": 2})
