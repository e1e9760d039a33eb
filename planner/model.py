"""A loaded model: its forward graph and how it is trained. What every front end produces.

Front ends (model files, the zoo) build it; training-step derivation and planning read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.graph.core import Graph

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "adafactor")
REMAT_POLICIES = ("none", "full", "dots", "attention")


@dataclass(frozen=True)
class Training:
    """How a step is trained. `batch` counts sequences (or images) per optimizer step, all
    `accumulation_steps` included; the forward graph is built for batch / accumulation_steps."""

    batch: int
    optimizer: str = "adamw"
    compute: str = "bf16"
    params: str = "f32"
    states: str = "f32"
    remat: str = "full"
    accumulation_steps: int = 1
    pipeline_microbatches: int = 1


@dataclass(frozen=True)
class Assumed:
    """A parameter that the model's source leaves open: chosen value, its range, and why."""

    key: str
    value: float | str
    low: float | str
    high: float | str
    why: str


@dataclass(frozen=True)
class Model:
    """A forward graph (outputs[0] is the scalar loss) with everything a plan needs to know.

    `constraints`: tensor name → for every dimension (stacked layer dimensions left out) the
    mesh axes it is pinned to. `tokens`: what one step processes, for throughput.
    """

    name: str
    graph: Graph
    training: Training
    tokens: int
    mesh: str | None = None
    shape: Mapping[str, int] | str | None = None
    layout: Mapping[str, Mapping[str, int]] | None = None  # as meshes.logical takes it
    constraints: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    assumed: tuple[Assumed, ...] = ()
    published_parameters: float | None = None
    digest: str = ""
