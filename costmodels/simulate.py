"""Seconds: event simulation of one Program on one device with two streams.

*Compute* runs kernels in program order. *Network* runs collectives one at a time. A collective
of a kind that the chip overlaps (`chip.overlap`) takes only the network stream: it starts when
its window is open (see `overlap`), its operand is ready and the network is free, the earliest in
program order first. Any other collective blocks: it takes both streams. Whoever reads a result
waits for it.

A loop is simulated iteration by iteration until a state repeats, then whole periods are skipped;
the last iteration is always simulated, because nothing is fetched for a next one. Time is counted
in whole femtoseconds, so states compare exactly. Nothing is in flight at the edges of a loop.

    step_time_s = compute_s + exposed_communication_s + bubble_s

Where a framework issues op by op, `chip.dispatch_s` is the time the host takes for each: nothing
starts before it is issued, and the host runs ahead by at most QUEUE instructions.

compute_s is the time in which the compute stream works or waits for the host,
exposed_communication_s the time in which it waits for the network. Only pipelines have bubbles
(see `pipeline_time`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from costmodels.layout import (
    ASYNC,
    BLOCKING,
    COMPUTE,
    UNITS_PER_S,
    Item,
    Layout,
    LoopRun,
    Region,
    lay_out,
)
from costmodels.overlap import Overlap, Window, open_windows
from costmodels.pricing import is_network, prices
from costmodels.program import Collective, LoopStep, Program
from meshes import LogicalMesh

_NEVER = 2**200  # later than any time
# CUDA streams queue about a thousand launches; what matters is that a stretch of small kernels is
# bound by the host and one of large kernels is not: more than one layer, to level out within it.
QUEUE = 256


@dataclass(frozen=True)
class Event:
    """Something that ran. `stream`: "compute" or "network"; iterations that repeat are one
    event of kind "repeat" on stream "compute". `tensor`: what a collective moves."""

    name: str
    stream: str
    start_s: float
    duration_s: float
    phase: str
    kind: str
    tensor: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds of one step; the three terms sum to `step_time_s`. `loops`: the parts of them that
    the outermost loops took, by name."""

    step_time_s: float
    compute_s: float
    exposed_communication_s: float
    bubble_s: float = 0.0
    events: tuple[Event, ...] = ()
    loops: Mapping[str, Timing] = field(default_factory=dict)


def simulate(
    program: Program,
    mesh: LogicalMesh,
    *,
    trace: bool = False,
    serial: bool = False,
    overlap: Overlap | None = None,
) -> Timing:
    """Time of one step on a representative device.

    `serial`: everything one after the other, the surrogate that the ILP minimises. `overlap`:
    windows from `plan_overlap`; without, those that the plain peak memory has room for. Raises
    ValueError if an instruction reads what nothing has made.
    """
    if serial:
        return _serial(program, mesh)
    layout = lay_out(program, mesh)
    windows = open_windows(program, layout) if overlap is None else overlap
    return _Simulation(program, layout, windows, trace, mesh.chip.dispatch_s).run()


def _serial(program: Program, mesh: LogicalMesh) -> Timing:
    table = prices(mesh)
    compute = network = 0.0
    for instruction, times in program.instructions():
        seconds = table.seconds(instruction) * times
        if is_network(instruction):
            network += seconds
        else:
            compute += seconds
    return Timing(compute + network, compute, network)


@dataclass
class _Scope:
    """Buffers of one execution of a block: when each is ready, and who waits for one."""

    parent: _Scope | None
    serial: int
    ready: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, list[tuple[Item, int]]] = field(default_factory=dict)


_Pending = tuple[int, int, int, Item, _Scope]


@dataclass
class _Points:
    """What moved to the boundary before a step: collectives that end (their result is waited
    for) or start, and kernels that move with them; of this iteration, and across the back edge
    of the previous (`late`) and the next one (`early`)."""

    end: list[Item] = field(default_factory=list)
    late: list[Item] = field(default_factory=list)
    start: list[Item] = field(default_factory=list)
    early: list[Item] = field(default_factory=list)


