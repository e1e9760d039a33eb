"""A Program laid out for scheduling: numbered steps, priced instructions, and regions.

Steps are numbered as `memory` numbers them: every Step once, a loop's `enter` before its body.
A *region* is a run of steps without a loop between them, the stretch in which a collective may
move; the body of an innermost loop is a region that closes on itself. Only structure and prices
live here; what overlaps is decided in `overlap`, when it runs in `simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from costmodels.pricing import Prices, prices
from costmodels.program import MOVES, Block, Compute, Instruction, LoopStep, Program, Step
from meshes import LogicalMesh

#: Time is counted in whole femtoseconds, so that equal states of a loop compare equal.
UNITS_PER_S = 10**15

COMPUTE, BLOCKING, ASYNC, FREE = range(4)


@dataclass(slots=True)
class Item:
    """An instruction at its place: `index` in program order, `step` it belongs to."""

    index: int
    step: int
    kind: int  # COMPUTE | BLOCKING | ASYNC | FREE
    units: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    instruction: Instruction


@dataclass(frozen=True)
class Region:
    """Steps [start, stop). `cyclic`: the body of an innermost loop, whose last step is followed
    by the first of the next iteration."""

    start: int
    stop: int
    cyclic: bool

    @property
    def length(self) -> int:
        return self.stop - self.start

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop


@dataclass(frozen=True)
class LoopRun:
    """A loop, its number of executions and what its body consists of."""

    loop: LoopStep
    parts: tuple[Region | LoopRun, ...]


Parts = tuple[Region | LoopRun, ...]


@dataclass
class Layout:
    """`steps[t]`: the items of step t. `parts`: the outermost block as regions and loops.
    `items`: all, by number."""

    steps: list[list[Item]] = field(default_factory=list)
    parts: Parts = ()
    items: list[Item] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)

    @property
    def asynchronous(self) -> list[Item]:
        return [item for item in self.items if item.kind == ASYNC]


def lay_out(program: Program, mesh: LogicalMesh) -> Layout:
    """Numbers and prices every instruction of `program` once."""
    builder = _Builder(prices(mesh), mesh.chip.overlap)
    builder.layout.parts = builder.block(program.block, inside=False)
    return builder.layout


@dataclass
class _Builder:
    prices: Prices
    overlap: frozenset[str]
    layout: Layout = field(default_factory=Layout)

    def block(self, block: Block, *, inside: bool) -> Parts:
        """`inside`: the block is a loop's body."""
        parts: list[Region | LoopRun] = []
        start = len(self.layout.steps)
        innermost = inside and all(isinstance(step, Step) for step in block)
        for step in block:
            if isinstance(step, Step):
                self.step(step)
                continue
            self.step(step.enter)
            self._close(parts, start, cyclic=False)
            parts.append(LoopRun(step, self.block(step.body, inside=True)))
            start = len(self.layout.steps)
        self._close(parts, start, cyclic=innermost)
        return tuple(parts)

    def _close(self, parts: list[Region | LoopRun], start: int, *, cyclic: bool) -> None:
        region = Region(start, len(self.layout.steps), cyclic)
        if region.length:
            parts.append(region)
            self.layout.regions.append(region)

    def step(self, step: Step) -> None:
        number = len(self.layout.steps)
        items = [self._item(instruction, number) for instruction in step.instructions]
        self.layout.steps.append(items)

    def _item(self, instruction: Instruction, step: int) -> Item:
        units = round(self.prices.seconds(instruction) * UNITS_PER_S)
        kind = self._kind(instruction)
        number = len(self.layout.items)
        item = Item(number, step, kind, units, instruction.ins, instruction.outs, instruction)
        self.layout.items.append(item)
        return item

    def _kind(self, instruction: Instruction) -> int:
        if isinstance(instruction, Compute):
            return COMPUTE
        if instruction.kind not in MOVES:
            return FREE
        return ASYNC if instruction.kind in self.overlap else BLOCKING
