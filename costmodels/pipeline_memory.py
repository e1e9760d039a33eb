"""Bytes of a pipelined step: peak over the tasks of every device's schedule.

A stage alone is read like any program (see `memory`), as if one microbatch were there. What its
forward half leaves for the backward half, the *stash*, exists once for every microbatch in flight;
a device with several stages holds the parameters, states, accumulators and stashes of all of them
while it works on one. Microbatches that arrive before their task starts are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from costmodels.memory import Memory, Span, lifetimes, usage
from costmodels.pipeline import PipelineProgram, StageProgram
from costmodels.program import CATEGORIES, Block, LoopStep
from costmodels.schedule import BACKWARD, FORWARD, waiting


@dataclass(frozen=True)
class StageMemory:
    """Lifetimes in one stage alone. Steps [body, split) are the forward half of the loop over
    microbatches, [split, stop) the backward half."""

    stage: StageProgram
    spans: tuple[Span, ...]
    names: tuple[str, ...]
    body: int
    split: int
    stop: int

    @classmethod
    def of(cls, stage: StageProgram) -> StageMemory:
        life = lifetimes(stage.program)
        loop = stage.microbatches
        body = steps(stage.program.block[: stage.loop]) + 1  # the loop's `enter` comes first
        split = body + steps(loop.body[: stage.split])
        return cls(stage, life.spans, life.names, body, split, body + steps(loop.body))

    @cached_property
    def profile(self) -> NDArray[np.int64]:
        """Bytes at every step with one microbatch."""
        return usage(self.stage.program, self.spans, len(self.names))

    @cached_property
    def between(self) -> tuple[list[int], list[int]]:
        """Buffers that live between the two halves: one per microbatch, and one for all. Narrow
        stacks of parameters are made for each half: nothing of them waits."""
        loop = self.stage.microbatches
        entries, narrow = {k.entry for k in loop.carries}, set(_narrowed(loop.body))
        stash: list[int] = []
        kept: list[int] = []
        for b, start, stop in self.spans:
            if start < self.split < stop and b not in narrow:
                own = start >= self.body and b not in entries
                (stash if own else kept).append(b)
        return stash, kept

    @cached_property
    def stash_bytes(self) -> int:
        return self._bytes(self.between[0])

    @cached_property
    def kept_bytes(self) -> int:
        """What the stage holds while its device works on another stage, without stashes."""
        return self._bytes(self.between[1])

    def _bytes(self, buffers: Sequence[int]) -> int:
        return sum(self.stage.buffer(b).bytes for b in buffers)

    def peak(self, phase: str) -> int:
        """The step of a half at which most is in use."""
        start, stop = (self.body, self.split) if phase == FORWARD else (self.split, self.stop)
        return start + int(self.profile[start:stop].argmax()) if stop > start else start

    def with_others(self, forward: int, backward: int, apart: int) -> NDArray[np.int64]:
        """The profile with the bytes of other microbatches and stages added: while the forward
        half runs, while the backward half does, and outside of the loop."""
        profile = self.profile + apart
        profile[self.body : self.split] += forward - apart
        profile[self.split : self.stop] += backward - apart
        return profile


def _narrowed(block: Block) -> Iterator[int]:
    for step in block:
        if isinstance(step, LoopStep):
            yield from (*step.narrowed, *_narrowed(step.body))


def steps(block: Block) -> int:
    """How many steps of the schedule a block has."""
    return sum(1 + steps(s.body) if isinstance(s, LoopStep) else 1 for s in block)


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory over its schedule. `profiles`: of each of its stages, the most that is
    in use on the device while the stage is at each of its steps."""

    memory: Memory
    profiles: Mapping[int, tuple[int, ...]]


def read_pipeline_memory(program: PipelineProgram) -> Memory:
    """The memory of the device that needs most."""
    alone = each_alone(program)
    found = [device_memory(program, alone, place).memory for place in range(program.devices)]
    return max(found, key=lambda memory: memory.peak_bytes)


