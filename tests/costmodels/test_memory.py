"""Peak liveness against an independent walk through the unrolled program, and known answers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from small_programs import Draft, programs, random_program

import meshes
from costmodels.gathered import copy_gathered
from costmodels.memory import read_memory
from costmodels.program import (
    Block,
    Buffer,
    CarryBuffers,
    LoopStep,
    Program,
    StackBuffers,
    Step,
)


@dataclass
class Unrolled:
    """Runs every iteration one by one; notes when each copy of a buffer is made and last used.

    `at[time]` is the number of the folded step. A copy is (buffer, serial); what it costs at a
    time is looked up at the very end, by plain intervals.
    """

    program: Program
    at: list[int] = field(default_factory=list)
    current: dict[int, int] = field(default_factory=dict)  # buffer → serial of its newest copy
    made: dict[tuple[int, int], int] = field(default_factory=dict)
    used: dict[tuple[int, int], int] = field(default_factory=dict)

    def root(self, b: int) -> int:
        while (alias := self.program.buffers[b].alias) is not None:
            b = alias
        return b

    def make(self, b: int, time: int) -> None:
        if self.program.buffers[b].alias is None:
            self.current[b] = self.current.get(b, -1) + 1
            self.made[b, self.current[b]] = time

    def use(self, b: int, time: int) -> None:
        b = self.root(b)
        self.used[b, self.current[b]] = max(self.used.get((b, self.current[b]), 0), time)

    def step(self, step: Step, number: int) -> None:
        now = len(self.at)
        self.at.append(number)
        for instruction in step.instructions:
            for b in instruction.ins:
                self.use(b, now)
            for b in instruction.outs:
                self.make(b, now)
                self.use(b, now)

    def block(self, block: Block, number: int) -> int:
        for step in block:
            if isinstance(step, Step):
                self.step(step, number)
                number += 1
            else:
                number = self.loop(step, number)
        return number

    def loop(self, loop: LoopStep, number: int) -> int:
        self.step(loop.enter, number)
        enter = len(self.at) - 1
        for k in loop.carries:
            self.use(k.init, enter)
        for s in loop.writes:
            self.make(s.outer, enter)
            self.use(s.outer, enter)
        after = number + 1
        for _ in range(loop.times):
            start = len(self.at)
            for k in loop.carries:
                self.make(k.entry, start)
            after = self.block(loop.body, number + 1)
            for k in loop.carries:
                self.use(k.exit, len(self.at) - 1)
        stop = len(self.at)
        for s in loop.reads:
            self.use(s.outer, stop - 1)
        for s in loop.writes:
            self.use(s.outer, stop)  # documented: through the step after the loop
        for k in loop.carries:
            self.make(k.result, stop)
        return after

    def profile(self) -> dict[int, int]:
        """Folded step → most bytes at any of its times."""
        for b in self.program.inputs.values():
            self.make(b, 0)
        self.block(self.program.block, 0)
        end = len(self.at)
        for b in (*self.program.inputs.values(), *self.program.outputs.values()):
            self.use(b, end)
        most: dict[int, int] = defaultdict(int)
        for time, number in enumerate(self.at):
            live = sum(
                self.program.buffers[b].bytes
                for (b, serial), first in self.made.items()
                if first <= time <= self.used.get((b, serial), -1)
            )
            most[number] = max(most[number], live)
        return most


def single_trips(block: Block) -> bool:
    """Whether a loop runs once: its first iteration is its last, which frees things earlier."""
    loops = [s for s in block if isinstance(s, LoopStep)]
    return any(loop.times == 1 or single_trips(loop.body) for loop in loops)


@settings(max_examples=300, deadline=None)
@given(programs(depth=3))
@example(random_program(3591789390, 7, 3))  # a carry that only a loop further inside reads
def test_every_step_is_as_full_as_its_fullest_time_in_the_unrolled_program(program):
    memory = read_memory(program)
    unrolled = Unrolled(program).profile()
    assert len(memory.profile) == len(unrolled)
    for step, size in unrolled.items():
        assert size <= memory.profile[step]
        if not single_trips(program.block):
            assert size == memory.profile[step]


@settings(max_examples=100, deadline=None)
@given(programs())
def test_parts_and_largest_sum_to_the_peak_and_nothing_is_more_than_everything(program):
    memory = read_memory(program)
    assert memory.peak_bytes == max(memory.profile) == sum(memory.parts.values())
    assert sum(size for _, _, size in memory.largest) == memory.peak_bytes
    assert [r[2] for r in memory.largest] == sorted((r[2] for r in memory.largest), reverse=True)
    assert memory.peak_bytes <= sum(b.bytes for b in program.buffers.values())


def test_an_empty_program_takes_nothing():
    memory = read_memory(Draft().program([], [], []))
    assert (memory.peak_bytes, memory.step, memory.profile) == (0, "", ())


def test_a_donated_input_is_counted_once():
    d = Draft()
    w, g = d.new(100, "parameters"), d.new(10, "gradients")
    new = d.new(100, "temporaries", alias=w)
    program = d.program([Step("update", (d.compute((w, g), (new,)),))], [w, g], [new])
    assert read_memory(program).peak_bytes == 110


def test_parameters_that_a_gather_replaces_lie_twice():
    """What is updated in place, and states that are gathered, lie once; and on v4 what is gathered
    over a whole torus, which is a sum."""
    v3 = meshes.logical(meshes.resolve("tpu-v3:8x8"), {"x": 128})
    v4 = meshes.logical(meshes.resolve("tpu-v4:4x4x4"), {"x": 64})
    d = Draft()
    w, v, state = d.new(100, "parameters"), d.new(40, "parameters"), d.new(20, "optimizer")
    part, moment = d.new(50), d.new(10)
    new_w, new_v = d.new(100, alias=w), d.new(40, alias=v)
    new_state = d.new(20, alias=state)
    steps = [
        Step("update", (d.compute((w,), (part,)), d.compute((v,), (new_v,)))),
        Step("gather", (d.move("all-gather", part, new_w, 100),)),
        Step("state", (d.compute((state,), (moment,)),
                       d.move("all-gather", moment, new_state, 20))),
    ]  # fmt: skip
    program = d.program(steps, [w, v, state], [new_w, new_v, new_state])
    assert read_memory(program).profile == (160 + 50, 160 + 50, 160 + 10)
    assert read_memory(copy_gathered(program, v3)).profile == (260 + 50, 260 + 50, 260 + 10)
    assert copy_gathered(program, v4) == program


def test_stacks_live_for_the_whole_loop_and_a_carry_takes_two_buffers_inside():
    d = Draft()
    x, weights = d.new(8), d.new(3 * 20, "parameters")
    w, entry, exit_, result = d.new(20, alias=weights), d.new(8), d.new(8), d.new(8)
    saved, stack = d.new(5), d.new(3 * 5, "activations")
    body = (Step("body", (d.compute((entry, w), (exit_, saved)),)),)
    loop = LoopStep(
        "layers", 3, Step("enter", ()), body, (CarryBuffers(x, entry, exit_, result),),
        (StackBuffers(weights, w),), (StackBuffers(stack, saved),),
    )  # fmt: skip
    tail = Step("tail", (d.compute((result, stack), (d.new(1),)),))
    program = d.program([loop, tail], [x, weights], [])
    # Always x and the weights; the stack throughout; inside entry, exit and one saved slice.
    assert read_memory(program).profile == (68 + 15, 68 + 15 + 8 + 8 + 5, 68 + 15 + 8 + 1)


def test_aliases_in_a_circle_are_refused():
    d = Draft()
    d.buffers = {0: Buffer(0, (1,), "i8", "temporaries", "a", 1),
                 1: Buffer(1, (1,), "i8", "temporaries", "b", 0)}  # fmt: skip
    program = d.program([Step("s", (d.compute((0,), (1,)),))], [], [])
    with pytest.raises(ValueError, match="circle"):
        read_memory(program)
