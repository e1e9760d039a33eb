"""A Plan: the choice of every op and the spec of every home, with what proves it.

Immutable and serialisable; nothing here searches or prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.model import Remat
from planner.sharding.choices import Choice
from planner.sharding.spec import Spec


@dataclass(frozen=True)
class Proof:
    """What the solver said of the surrogate objective: status, value, lower bound."""

    status: str
    objective_s: float
    bound_s: float
    gap: float
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Plan:
    """`choices` by op name (recomputed ops follow their origin), `homes` by the tensor that each
    holds. `remat` is what is saved for the backward pass, where the model leaves that open.

    Of a pipeline: `starts` says where its stages start (see pipelining.pieces), `pieces` has a
    plan for every kind of stage in order, over the axes without the pipeline's; the plan itself
    has the choices of all of them, and no homes.
    """

    axes: tuple[tuple[str, int], ...]
    choices: Mapping[str, Choice]
    homes: Mapping[str, Spec]
    proof: Proof
    pieces: tuple[Plan, ...] = ()
    starts: tuple[int, ...] = ()
    remat: Remat | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)