class _Simulation:
    def __init__(
        self, program: Program, layout: Layout, overlap: Overlap, trace: bool, dispatch_s: float
    ) -> None:
        self.program = program
        self.layout = layout
        self.dispatch = round(dispatch_s * UNITS_PER_S)
        self.host = 0  # when the last instruction was issued
        self.compute = 0
        self.network = 0
        self.busy = 0
        self.skipped = 0
        self.scopes = 0
        self.future: list[_Pending] = []  # by time
        self.eligible: list[tuple[int, int, Item, _Scope]] = []  # ready now, by program order
        self.trace = trace
        self.events: list[Event] = []
        self.loops: dict[str, Timing] = {}
        self.points = _points(layout, overlap)
        windows = overlap.windows.values()
        self.moved = {i for w in windows for i in (w.before, w.after) if i is not None}

    def run(self) -> Timing:
        scope = self._scope(None)
        for buffer in self.program.inputs.values():
            scope.ready[buffer] = 0
        self._parts(self.layout.parts, scope, None, None)
        return replace(self._since(0, 0), events=tuple(self.events), loops=self.loops)

    def _since(self, start: int, busy: int) -> Timing:
        """From `start` until now; `busy`: how long the compute stream had worked by then."""
        compute_s = (self.busy - busy) / UNITS_PER_S
        exposed_s = (self.compute + self.skipped - start - (self.busy - busy)) / UNITS_PER_S
        return Timing(compute_s + exposed_s, compute_s, exposed_s)

    def _scope(self, parent: _Scope | None) -> _Scope:
        self.scopes += 1
        return _Scope(parent, self.scopes)

    # ---- blocks -----------------------------------------------------------------------------

    def _parts(
        self, parts: Sequence[Region | LoopRun], scope: _Scope, before: _Scope | None,
        after: _Scope | None,
    ) -> None:  # fmt: skip
        for part in parts:
            if isinstance(part, LoopRun):
                start, busy = self.compute + self.skipped, self.busy
                self._loop(part, scope)
                if scope.parent is None:
                    self.loops[part.loop.name] = self._since(start, busy)
            else:
                self._region(part, scope, before, after)

    def _region(
        self, region: Region, scope: _Scope, before: _Scope | None, after: _Scope | None
    ) -> None:
        for t in range(region.start, region.stop):
            points = self.points.get(t)
            if points is not None:
                self._boundary(points, scope, before, after)
            for item in self.layout.steps[t]:
                if item.kind != ASYNC and item.index not in self.moved:
                    self._execute(item, scope)
        closing = self.points.get(-region.stop)
        if closing is not None:
            self._end(closing.end, scope)

    def _boundary(
        self, points: _Points, scope: _Scope, before: _Scope | None, after: _Scope | None
    ) -> None:
        self._end(points.end, scope)
        if before is not None:
            self._end(points.late, before)
        self._start(points.start, scope)
        if after is not None:
            self._start(points.early, after)

    def _end(self, items: Sequence[Item], scope: _Scope) -> None:
        for item in items:
            if item.kind == ASYNC:
                self.compute = max(self.compute, self._ready(item.outs[0], scope))
            else:
                self._execute(item, scope)

    def _start(self, items: Sequence[Item], scope: _Scope) -> None:
        for item in items:
            if item.kind == ASYNC:
                self._issue(item, scope)
            else:
                self._execute(item, scope)

    # ---- loops ------------------------------------------------------------------------------

    def _loop(self, run: LoopRun, outer: _Scope) -> None:
        loop = run.loop
        carried = [self._ready(k.init, outer) for k in loop.carries]
        before: _Scope | None = None
        scope = self._iteration(loop, outer)
        early, late = self._crossing(run)
        self._start(early, scope)
        seen: dict[object, tuple[int, int, int]] = {}
        done = 0
        while done < loop.times:
            scope.ready.update(zip((k.entry for k in loop.carries), carried, strict=True))
            done += self._skip(loop, done, self._state(scope, before, late), seen)
            after = self._iteration(loop, outer) if done + 1 < loop.times else None
            self._parts(run.parts, scope, before, after)
            carried = [self._ready(k.exit, scope) for k in loop.carries]
            done += 1
            if after is None:
                self._end(late, scope)
            else:
                before, scope = scope, after
        outer.ready.update(zip((k.result for k in loop.carries), carried, strict=True))
        outer.ready.update((stack.outer, self.compute) for stack in loop.writes)

    def _iteration(self, loop: LoopStep, outer: _Scope) -> _Scope:
        scope = self._scope(outer)
        for stack in loop.reads:
            scope.ready[stack.inner] = self._ready(stack.outer, outer)
        return scope

    def _crossing(self, run: LoopRun) -> tuple[list[Item], list[Item]]:
        """What starts an iteration early and what ends an iteration late."""
        early: list[Item] = []
        late: list[Item] = []
        for part in run.parts:
            if isinstance(part, Region):
                found = [self.points.get(t) for t in range(part.start, part.stop)]
                early += [item for p in found if p for item in p.early]
                late += [item for p in found if p for item in p.late]
        return sorted(early, key=lambda item: item.index), late

    def _state(self, scope: _Scope, before: _Scope | None, late: Sequence[Item]) -> object:
        """Everything that the iterations to come depend on, relative to now."""
        now = self.compute
        self._advance(now)

        def ahead(time: int) -> int:
            return max(time - now, 0)

        pending = [(ahead(p[0]), p[1] - scope.serial, p[2]) for p in self.future]
        pending += [(0, p[0] - scope.serial, p[1]) for p in self.eligible]
        known = sorted((b, ahead(time)) for b, time in scope.ready.items())
        old = [] if before is None else [before.ready.get(item.outs[0], _NEVER) for item in late]
        waiting = [
            (i, b, item.index)
            for i, s in enumerate((scope, before))
            if s is not None
            for b, items in s.waiting.items()
            for item, _ in items
        ]
        unfinished = tuple(time if time == _NEVER else ahead(time) for time in old)
        behind = min(now - self.host, QUEUE * self.dispatch)
        return (
            behind, ahead(self.network), before is None, tuple(sorted(pending)), tuple(known),
            unfinished, tuple(sorted(waiting)),
        )  # fmt: skip

    def _skip(
        self, loop: LoopStep, done: int, state: object, seen: dict[object, tuple[int, int, int]]
    ) -> int:
        """Iterations that repeat what was simulated since `state` was seen; all but the last."""
        now, left = self.compute + self.skipped, loop.times - 1 - done
        if state not in seen:
            seen[state] = (done, now, self.busy)
            return 0
        then, start, busy = seen[state]
        periods = left // (done - then)
        if periods <= 0:
            return 0
        duration = periods * (now - start)
        count = periods * (done - then)
        self._record(f"{loop.name}: {count} more", "compute", self.compute, duration, "", "repeat")
        self.busy += periods * (self.busy - busy)
        self.skipped += duration
        seen.clear()
        return count

    # ---- instructions -----------------------------------------------------------------------

    def _execute(self, item: Item, scope: _Scope) -> None:
        if item.kind == COMPUTE:
            start = self.compute
            for buffer in item.ins:
                start = max(start, self._ready(buffer, scope))
            issued = self._issued(item)
            self.busy += item.units + max(0, issued - start)
            start = max(start, issued)
            self.compute = start + item.units
            if self.trace:
                self._record_item(item, "compute", start)
            self._made(item, self.compute, scope)
        elif item.kind == BLOCKING:
            self._block(item, scope)
        else:
            self._issue(item, scope)  # a local slice: ready as soon as its operand is

    def _block(self, item: Item, scope: _Scope) -> None:
        arrival = max(self.compute, self._ready(item.ins[0], scope))
        issued = self._issued(item)
        self.busy += max(0, issued - arrival)
        arrival = max(arrival, issued)
        self._advance(arrival)
        start = max(arrival, self.network)
        self.compute = self.network = start + item.units
        if self.trace:
            self._record_item(item, "network", start)
        self._made(item, self.compute, scope)

    def _issue(self, item: Item, scope: _Scope) -> None:
        """From now on `item` may start, once its operand is ready."""
        source = item.ins[0]
        issued = max(self.compute, self._issued(item))
        time = self._known(source, scope)
        if time is None:
            scope.waiting.setdefault(source, []).append((item, issued))
        else:
            self._arrive(item, time, issued, scope)

    def _issued(self, item: Item) -> int:
        """When the host has issued `item`: instructions that cost nothing are never issued."""
        if self.dispatch and item.units:
            self.host = max(self.host, self.compute - QUEUE * self.dispatch) + self.dispatch
        return self.host

    def _arrive(self, item: Item, ready: int, issued: int, scope: _Scope) -> None:
        if item.kind == ASYNC:
            heappush(self.future, (max(ready, issued), scope.serial, item.index, item, scope))
        else:
            self._made(item, ready, scope)

    def _made(self, item: Item, time: int, scope: _Scope) -> None:
        for buffer in item.outs:
            scope.ready[buffer] = time
            for waiter, issued in scope.waiting.pop(buffer, ()):
                self._arrive(waiter, time, issued, scope)

    # ---- network ----------------------------------------------------------------------------

    def _advance(self, until: int) -> None:
        """Starts every collective that starts before `until`."""
        while self._start_next(until):
            pass

    def _start_next(self, until: int) -> bool:
        """Starts the next collective if that is before `until`."""
        start = self.network
        if not self.eligible:
            if not self.future:
                return False
            start = max(start, self.future[0][0])
        if start >= until:
            return False
        while self.future and self.future[0][0] <= start:
            _, serial, index, item, scope = heappop(self.future)
            heappush(self.eligible, (serial, index, item, scope))
        _, _, item, scope = heappop(self.eligible)
        self.network = start + item.units
        if self.trace:
            self._record_item(item, "network", start)
        self._made(item, self.network, scope)
        return True

    def _known(self, buffer: int, scope: _Scope) -> int | None:
        here: _Scope | None = scope
        while here is not None:
            time = here.ready.get(buffer)
            if time is not None:
                return time
            here = here.parent
        return None

    def _ready(self, buffer: int, scope: _Scope) -> int:
        """When `buffer` is ready; runs the network until that is known."""
        time = self._known(buffer, scope)
        while time is None:
            if not self._start_next(_NEVER):
                tensor = self.program.buffers[buffer].tensor
                raise ValueError(f"buffer {buffer} ({tensor}) is read before anything makes it")
            time = self._known(buffer, scope)
        return time

    # ---- trace ------------------------------------------------------------------------------

    def _record_item(self, item: Item, stream: str, start: int) -> None:
        what = item.instruction
        tensor = ""
        if isinstance(what, Collective):
            name, kind, tensor = f"{what.kind} {what.tensor}", what.kind, what.tensor
        else:
            name, kind = what.kernel.name, what.kernel.kind
        self._record(name, stream, start, item.units, what.phase, kind, tensor)

    def _record(
        self, name: str, stream: str, start: int, units: int, phase: str, kind: str,
        tensor: str = "",
    ) -> None:  # fmt: skip
        if self.trace:
            at = (start + self.skipped) / UNITS_PER_S
            self.events.append(Event(name, stream, at, units / UNITS_PER_S, phase, kind, tensor))


def _points(layout: Layout, overlap: Overlap) -> dict[int, _Points]:
    """What moved to the boundary before each step; under -stop, to the end of a region."""
    points: dict[int, _Points] = {}

    def at(step: int) -> _Points:
        return points.setdefault(step, _Points())

    regions = {t: r for r in layout.regions for t in range(r.start, r.stop)}
    for item in layout.asynchronous:
        window = overlap.windows.get(item.index, Window(item.step, item.step))
        region = regions[item.step]
        before = [] if window.before is None else [layout.items[window.before]]
        after = [] if window.after is None else [layout.items[window.after]]
        if window.issue >= region.start:
            at(window.issue).start += [*before, item]
        else:
            at(window.issue + region.length).early += [*before, item]
        over = window.deadline + 1
        if over < region.stop:
            at(over).end += [item, *after]
        elif over == region.stop:
            at(-over).end += [item, *after]
        else:
            at(over - region.length).late += [item, *after]
    return points
