"""A loaded model: its forward graph and how it is trained. What every front end produces.

Front ends (model files, the zoo) build it; training-step derivation and planning read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.graph.core import Graph

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "adafactor")
REMAT_POLICIES = ("none", "full", "dots", "attention", "checkpoint")
RECOMPUTES_ALL = ("full", "checkpoint")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "circular")
SEVERAL_CHUNKS = ("interleaved", "circular")  # schedules in which a device has several stages
STACKED = ("gpipe", "circular")  # schedules of equal stages, which one SPMD program can hold


@dataclass(frozen=True)
class Training:
    """How a step is trained. `batch` counts sequences (or images) per optimizer step, all
    `accumulation_steps` and `pipeline_microbatches` included; the forward graph is built for
    one part."""

    batch: int
    optimizer: str = "adamw"
    compute: str = "bf16"
    params: str = "f32"
    states: str = "f32"
    master: bool = False
    gradients: str = "f32"
    remat: str = "full"
    accumulation_steps: int = 1
    pipeline_microbatches: int = 1

    @property
    def parts(self) -> int:
        """How often the forward graph runs in a step."""
        return self.accumulation_steps * self.pipeline_microbatches


@dataclass(frozen=True)
class Pipeline:
    """Layers dealt out along mesh axis `axis`, in `interleave` pieces per device.

    `inside`: what is no layer (embedding, softmax) belongs to the first and last stage; else it
    runs outside of the pipeline, where the axis is free for other uses.
    """

    axis: str
    schedule: str = "1f1b"
    interleave: int = 1
    inside: bool = True


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
    pipeline: Pipeline | None = None
    mesh: str | None = None
    shape: Mapping[str, int] | str | None = None
    layout: Mapping[str, Mapping[str, int]] | None = None  # as meshes.logical takes it
    constraints: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    assumed: tuple[Assumed, ...] = ()
    published_parameters: float | None = None
    digest: str = ""
