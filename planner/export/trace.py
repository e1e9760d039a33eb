"""A step's timeline in the Trace Event Format of Chrome and Perfetto.

One device, two rows: what computes and what is on the network.
"""

from __future__ import annotations

import json

from costmodels.simulate import simulate
from planner.export.stamp import signature
from planner.result import Result

_MICROSECONDS = 1e6  # the format counts in microseconds
_ROWS = ("compute", "network")


def dump(result: Result) -> str:
    timing = simulate(result.program, result.mesh, trace=True)
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": stream}}
        for row, stream in enumerate(_ROWS)
    ]
    events = [
        {
            "name": e.name, "cat": e.kind, "ph": "X", "pid": 0, "tid": _ROWS.index(e.stream),
            "ts": e.start_s * _MICROSECONDS, "dur": e.duration_s * _MICROSECONDS,
            "args": {"phase": e.phase},
        }
        for e in timing.events
    ]  # fmt: skip
    lines = ",\n".join(json.dumps(e, ensure_ascii=False) for e in [*names, *events])
    return f'{{"generator": "{signature()}",\n"traceEvents": [\n{lines}\n]}}\n'
