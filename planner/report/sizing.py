"""A sweep as a table for people and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from planner.export.sweepfile import as_dict
from planner.report import amounts
from planner.report.document import SCHEMA_VERSION
from planner.report.tables import table
from planner.sweeping import DAY_S, FITS, Row, Run

_RIGHT = ("devices", "peak", "step", "MFU", "tokens/s", "days", "device-hours", "cost")


def text(model: str, rows: Sequence[Row], run: Run) -> Group:
    return Group(*_parts(model, rows, run))


def _parts(model: str, rows: Sequence[Row], run: Run) -> Iterator[RenderableType]:
    found = table("mesh", *_RIGHT[:1], "shape", *_RIGHT[1:], "", right=_RIGHT)
    for row in rows:
        seconds, hours, cost = run.seconds(row), run.device_hours(row), run.cost(row)
        shape = ",".join(f"{axis}={n}" for axis, n in (row.shape or {}).items())
        fits = row.outcome == FITS
        found.add_row(
            Text(row.mesh), str(row.devices), Text(shape),
            "" if row.peak_bytes is None else amounts.size(row.peak_bytes),
            amounts.seconds(row.step_time_s) if fits else "",
            amounts.share(row.mfu) if fits else "",
            amounts.count(row.tokens_per_s) if fits else "",
            "" if seconds is None else f"{seconds / DAY_S:.1f}",
            "" if hours is None else amounts.count(hours),
            "" if cost is None else amounts.count(cost),
            row.outcome if not fits else "" if run.passes(row) else "too late",
        )  # fmt: skip
    yield found
    yield Text()
    yield Text(_verdict(model, rows, run))


def _verdict(model: str, rows: Sequence[Row], run: Run) -> str:
    what = "fits" if run.deadline_s is None else "fits and meets the deadline"
    smallest = run.smallest(rows)
    if smallest is None:
        return f"{model}: none of {len(rows)} machines {what}"
    return f"{model}: the smallest machine that {what} is {smallest.mesh}"


def document(model: str, rows: Sequence[Row], run: Run) -> dict[str, Any]:
    smallest = run.smallest(rows)
    return {
        "schema_version": SCHEMA_VERSION, "model": model, "tokens": run.tokens,
        "deadline_s": run.deadline_s,
        "rows": [
            {
                **as_dict(row), "passes": run.passes(row), "run_s": run.seconds(row),
                "device_hours": run.device_hours(row), "cost": run.cost(row),
            }
            for row in rows
        ],
        "smallest": None if smallest is None else smallest.mesh,
    }  # fmt: skip
