"""Bytes: peak liveness of a Program on one device.

All buffers of a step coexist. A buffer lives from the step that makes it to the last that reads
it; inputs live all the time (donated ones are taken over by the outputs that alias them). What
a loop saves or reads as a stack lives as long as the loop needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from costmodels.program import CATEGORIES, Block, LoopStep, Program, Step


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one device, their parts (by category, at the peak), and where it is."""

    peak_bytes: int
    parts: dict[str, int]
    step: str
    profile: tuple[int, ...]
    largest: tuple[tuple[str, str, int], ...]  # (tensor, category, bytes) at the peak


def read_memory(program: Program) -> Memory:
    """Peak and profile over the flattened schedule; raises ValueError on a malformed program."""
    reading = _Liveness(program)
    spans = reading.spans()
    profile = [0] * reading.steps
    for buffer, start, stop in spans:
        size = program.buffers[buffer].bytes
        for t in range(start, stop):
            profile[t] += size
    peak = max(range(len(profile)), key=profile.__getitem__) if profile else 0
    live = [program.buffers[b] for b, start, stop in spans if start <= peak < stop]
    parts = dict.fromkeys(CATEGORIES, 0)
    for buffer in live:
        parts[buffer.category] += buffer.bytes
    largest = sorted(((b.tensor, b.category, b.bytes) for b in live), key=lambda x: -x[2])
    return Memory(
        profile[peak] if profile else 0, parts, reading.names[peak] if profile else "",
        tuple(profile), tuple(largest),
    )  # fmt: skip


@dataclass
class _Liveness:
    program: Program
    steps: int = 0
    names: list[str] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)  # exclusive

    def spans(self) -> list[tuple[int, int, int]]:
        """(buffer, start, stop) of everything that takes memory."""
        self.block(self.program.block)
        for b in self.program.inputs.values():
            self.first[b], self.last[b] = 0, self.steps
        for b in self.program.outputs.values():
            self.last[b] = self.steps
        self._merge_aliases()
        return [
            (b, start, min(self.last.get(b, start + 1), self.steps))
            for b, start in self.first.items()
            if self.program.buffers[b].alias is None
        ]

    def _merge_aliases(self) -> None:
        """A view or a donated result keeps what it aliases alive."""
        for b, stop in list(self.last.items()):
            root = self.program.buffers[b].alias
            if root is not None and root in self.last:
                self.last[root] = max(self.last[root], stop)

    def touch(self, buffers: Iterable[int], t: int) -> None:
        for b in buffers:
            self.first.setdefault(b, t)
            self.last[b] = max(self.last.get(b, 0), t + 1)

    def block(self, block: Block) -> None:
        for step in block:
            if isinstance(step, Step):
                self.step(step)
            else:
                self.loop(step)

    def step(self, step: Step) -> None:
        t = self.steps
        self.steps += 1
        self.names.append(step.name)
        for instruction in step.instructions:
            self.touch(instruction.ins, t)
            self.touch(instruction.outs, t)

    def loop(self, loop: LoopStep) -> None:
        enter = self.steps
        self.step(loop.enter)
        self.touch((k.init for k in loop.carries), enter)
        self.touch((s.outer for s in (*loop.reads, *loop.writes)), enter)
        start = self.steps
        before = set(self.first)
        for k in loop.carries:
            self.first[k.entry] = start  # read by whoever; dead after its last reader
        self.block(loop.body)
        stop = self.steps
        for k in loop.carries:
            self.touch((k.exit,), stop - 1)
            self.first.setdefault(k.exit, start)
            if k.entry not in self.last:
                del self.first[k.entry]  # never read: overwritten at once
            self.first[k.result] = stop
        read_inside = {b for b in before if self.last.get(b, 0) > start}
        for b in read_inside | {s.outer for s in loop.reads}:
            self.last[b] = max(self.last[b], stop)
        for s in loop.writes:  # whole until somebody outside can take it over
            self.last[s.outer] = max(self.last[s.outer], stop + 1)
        self._forget_unread_results(loop)

    def _forget_unread_results(self, loop: LoopStep) -> None:
        for k in loop.carries:
            self.last.setdefault(k.result, self.first[k.result])
