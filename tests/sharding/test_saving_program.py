"""The ILP of sharding and saving: as good as planning every set of saved values by itself."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

import pytest
from small_models import weighted_sum

import meshes
from meshes import LogicalMesh
from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.derive import training_step
from planner.graph.recompute import CHOOSES, OPEN
from planner.graph.saving import saved_values
from planner.model import Model, Remat, Training
from planner.planning import ENOUGH_GAP, Options, Planning, Unsolved
from planner.saving import SavingPlanning, plan_saving, saving_bound
from planner.weighting import PLAIN

VALUES = ("layers.h", "layers.act", "layers.y", "layers.gated", "layers.z")
LEAST, MOST = 37 * 2**20, 78 * 2**20  # what saving nothing and everything needs


@cache
def layers_of(remat: Remat) -> Model:
    """A loop of three products with functions between them: some values are made of others."""
    tokens, width = 4096, 256
    b = Builder()
    x = b.input("x", (tokens, width), ("B", "D"), "bf16")
    r = b.repeat("layers", 8)
    entry = r.enter(x)
    w1 = r.param("w1", (width, 4 * width), ("D", "F"))
    w2 = r.param("w2", (4 * width, width), ("F", "D"))
    w3 = r.param("w3", (width, width), ("D", "E"))
    act = r.pointwise("act", ("gelu", ex.x(0)), r.einsum("BD,DF->BF", entry, w1, name="h"))
    y = r.einsum("BF,FD->BD", act, w2, name="y")
    z = r.einsum("BD,DE->BE", r.pointwise("gated", ("tanh", ex.x(0)), y), w3, name="z")
    out = r.pointwise("out", ex.add(ex.x(0), ("tanh", ex.x(1))), entry, z)
    (x,) = r.end_repeat([(x, entry, out)])
    loss = weighted_sum(b, x)
    return Model("layers", b.graph([loss]), Training(tokens, "sgd", remat=remat), tokens)


@cache
def mesh(axes: int) -> LogicalMesh:
    sizes = {"x": 8} if axes == 1 else {"x": 4, "y": 2}
    return meshes.logical(meshes.resolve("dgx-a100-40gb:1"), sizes)


def options(limit: float) -> Options:
    return Options(memory_bytes=int(limit), headroom=0.0, least_memory=False)


@cache
def planning(remat: Remat, axes: int) -> Planning:
    return Planning(layers_of(remat), mesh(axes), options(0), {}, None)


def test_every_value_that_can_be_saved_is_open() -> None:
    chosen = [op.outs[0] for op, _ in training_step(layers_of(OPEN)).walk() if CHOOSES in op.attrs]
    assert sorted(name.removesuffix("~") for name in chosen) == sorted(VALUES)
    assert saved_values(layers_of("none")) == {*VALUES, "layers.x.in"}


@pytest.mark.parametrize(
    ("axes", "share"), [(1, 0.0), (1, 0.2), (1, 0.35), (1, 0.65), (1, 0.8), (1, 1.0), (2, 0.5)]
)
def test_no_set_of_values_is_better(axes: int, share: float) -> None:
    limit = LEAST + share * (MOST - LEAST)
    costs: dict[tuple[str, ...], float] = {}
    for saved in chain.from_iterable(combinations(VALUES, n) for n in range(len(VALUES) + 1)):
        plain = planning(saved, axes)
        plain.active, plain.slack = [], 0.0
        found = plain.within(limit, plain.counts(PLAIN), ENOUGH_GAP)
        if found is not None:
            costs[saved] = found.plan.proof.objective_s
    best = min(costs.values())
    open_planning = SavingPlanning(layers_of(OPEN), mesh(axes), options(limit), {}, None)
    saved = open_planning.saved(PLAIN)
    assert saved is not None
    assert costs[tuple(v for v in VALUES if v in saved)] <= best * (1 + 2 * ENOUGH_GAP)
    result = plan_saving(layers_of(OPEN), mesh(axes), options(limit), PLAIN)
    assert result.memory.peak_bytes <= limit
    assert saving_bound(layers_of(OPEN), mesh(axes)) <= best
    if share == 0.5:  # what is worth saving is not what is worth most by itself
        assert 0 < len(saved) < len(VALUES)
        assert max(costs.values()) > 1.02 * best


def test_what_cannot_fit_is_not_decided() -> None:
    tight = SavingPlanning(layers_of(OPEN), mesh(1), options(2**20), {}, None)
    assert tight.saved(PLAIN) is None
    with pytest.raises(Unsolved):
        plan_saving(layers_of(OPEN), mesh(1), options(2**20), PLAIN)
