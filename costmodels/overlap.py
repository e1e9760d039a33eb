"""How far an asynchronous collective may move away from its place, and what memory that takes.

A gather may be issued in an earlier step than the one that reads it (prefetch), a reduction may
end in a later step than the one that made its operand (drain). What only converts a gather's
operand or a reduction's result, as a cast does, moves along, as it does in compilers' schedules.
Buffers then live longer than the memory reading of the plain schedule says. So a window is
opened step by step, nearest first, only as long as

* the operand exists, or the result is not yet read;
* there is something to hide: the window's computation is still shorter than its traffic;
* the window stays in its region (see `layout`): compilers schedule each computation by itself.
  A window in the body of an innermost loop may cross the back edge, by one iteration at most;
* every step it crosses has room: what is live there, the windows opened before, and the
  buffers of this one stay within the limit.

The limit is the peak of the plain schedule unless a larger one is given, so with the default
`read_memory(program)` stays the truth; with a larger one, `read_memory(program, overlap.held)`
is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from costmodels.layout import ASYNC, COMPUTE, Item, Layout, Region, lay_out
from costmodels.memory import Span, lifetimes, usage
from costmodels.program import Compute, LoopStep, Program
from meshes import LogicalMesh


@dataclass(frozen=True)
class Window:
    """The collective may start when step `issue` starts and must be over when step `deadline`
    ends. Before its region's start or beyond its end they mean the previous or next iteration.
    `before` and `after`: the instruction that moves to either end with it, if one does."""

    issue: int
    deadline: int
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True)
class Overlap:
    """Windows by instruction number, and the extra lifetimes (buffer, first step, stop) they
    take."""

    windows: Mapping[int, Window] = field(default_factory=dict)
    held: tuple[Span, ...] = ()


def plan_overlap(
    program: Program, mesh: LogicalMesh, limit_bytes: float | None = None
) -> Overlap:
    """Windows of every asynchronous collective, within `limit_bytes` or the plain peak."""
    return open_windows(program, lay_out(program, mesh), limit_bytes)


def open_windows(program: Program, layout: Layout, limit_bytes: float | None = None) -> Overlap:
    """plan_overlap for a program that is laid out already."""
    if not layout.asynchronous:
        return Overlap()
    return _Windows(program, layout, limit_bytes).overlap()


class _Windows:
    def __init__(self, program: Program, layout: Layout, limit_bytes: float | None) -> None:
        self.layout = layout
        self.buffers = program.buffers
        self.life = lifetimes(program)
        self.spans = {b: (start, stop) for b, start, stop in self.life.spans}
        self.used: list[int] = usage(program, self.life.spans, len(self.life.names)).tolist()
        self.limit = max([*self.used, limit_bytes or 0])
        self.makers = {b: i for items in layout.steps for i in items for b in i.outs}
        self.readers = _readers(layout)
        self.carried = _carried(program)
        self.compute = [sum(i.units for i in s if i.kind != ASYNC) for s in layout.steps]
        self.network = [sum(i.units for i in s if i.kind == ASYNC) for s in layout.steps]
        self.found: dict[int, Window] = {}
        self.held: list[Span] = []

    def overlap(self) -> Overlap:
        regions = {t: r for r in self.layout.regions for t in range(r.start, r.stop)}
        for item in self.layout.asynchronous:
            self.found[item.index] = self._window(item, regions[item.step])
        return Overlap(self.found, tuple(self.held))

    def _window(self, item: Item, region: Region) -> Window:
        before = self._converter_before(item, region)
        after = self._converter_after(item, region)
        issue = self._issue(item, before, region)
        deadline = self._deadline(item, after, region)
        return Window(
            issue, deadline,
            before.index if before and issue < before.step else None,
            after.index if after and item.step < deadline >= after.step else None,
        )  # fmt: skip

    # ---- what moves along ---------------------------------------------------------------------

    def _converter_before(self, item: Item, region: Region) -> Item | None:
        """What makes the operand, for this collective alone, from something at hand."""
        maker = self.makers.get(item.ins[0])
        if maker is None or not _converts(maker) or len(self.readers[item.ins[0]]) > 1:
            return None
        origin = self.makers.get(maker.ins[0])
        waits = origin is not None and origin.kind == ASYNC
        return maker if maker.step in region and not waits else None

    def _converter_after(self, item: Item, region: Region) -> Item | None:
        """The only reader of the result, if nothing in the region waits for what it makes."""
        readers = self.readers.get(item.outs[0], [])
        if len(readers) != 1 or not _converts(readers[0]) or readers[0].step not in region:
            return None
        onward = self.readers.get(readers[0].outs[0], ())
        return None if any(r.step in region for r in onward) else readers[0]

    # ---- earlier ------------------------------------------------------------------------------

    def _issue(self, item: Item, before: Item | None, region: Region) -> int:
        """Walks back while there is something to hide, an operand and room."""
        t = item.step
        made = [*item.outs, *(before.outs if before else ())]
        first = self._available(item.ins, region, 0)
        if before is not None:
            first = min(first, self._available(before.ins, region, 1))
        if self.carried.intersection(made):
            return t
        work, traffic = 0, self.network[t]
        while t > first and work < traffic:
            step = self._within(t - 1, region)
            if not self._reserve(made, step, t - 1, region):
                break
            t -= 1
            work += self.compute[step]
            traffic += self.network[step]
        return t

    def _available(self, sources: Iterable[int], region: Region, behind: int) -> int:
        """The first step that all `sources` are there for: a collective waits for what is made
        in the step that issues it, a kernel starts at the step's start, one step `behind`."""
        first = region.start - region.length + 1 if region.cyclic else region.start
        for source in sources:
            maker = self.makers.get(source)
            if maker is not None and maker.step in region:
                window = self.found.get(maker.index)
                first = max(first, maker.step + behind if window is None else window.issue)
            elif source in self.carried:
                first = max(first, region.start)
        return first

    # ---- later --------------------------------------------------------------------------------

    def _deadline(self, item: Item, after: Item | None, region: Region) -> int:
        """Walks on while there is something to hide, no reader and room."""
        t = item.step
        made = [*item.outs, *(after.outs if after else ())]
        stop = region.stop - 1
        if region.cyclic and not self.carried.intersection(made):
            stop = item.step + region.length - 1
        for reader in self.readers.get(made[-1], ()):
            stop = min(stop, reader.step - 1)
        work, traffic = 0, self.network[t]
        while t < stop and work < traffic:
            step = self._within(t + 1, region)
            if not self._reserve([item.ins[0], *made], step, t + 1, region):
                break
            t += 1
            work += self.compute[step]
            traffic += self.network[step]
        return t

    # ---- memory -------------------------------------------------------------------------------

    def _within(self, step: int, region: Region) -> int:
        return region.start + (step - region.start) % region.length

    def _lives(self, buffer: int, step: int, reached: int, region: Region) -> bool:
        """Whether the plain schedule keeps this iteration's `buffer` through `step`, which is
        `reached` counted on beyond the edges of the region."""
        span = self.spans.get(self.life.root(buffer))
        if span is None or not span[0] <= step < span[1]:
            return False
        return reached == step or span[0] < region.start

    def _reserve(self, buffers: Sequence[int], step: int, reached: int, region: Region) -> bool:
        """Keeps `buffers` through `step`, if there is room for those that do not live there."""
        extra = [b for b in buffers if not self._lives(b, step, reached, region)]
        size = sum(self.buffers[b].bytes for b in extra)
        if self.used[step] + size > self.limit:
            return False
        self.used[step] += size
        self.held += [(b, step, step + 1) for b in extra]
        return True


def _converts(item: Item) -> bool:
    """Whether an instruction only passes over one array, so that moving it changes little."""
    what = item.instruction
    return (
        item.kind == COMPUTE
        and isinstance(what, Compute)
        and what.kernel.matmul is None
        and len(item.ins) == len(item.outs) == 1
    )


def _readers(layout: Layout) -> dict[int, list[Item]]:
    """All readers of every buffer, in program order."""
    found: dict[int, list[Item]] = {}
    for items in layout.steps:
        for item in items:
            for b in item.ins:
                found.setdefault(b, []).append(item)
    return found


def _carried(program: Program) -> set[int]:
    """Buffers that an iteration takes from the previous one or gives to the next."""
    found: set[int] = set()
    queue = list(program.block)
    while queue:
        step = queue.pop()
        if isinstance(step, LoopStep):
            found |= {b for k in step.carries for b in (k.entry, k.exit)}
            queue += step.body
    return found
