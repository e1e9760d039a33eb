"""A loaded model: its graph and what is asked of it, training or inference; of every front end.

Front ends (model files, the zoo) build it; training-step derivation and planning read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from planner.graph.core import Graph

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "adafactor")
AUTO = "auto"
FIXED_POLICIES = ("none", "full", "dots", "attention")
REMAT_POLICIES = (*FIXED_POLICIES, "checkpoint", AUTO)
RECOMPUTES_ALL = ("full", "checkpoint")

SHOWN = 6  # saved values that a report names

Remat = str | tuple[str, ...]  # a policy, or the tensors of repeated bodies that are saved
SCHEDULES = ("gpipe", "1f1b", "interleaved", "circular")
SEVERAL_CHUNKS = ("interleaved", "circular")  # schedules in which a device has several stages
STACKED = ("gpipe", "circular")  # schedules that one SPMD program of equal stages can follow


@dataclass(frozen=True)
class Training:
    """How a step is trained. `batch` counts sequences (or images) per optimizer step, all
    `accumulation_steps` and `pipeline_microbatches` included; the forward graph is built for
    one part. `fused_accumulation`: products add to the gradients of earlier parts themselves.
    `reduce_once`: gradients may stay unreduced until the last part; None if the program can say
    so, which of one XLA program is not so."""

    batch: int
    optimizer: str = "adamw"
    compute: str = "bf16"
    params: str = "f32"
    states: str = "f32"
    master: bool = False
    gradients: str = "f32"
    fused_accumulation: bool = False
    reduce_once: bool | None = None
    remat: Remat = "full"
    accumulation_steps: int = 1
    pipeline_microbatches: int = 1

    @property
    def parts(self) -> int:
        """How often the forward graph runs in a step."""
        return self.accumulation_steps * self.pipeline_microbatches


PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)


@dataclass(frozen=True)
class Inference:
    """What a step of inference does for `batch` sequences.

    `prefill` reads prompts of `context` tokens and fills the cache of keys and values; `decode`
    adds one token to every sequence, whose cache has `context` slots.
    """

    phase: str
    batch: int
    context: int
    compute: str = "bf16"
    params: str = "bf16"

    @property
    def tokens(self) -> int:
        """Positions that a step computes."""
        return self.batch if self.phase == DECODE else self.batch * self.context


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


def remat_text(remat: Remat) -> str:
    """In words; of many values only the last, which are the large ones."""
    if isinstance(remat, str):
        return remat
    more = f" and {len(remat) - SHOWN} more" if len(remat) > SHOWN else ""
    return f"saving {', '.join(remat[-SHOWN:])}{more}"


@dataclass(frozen=True)
class Model:
    """A graph with everything a plan needs to know.

    To be trained: the forward graph, whose outputs[0] is the scalar loss. For inference: the
    whole step, whose outputs[0] are the logits; the others are caches, donated ones as aliases.
    `constraints`: tensor name → for every dimension (stacked layer dimensions left out) the
    mesh axes it is pinned to. `members`: where layers that are written out have become a loop,
    tensor of the graph → those of the model file that it stands for. `tokens`: what one step
    processes, for throughput. `uneven`: axes may split dimensions that they do not divide.
    """

    name: str
    graph: Graph
    workload: Training | Inference
    tokens: int
    pipeline: Pipeline | None = None
    mesh: str | None = None
    shape: Mapping[str, int] | str | None = None
    layout: Mapping[str, Mapping[str, int]] | None = None  # as meshes.logical takes it
    constraints: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    uneven: bool = False
    assumed: tuple[Assumed, ...] = ()
    published_parameters: float | None = None
    digest: str = ""

    @property
    def training(self) -> Training:
        """How it is trained; only for what is about training alone."""
        if isinstance(self.workload, Training):
            return self.workload
        raise ValueError(f"{self.name} is planned for inference")

    @property
    def inference(self) -> Inference | None:
        return self.workload if isinstance(self.workload, Inference) else None

    def decided(self, remat: Remat | None) -> Model:
        """The model with this saved for its backward pass; None changes nothing."""
        if remat is None:
            return self
        return replace(self, workload=replace(self.training, remat=remat))
