"""Pipelined programs made by hand: stages of one kernel per half, all times known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from small_programs import AXES, Draft

from costmodels.pipeline import PipelineProgram, StageProgram
from costmodels.program import Buffer, Collective, Compute, LoopStep, Program, Step
from costmodels.schedule import BACKWARD, FORWARD, schedule


def stage(forward: float, backward: float, first: bool, last: bool, times: int) -> StageProgram:
    """`forward` and `backward`: bytes through memory of each half's kernel."""
    d = Draft()
    given, gradient = d.new(8), d.new(8)
    made, kept, sent, updated = d.new(8), d.new(100, "activations"), d.new(8), d.new(8)
    ahead = Step("ahead", (d.compute((given,), (made, kept), forward),))
    behind = Step("behind", (d.compute((gradient, kept), (sent,), backward),))
    loop = LoopStep("accumulate", times, Step("enter", ()), (ahead, behind), (), (), ())
    leave, update = Step("leave", ()), Step("update", (d.compute((), (updated,), 0.0),))
    program = Program((AXES[1],), d.buffers, (loop, leave, update), {}, {})
    return StageProgram(
        program, 0, 1,
        {FORWARD: {} if first else {"x": given}, BACKWARD: {} if last else {"x": gradient}},
        {FORWARD: {} if last else {"x": made}, BACKWARD: {} if first else {"x": sent}},
    )  # fmt: skip


def pipeline(
    kind: str, work: list[tuple[float, float]], microbatches: int, devices: int = 2
) -> PipelineProgram:
    """Stages along axis x; `work`: bytes of the halves of each."""
    last = len(work) - 1
    stages = tuple(stage(f, b, i == 0, i == last, microbatches) for i, (f, b) in enumerate(work))
    table = schedule(kind, devices, len(work) // devices, microbatches)
    return PipelineProgram(AXES, "x", stages, table)


def unrolled(program: PipelineProgram, place: int) -> Program:
    """One device's whole schedule without loops: every microbatch has buffers of its own."""
    buffers: dict[int, Buffer] = {}
    block: list[Step | LoopStep] = []
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    names: dict[int, dict[int, int]] = {}  # stage → what its buffers are called now

    def number(stage: int, b: int) -> int:
        if b not in names[stage]:
            fresh = names[stage][b] = len(buffers)
            old = program.stages[stage].program.buffers[b]
            buffers[fresh] = old  # the number is taken before the alias needs one too
            alias = None if old.alias is None else number(stage, old.alias)
            buffers[fresh] = Buffer(fresh, old.shape, old.dtype, old.category, old.tensor, alias)
        return names[stage][b]

    def copied(stage: int, steps: tuple[Step | LoopStep, ...]) -> list[Step | LoopStep]:
        return [renamed(s, lambda b: number(stage, b)) for s in steps]

    saved: dict[tuple[int, int], dict[int, int]] = {}
    for s in program.stages_at(place):
        own = program.stages[s]
        names[s] = {}
        inputs.update({f"{s}.{n}": number(s, b) for n, b in own.program.inputs.items()})
        block += copied(s, own.parts["before"].block)
        for k in own.microbatches.carries:
            names[s][k.entry] = number(s, k.init)
    outside = {s: dict(n) for s, n in names.items()}
    for task in program.table[place]:
        s, own = task.stage, program.stages[task.stage]
        carried = {k.entry: names[s][k.entry] for k in own.microbatches.carries}
        key = (s, task.microbatch)
        names[s] = {**(outside[s] if task.phase == FORWARD else saved.pop(key)), **carried}
        block += copied(s, own.parts[task.phase].block)
        if task.phase == FORWARD:
            saved[key] = dict(names[s])
        else:
            names[s].update({k.entry: number(s, k.exit) for k in own.microbatches.carries})
    for part in ("leave", "after"):
        for s in program.stages_at(place):
            own = program.stages[s]
            if part == "leave":
                results = {k.result: names[s][k.entry] for k in own.microbatches.carries}
                names[s] = {**outside[s], **results}
            block += copied(s, own.parts[part].block)
    for s in program.stages_at(place):
        outputs.update({f"{s}.{n}": number(s, b) for n, b in
                        program.stages[s].program.outputs.items()})  # fmt: skip
    return Program(program.stages[0].program.axes, buffers, tuple(block), inputs, outputs)


def renamed(step: Step | LoopStep, new: Callable[[int], int]) -> Step | LoopStep:
    """`step` with every buffer called by another number."""
    if isinstance(step, Step):
        found = []
        for i in step.instructions:
            if isinstance(i, Compute):
                found.append(replace(i, ins=tuple(map(new, i.ins)), outs=tuple(map(new, i.outs))))
            elif isinstance(i, Collective):
                found.append(replace(i, source=new(i.source), result=new(i.result)))
        return replace(step, instructions=tuple(found))

    def all_new(parts: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(p, **{f.name: new(getattr(p, f.name)) for f in fields(p)}) for p in parts
        )

    return replace(
        step, enter=renamed(step.enter, new), body=tuple(renamed(s, new) for s in step.body),
        carries=all_new(step.carries), reads=all_new(step.reads), writes=all_new(step.writes),
    )  # fmt: skip
