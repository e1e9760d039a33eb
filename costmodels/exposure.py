"""How much of each collective's time computation hides, read off a simulated step.

Only that reading belongs here; what planning makes of it is in `planner.weighting`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

from costmodels.program import Program
from costmodels.simulate import Event, simulate
from meshes import LogicalMesh

Moved = tuple[str, str]  # a tensor, and the phase in which it is moved


def exposed_shares(program: Program, mesh: LogicalMesh) -> Mapping[Moved, float]:
    """Of the network's time for a tensor in a phase the share in which nothing is computed, from 0
    (hidden) to 1. Iterations that repeat are like those that were simulated."""
    events = simulate(program, mesh, trace=True).events
    busy = _Busy([e for e in events if e.stream == "compute"])
    total: dict[Moved, float] = defaultdict(float)
    hidden: dict[Moved, float] = defaultdict(float)
    for e in events:
        if e.stream == "network" and e.duration_s > 0:
            total[e.tensor, e.phase] += e.duration_s
            stop_s = e.start_s + e.duration_s
            hidden[e.tensor, e.phase] += busy.until(stop_s) - busy.until(e.start_s)
    return {moved: max(0.0, 1 - hidden[moved] / seconds) for moved, seconds in total.items()}


class _Busy:
    """Seconds of work of a stream, of which the events do not overlap, until any time."""

    def __init__(self, events: Sequence[Event]) -> None:
        ordered = sorted(events, key=lambda e: e.start_s)
        self.starts = [e.start_s for e in ordered]
        self.durations = [e.duration_s for e in ordered]
        self.before = [0.0]
        for seconds in self.durations:
            self.before.append(self.before[-1] + seconds)

    def until(self, time: float) -> float:
        i = bisect_right(self.starts, time) - 1
        if i < 0:
            return 0.0
        return self.before[i] + min(self.durations[i], time - self.starts[i])
