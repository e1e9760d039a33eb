"""Pipelines whose stages have programs of their own: each compiled alone on its submesh.

Stages with equal programs are compiled once, the one whose device needs most for all of them. A
program has one microbatch in flight, and of other stages nothing. So the compiled peak of the
device is that of the program and what the schedule adds to it by our reading
(costmodels.pipeline_memory): further microbatches in flight, and other stages of the device, while
the stage works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from costmodels.pipeline import PipelineProgram, StageProgram
from costmodels.pipeline_memory import device_memory, each_alone
from costmodels.program import ITEM_BYTES, Program
from costmodels.schedule import BACKWARD, FORWARD
from costmodels.simulate import simulate
from meshes.errors import MeshError
from planner.export.jax_program import Source, planned_source
from planner.export.jax_stage import Sides, stage_model
from planner.graph.flops import count_flops
from planner.pipelining.stages import microbatch_loop
from planner.result import PlannedStage, Result
from planner.verify.compare import Verification
from planner.verify.errors import BackendError

MINOR = 0.01


@dataclass(frozen=True)
class Alone:
    """A stage by itself: `numbers` are the stages that it stands for, `result` has the peak of its
    device, with the profile of its own program, to which the schedule adds `held_bytes` while it
    works on a microbatch. `in_flight`: of these.
    `unreduced`: axes over which the plan sums gradients, MINOR of the peak, only after the last
    microbatch."""

    numbers: tuple[int, ...]
    in_flight: int
    held_bytes: int
    unreduced: tuple[str, ...]
    result: Result
    source: Source


@dataclass(frozen=True)
class VerifiedStage:
    """A stage by itself, and what its compiled program says."""

    alone: Alone
    found: Verification


@dataclass(frozen=True)
class VerifiedStages:
    """What `plan verify` found of a pipeline, by kind of stage."""

    model: str
    mesh: str
    schedule: str
    axis: str
    stages: tuple[VerifiedStage, ...]

    @property
    def ok(self) -> bool:
        return all(stage.found.ok for stage in self.stages)


def stages_alone(result: Result) -> Iterator[Alone]:
    """Every different stage program of a pipeline, with its JAX program. Raises ExportError, or
    BackendError if the devices of a stage are no machine."""
    pipeline = result.program
    if not isinstance(pipeline, PipelineProgram):
        raise ValueError(f"{result.model.name} is one program")
    try:
        submesh = result.mesh.at_one_place(pipeline.axis)
    except MeshError as error:
        raise BackendError(f"a stage cannot be compiled alone: {error}") from None
    memories = each_alone(pipeline)

    def on_device(number: int) -> tuple[int, ...]:
        """Bytes of a stage's device at each of the stage's steps."""
        return device_memory(pipeline, memories, pipeline.place(number)).profiles[number]

    for numbers in _equal(pipeline.stages):
        number, profile = max(
            ((n, on_device(n)) for n in numbers), key=lambda found: max(found[1])
        )
        program = with_crossing(pipeline.stages[number])
        own = memories[number]
        at = own.body + int(own.profile[own.body : own.stop].argmax())
        held = profile[at] - int(own.profile[at])
        memory = replace(
            result.memory, peak_bytes=max(profile), profile=tuple(own.profile.tolist())
        )
        planned = result.stages[number]
        model = stage_model(result.model, result.plan.starts, number, planned)
        inner = result.mesh.without(pipeline.axis)
        alone = replace(
            result, model=model, mesh=inner, graph=planned.step, plan=planned.plan,
            program=program, timing=simulate(program, inner),
            specs=planned.specs, memory=memory, flops=count_flops(planned.step), stages=(),
        )  # fmt: skip
        source = planned_source(alone, Sides.of(planned), submesh)
        yield Alone(
            tuple(numbers), pipeline.in_flight[number], held,
            _unreduced(planned, MINOR * max(profile)), replace(alone, mesh=submesh), source,
        )  # fmt: skip


def _unreduced(stage: PlannedStage, least_bytes: float) -> tuple[str, ...]:
    """Axes over which sums of at least `least_bytes` wait."""
    loop, sizes = microbatch_loop(stage.step), stage.plan.sizes
    waiting: dict[str, int] = {}
    for carry in loop.carries:
        t, spec = loop.body.tensors[carry.entry], stage.specs[carry.entry]
        for axis in spec.partial:
            held = prod(spec.local_shape(t.shape, sizes)) * ITEM_BYTES[t.dtype]
            waiting[axis] = waiting.get(axis, 0) + held
    return tuple(sorted(axis for axis, held in waiting.items() if held >= least_bytes))


def _equal(stages: Sequence[StageProgram]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for number, stage in enumerate(stages):
        found.setdefault(id(stage), []).append(number)
    return list(found.values())


def with_crossing(stage: StageProgram) -> Program:
    """The stage's program with all that its JAX program takes as arguments."""
    inputs = dict(stage.program.inputs)
    for phase in (FORWARD, BACKWARD):
        inputs |= {f"{phase} {key}": b for key, b in stage.received[phase].items()}
    inputs |= {f"{name} of {giver}": b for (name, giver), b in stage.taken.items()}
    return replace(stage.program, inputs=inputs)
