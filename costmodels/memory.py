"""Bytes: peak liveness of a Program on one device.

The rules, in steps of the schedule (every Step counts once, a loop's body stands for all its
iterations):

* all buffers of a step coexist: operands, results and what lies between them;
* a buffer lives from the step that makes it through the last that reads it; what a loop body
  reads from outside lives to the loop's end;
* inputs and copies of them live all the time, and so does what an output needs; an output that
  takes over an input's memory (donated state), or a slice of a stack, takes none of its own;
* a stack that a loop writes is allocated when the loop starts and lives through the step after
  it, one that it reads lives to its end;
* a carried value occupies one buffer from the start of an iteration (`entry`, to its last reader),
  a second from where the next value is made (`exit`), and one after the loop (`result`).

Compilers differ from the first rule where an element-wise pass could write over its operand:
the TPU compiler (libtpu 0.0.52, v5e) needs 128 MiB of temporaries for gelu(x w1) w2 whose middle
takes 128 MiB, this reading counts operand and result, 256. A matmul cannot write over its
operand: for ((x w1) c) w2 both count 256. So the reading errs on the safe side, by at most the
results of one step. What it leaves out are a compiler's own copies, padding and fragmentation:
the headroom is for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from costmodels.program import CATEGORIES, Block, Buffer, LoopStep, Program, Step

Span = tuple[int, int, int]  # buffer, first step, stop


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one device, their parts (by category, at the peak), and where it is."""

    peak_bytes: int
    parts: dict[str, int]
    step: str
    profile: tuple[int, ...]
    largest: tuple[tuple[str, str, int], ...]  # (tensor, category, bytes) at the peak


@dataclass(frozen=True)
class Lifetimes:
    """`spans`: everything that takes memory; `names`: of the steps; `roots`: of each alias, the
    buffer whose memory it uses."""

    spans: tuple[Span, ...]
    names: tuple[str, ...]
    roots: dict[int, int]

    def root(self, buffer: int) -> int:
        return self.roots.get(buffer, buffer)


def read_memory(program: Program, held: Sequence[Span] = ()) -> Memory:
    """Peak and profile over the schedule; `held`: lifetimes that overlapping adds (see
    `overlap`). Raises ValueError for a program that aliases in a circle."""
    life = lifetimes(program)
    spans = (*life.spans, *held)
    profile = usage(program, spans, len(life.names))
    if not len(profile):
        return Memory(0, dict.fromkeys(CATEGORIES, 0), "", (), ())
    peak = int(profile.argmax())
    live = [program.buffers[b] for b, start, stop in spans if start <= peak < stop]
    parts = dict.fromkeys(CATEGORIES, 0)
    for buffer in live:
        parts[buffer.category] += buffer.held_bytes
    largest = sorted(((b.tensor, b.category, b.held_bytes) for b in live), key=lambda x: -x[2])
    return Memory(
        int(profile[peak]), parts, life.names[peak], tuple(profile.tolist()), tuple(largest)
    )


def usage(program: Program, spans: Iterable[Span], steps: int) -> NDArray[np.int64]:
    """Bytes in use at every step."""
    rows = [(start, stop, program.buffers[b].held_bytes) for b, start, stop in spans]
    change = np.zeros(steps + 1, dtype=np.int64)
    if rows:
        starts, stops, sizes = np.array(rows, dtype=np.int64).T
        np.add.at(change, starts, sizes)
        np.subtract.at(change, stops, sizes)
    return change[:-1].cumsum()


def lifetimes(program: Program) -> Lifetimes:
    """When every buffer that takes memory lives."""
    return _Liveness(program).lifetimes()


@dataclass
class _Liveness:
    program: Program
    names: list[str] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    stop: dict[int, int] = field(default_factory=dict)

    @property
    def now(self) -> int:
        return len(self.names)

    def lifetimes(self) -> Lifetimes:
        lasting = (*self.program.inputs.values(), *self.program.copies)
        self.first.update((b, 0) for b in lasting)
        self.block(self.program.block)
        end = self.now
        for b in (*lasting, *self.program.outputs.values()):
            self.stop[b] = end
        roots = _roots(self.program)
        for b, root in roots.items():
            if b in self.stop and root in self.first:
                self.stop[root] = max(self.stop.get(root, 0), self.stop[b])
        spans = tuple(
            (b, start, min(self.stop[b], end))
            for b, start in self.first.items()
            if b not in roots and self.stop.get(b, start) > start
        )
        return Lifetimes(spans, tuple(self.names), roots)

    def touch(self, buffers: Iterable[int], t: int) -> None:
        for b in buffers:
            if b not in self.first:
                self.first[b] = t
            if self.stop.get(b, 0) <= t:
                self.stop[b] = t + 1

    def block(self, block: Block) -> None:
        for step in block:
            if isinstance(step, Step):
                self.step(step)
            else:
                self.loop(step)

    def step(self, step: Step) -> None:
        t = self.now
        self.names.append(step.name)
        for instruction in step.instructions:
            if instruction.outs[0] not in self.program.remade:
                self.touch(self.stored(instruction.ins), t)
                self.touch(instruction.outs, t)
                self.touch(self.program.scratch.get(instruction.outs[0], ()), t)

    def stored(self, buffers: Iterable[int]) -> Iterator[int]:
        """The buffers, or what they are made of where they are read."""
        for b in buffers:
            sources = self.program.remade.get(b)
            yield from (b,) if sources is None else self.stored(sources)

    def loop(self, loop: LoopStep) -> None:
        enter = self.now
        self.step(loop.enter)
        stacks = [s.outer for s in (*loop.reads, *loop.writes)]
        self.touch((k.init for k in loop.carries), enter)
        self.touch((*stacks, *loop.narrowed), enter)
        start, outside = self.now, len(self.first)
        self.first.update((k.entry, start) for k in loop.carries)
        self.block(loop.body)
        stop = self.now
        for b in list(self.first)[:outside]:
            if self.stop.get(b, 0) > start:
                self.stop[b] = stop
        for s in loop.reads:
            self.stop[s.outer] = max(self.stop[s.outer], stop)
        for b in loop.narrowed:
            self.stop[b] = max(self.stop[b], stop)
        for s in loop.writes:  # whole until the step after the loop can take it over
            self.stop[s.outer] = max(self.stop[s.outer], stop + 1)
        for k in loop.carries:
            self.first.setdefault(k.exit, start)
            self.stop[k.exit] = stop
            self.first[k.result] = stop  # until somebody reads it


def _roots(program: Program) -> dict[int, int]:
    """Of every alias the buffer at the end of its chain."""
    roots = {}
    for b, buffer in program.buffers.items():
        if buffer.alias is not None:
            roots[b] = _chain_end(program.buffers, b)
    return roots


def _chain_end(buffers: Mapping[int, Buffer], b: int) -> int:
    seen = {b}
    while (onward := buffers[b].alias) is not None:
        if onward in seen:
            raise ValueError(f"buffers alias in a circle: {sorted(seen)}")
        seen.add(onward)
        b = onward
    return b
