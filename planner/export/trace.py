"""A step's timeline in the Trace Event Format of Chrome and Perfetto.

One device, two rows: what computes and what is on the network. Of a pipeline a row per position
along its axis, with the halves of every microbatch.
"""

from __future__ import annotations

import json

from costmodels.pipeline import PipelineProgram
from costmodels.pipeline_time import simulate_pipeline
from costmodels.simulate import Timing, simulate
from planner.export.stamp import signature
from planner.result import Result

_MICROSECONDS = 1e6  # the format counts in microseconds
_ROWS = ("compute", "network")  # in this order, where a device has these


def dump(result: Result) -> str:
    timing = _traced(result)
    rows = [*_ROWS, *sorted({e.stream for e in timing.events} - {*_ROWS})]
    rows = [row for row in rows if any(e.stream == row for e in timing.events)]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": stream}}
        for row, stream in enumerate(rows)
    ]
    events = [
        {
            "name": e.name, "cat": e.kind, "ph": "X", "pid": 0, "tid": rows.index(e.stream),
            "ts": e.start_s * _MICROSECONDS, "dur": e.duration_s * _MICROSECONDS,
            "args": {"phase": e.phase},
        }
        for e in timing.events
    ]  # fmt: skip
    lines = ",\n".join(json.dumps(e, ensure_ascii=False) for e in [*names, *events])
    return f'{{"generator": "{signature()}",\n"traceEvents": [\n{lines}\n]}}\n'


def _traced(result: Result) -> Timing:
    if isinstance(result.program, PipelineProgram):
        return simulate_pipeline(result.program, result.mesh, trace=True)
    return simulate(result.program, result.mesh, trace=True)
