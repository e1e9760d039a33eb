"""How far an asynchronous collective may move away from its place, and what memory that takes.

A gather may be issued in an earlier step than the one that reads it (prefetch), a reduction may
end in a later step than the one that made its operand (drain). Either way a buffer lives longer
than the memory reading of the plain schedule says. So a window is opened step by step, nearest
first, only as long as

* the operand exists, or the result is not yet read;
* there is something to hide: the window's computation is still shorter than its traffic;
* the window stays in its region (see `layout`): compilers schedule each computation by itself.
  A window in the body of an innermost loop may cross the back edge, by one iteration at most;
* every step it crosses has room: what is live there, the windows opened before, and this
  buffer stay within the limit.

The limit is the peak of the plain schedule unless a larger one is given, so with the default
`read_memory(program)` stays the truth; with a larger one, `read_memory(program, overlap.held)`
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from costmodels.layout import ASYNC, Item, Layout, Region, lay_out
from costmodels.memory import Span, lifetimes, usage
from costmodels.program import LoopStep, Program
from meshes import LogicalMesh


@dataclass(frozen=True)
class Window:
    """The collective may start when step `issue` starts and must be over when step `deadline`
    ends. Before its region's start or beyond its end they mean the previous or next iteration."""

    issue: int
    deadline: int


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
        self.readers = _first_readers(layout)
        self.carried = _carried(program)
        self.compute = [sum(i.units for i in s if i.kind != ASYNC) for s in layout.steps]
        self.network = [sum(i.units for i in s if i.kind == ASYNC) for s in layout.steps]
        self.found: dict[int, Window] = {}
        self.held: list[Span] = []

    def overlap(self) -> Overlap:
        regions = {t: r for r in self.layout.regions for t in range(r.start, r.stop)}
        for item in self.layout.asynchronous:
            region = regions[item.step]
            issue = self._issue(item, region)
            self.found[item.index] = Window(issue, self._deadline(item, region))
        return Overlap(self.found, tuple(self.held))

    def _issue(self, item: Item, region: Region) -> int:
        """Walks back while there is something to hide, an operand and room."""
        t = item.step
        source, result = item.ins[0], item.outs[0]
        if result in self.carried:
            return t
        first = self._available(source, region)
        work, traffic = 0, self.network[t]
        while t > first and work < traffic:
            step = self._within(t - 1, region)
            if not self._reserve((result,), step):
                break
            t -= 1
            work += self.compute[step]
            traffic += self.network[step]
        return t

    def _available(self, source: int, region: Region) -> int:
        """The first step in which `source` can be read."""
        maker = self.makers.get(source)
        if maker is not None and region.start <= maker.step < region.stop:
            window = self.found.get(maker.index)
            return maker.step if window is None else window.issue
        if source in self.carried or not region.cyclic:
            return region.start
        return region.start - region.length + 1

    def _deadline(self, item: Item, region: Region) -> int:
        """Walks on while there is something to hide, no reader and room."""
        t = item.step
        source, result = item.ins[0], item.outs[0]
        stop = region.stop - 1
        if region.cyclic and result not in self.carried:
            stop = item.step + region.length - 1
        if result in self.readers:
            stop = min(stop, self.readers[result] - 1)
        work, traffic = 0, self.network[t]
        while t < stop and work < traffic:
            step = self._within(t + 1, region)
            dead = [b for b in (source, result) if not self._lives(b, step, t + 1, region)]
            if not self._reserve(dead, step):
                break
            t += 1
            work += self.compute[step]
            traffic += self.network[step]
        return t

    def _within(self, step: int, region: Region) -> int:
        return region.start + (step - region.start) % region.length

    def _lives(self, buffer: int, step: int, reached: int, region: Region) -> bool:
        """Whether the plain schedule keeps this iteration's `buffer` through `step`, which is
        `reached` counted on beyond the end of the region."""
        span = self.spans.get(self.life.root(buffer))
        if span is None or not span[0] <= step < span[1]:
            return False
        return reached == step or span[0] < region.start

    def _reserve(self, buffers: Sequence[int], step: int) -> bool:
        size = sum(self.buffers[b].bytes for b in buffers)
        if self.used[step] + size > self.limit:
            return False
        self.used[step] += size
        self.held += [(b, step, step + 1) for b in buffers]
        return True


def _first_readers(layout: Layout) -> dict[int, int]:
    """The step of the first reader of every buffer."""
    found: dict[int, int] = {}
    for t, items in enumerate(layout.steps):
        for item in items:
            for b in item.ins:
                found.setdefault(b, t)
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
