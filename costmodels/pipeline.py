"""A pipelined program: stage programs, how they are connected, and the table of their tasks.

A stage program is an ordinary Program with a loop over microbatches, whose body is a forward and
then a backward half. Types only, and what follows from them by counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from costmodels.program import Block, Buffer, Collective, Instruction, LoopStep, Program, Step
from costmodels.schedule import BACKWARD, FORWARD, Table, in_flight


@dataclass(frozen=True)
class StageProgram:
    """`program.block[loop]` runs once per microbatch; its body's first `split` parts are the
    forward half. What crosses to other stages, by key: buffers of one microbatch that are
    `received` or `sent`, for each phase; buffers once a step whose values stages add up:
    `given` their own, `taken` what others give, by giver."""

    program: Program
    loop: int
    split: int
    received: Mapping[str, Mapping[str, int]]
    sent: Mapping[str, Mapping[str, int]]
    given: Mapping[str, int] = field(default_factory=dict)
    taken: Mapping[tuple[str, int], int] = field(default_factory=dict)

    @property
    def microbatches(self) -> LoopStep:
        loop = self.program.block[self.loop]
        if not isinstance(loop, LoopStep):
            raise ValueError(f"block {self.loop} of a stage program is no loop over microbatches")
        return loop

    @cached_property
    def parts(self) -> Mapping[str, Program]:
        """The pieces that are run one by one: before, forward, backward, leave, after.

        `leave` hands on the loop's results; what stages exchange is there before `after`.
        """
        block, loop = self.program.block, self.microbatches
        blocks: dict[str, Block] = {
            "before": (*block[: self.loop], loop.enter),
            FORWARD: loop.body[: self.split],
            BACKWARD: loop.body[self.split :],
            "leave": block[self.loop + 1 : self.loop + 2],
            "after": block[self.loop + 2 :],
        }
        return {name: self._part(part) for name, part in blocks.items()}

    def _part(self, block: Block) -> Program:
        """`block` as a program of its own: what it reads and does not make is its input."""
        read, made = _touched(block)
        inputs = {f"{self.program.buffers[b].tensor}#{b}": b for b in read if b not in made}
        return Program(self.program.axes, self.program.buffers, block, inputs, {})

    def buffer(self, number: int) -> Buffer:
        return self.program.buffers[number]


def _touched(block: Block) -> tuple[dict[int, None], set[int]]:
    """Buffers that a block reads, in order, and those that it makes."""
    read: dict[int, None] = {}
    made: set[int] = set()

    def step(s: Step) -> None:
        for instruction in s.instructions:
            read.update(dict.fromkeys(instruction.ins))
            made.update(instruction.outs)

    for part in block:
        if isinstance(part, Step):
            step(part)
            continue
        step(part.enter)
        made.update(b for k in part.carries for b in (k.entry, k.result))
        made.update(s.inner for s in part.reads)
        read.update(dict.fromkeys(k.init for k in part.carries))
        read.update(dict.fromkeys(s.outer for s in part.reads))
        inner_read, inner_made = _touched(part.body)
        read.update(inner_read)
        made |= inner_made
        made.update(s.outer for s in part.writes)
    return read, made


@dataclass(frozen=True)
class PipelineProgram:
    """`stages` in the order of the model, `table` of every position along `axis`. `axes`: of
    the whole mesh."""

    axes: tuple[tuple[str, int], ...]
    axis: str
    stages: tuple[StageProgram, ...]
    table: Table
    reported: int = 0  # the position whose instructions stand for the program in reports

    @property
    def devices(self) -> int:
        return len(self.table)

    def place(self, stage: int) -> int:
        """The position of a stage's devices along the axis."""
        return stage % self.devices

    def stages_at(self, place: int) -> range:
        return range(place, len(self.stages), self.devices)

    @cached_property
    def in_flight(self) -> Mapping[int, int]:
        return in_flight(self.table)

    def crossings(self, stage: int, phase: str) -> list[Collective]:
        """What a stage sends on after a task of `phase`, as moves along the axis."""
        program = self.stages[stage]
        return [
            Collective(
                "collective-permute", (self.axis,), b, b, program.buffer(b).bytes,
                tensor=program.buffer(b).tensor, phase=phase,
            )
            for b in program.sent[phase].values()
        ]  # fmt: skip

    def exchanges(self, stage: int) -> list[Collective]:
        """What a stage gets from others once a step, to add to its own."""
        program = self.stages[stage]
        return [
            Collective(
                "collective-permute", (self.axis,), b, b, program.buffer(b).bytes,
                tensor=program.buffer(b).tensor, phase="update",
            )
            for b in program.taken.values()
        ]  # fmt: skip

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction of a device at the `reported` position with its executions in a
        step, and what it sends."""
        for stage in self.stages_at(self.reported):
            yield from self.stages[stage].program.instructions()
            times = self.stages[stage].microbatches.times
            for phase in (FORWARD, BACKWARD):
                for move in self.crossings(stage, phase):
                    yield move, times
            for move in self.exchanges(stage):
                yield move, 1