def each_alone(program: PipelineProgram) -> list[StageMemory]:
    """Of every stage; equal ones share theirs."""
    known: dict[int, StageMemory] = {}
    for stage in program.stages:
        known.setdefault(id(stage.program), StageMemory.of(stage))
    return [known[id(stage.program)] for stage in program.stages]


def read_alike(alone: StageMemory, copies: int, chunks: int) -> Memory:
    """The memory of a device with `chunks` stages like this one and never more than `copies`
    microbatches in flight, of all of them together."""
    apart = (chunks - 1) * alone.kept_bytes
    inside = apart + (copies - 1) * alone.stash_bytes
    profile = alone.with_others(inside, inside, apart)
    at = int(profile.argmax())
    held = {(0, b): 1 for b, start, stop in alone.spans if start <= at < stop}
    stash, kept = alone.between
    for b in kept:
        held[0, b] = held.get((0, b), 0) + chunks - 1
    if alone.body <= at < alone.stop:
        for b in stash:
            held[0, b] = held.get((0, b), 0) + copies - 1
    return _memory([alone], held, 0, at, profile)


def device_memory(
    program: PipelineProgram, alone: Sequence[StageMemory], place: int
) -> DeviceMemory:
    """The memory of the devices at `place`."""
    own = program.stages_at(place)
    kept = sum(alone[s].kept_bytes for s in own)
    most: dict[tuple[int, str], tuple[int, dict[int, int]]] = {}
    for counts, task in waiting(program.table[place]):
        stash = sum(n * alone[s].stash_bytes for s, n in counts.items())
        key = (task.stage, task.phase)
        if key not in most or stash > most[key][0]:
            most[key] = stash, dict(counts)
    profiles = {}
    for s in own:
        others = kept - alone[s].kept_bytes
        ahead, behind = (most[s, phase][0] + others for phase in (FORWARD, BACKWARD))
        profiles[s] = alone[s].with_others(ahead, behind - alone[s].stash_bytes, others)
    stage = max(own, key=lambda s: int(profiles[s].max()))
    at = int(profiles[stage].argmax())
    held = _held(alone, own, stage, at, most)
    return DeviceMemory(
        _memory(alone, held, stage, at, profiles[stage]),
        {s: tuple(p.tolist()) for s, p in profiles.items()},
    )


def _held(
    alone: Sequence[StageMemory], own: Sequence[int], stage: int, at: int,
    most: Mapping[tuple[int, str], tuple[int, dict[int, int]]],
) -> dict[tuple[int, int], int]:  # fmt: skip
    """(stage, buffer) → copies in use while `stage` is at step `at`."""
    here = alone[stage]
    held = {(stage, b): 1 for b, start, stop in here.spans if start <= at < stop}
    for s in own:
        if s != stage:
            held.update(((s, b), 1) for b in alone[s].between[1])
    if not here.body <= at < here.stop:
        return held
    counts = dict(most[stage, FORWARD if at < here.split else BACKWARD][1])
    counts[stage] = counts.get(stage, 0) - (at >= here.split)  # its own is among the spans
    for s, n in counts.items():
        for b in alone[s].between[0]:
            held[s, b] = held.get((s, b), 0) + n
    return held


def _memory(
    alone: Sequence[StageMemory], held: Mapping[tuple[int, int], int], stage: int, at: int,
    profile: NDArray[np.int64],
) -> Memory:  # fmt: skip
    parts = dict.fromkeys(CATEGORIES, 0)
    largest = []
    for (s, b), n in held.items():
        buffer = alone[s].stage.buffer(b)
        parts[buffer.category] += n * buffer.bytes
        if n:
            largest.append((buffer.tensor, buffer.category, n * buffer.bytes))
    name = f"stage {stage}: {alone[stage].names[at]}"
    largest.sort(key=lambda entry: -entry[2])
    return Memory(int(profile[at]), parts, name, tuple(profile.tolist()), tuple(largest))
