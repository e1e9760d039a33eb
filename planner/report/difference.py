"""`plan diff`: two plans side by side, figures and shardings that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.annotations import Annotated, written_out
from planner.report import amounts
from planner.report.tables import table
from planner.report.text import axes_text
from planner.request import Planned
from planner.result import Result

_FIGURES: tuple[tuple[str, Callable[[Result], float], Callable[[float], str]], ...] = (
    ("step time", lambda r: r.timing.step_time_s, amounts.seconds),
    ("compute", lambda r: r.timing.compute_s, amounts.seconds),
    ("exposed communication", lambda r: r.timing.exposed_communication_s, amounts.seconds),
    ("peak memory", lambda r: float(r.memory.peak_bytes), amounts.size),
    ("MFU", lambda r: r.mfu, amounts.share),
    ("HFU", lambda r: r.hfu, amounts.share),
)


def difference(before: Planned, after: Planned) -> RenderableType:
    return Group(*_parts(before.result, after.result))


def _parts(before: Result, after: Result) -> Iterator[RenderableType]:
    yield Text(f"before: {before.model.name}, {before.mesh.describe()}")
    yield Text(f"after:  {after.model.name}, {after.mesh.describe()}")
    yield Text()
    yield _figures(before, after)
    yield Text()
    changed = list(_shardings(before, after))
    if not changed:
        yield Text("all tensors lie the same")
        return
    found = table("tensor", "before", "after")
    for name, old, new in changed:
        found.add_row(Text(name), Text(old), Text(new))
    yield found


def _figures(before: Result, after: Result) -> Table:
    found = table("figure", "before", "after", "change", right=("before", "after", "change"))
    for name, figure, show in _FIGURES:
        old, new = figure(before), figure(after)
        change = f"{new / old - 1:+.1%}" if old else "" if not new else "new"
        found.add_row(name, show(old), show(new), change)
    return found


def _shardings(before: Result, after: Result) -> Iterator[tuple[str, str, str]]:
    old = {a.name: a for a in written_out(before)}
    new = {a.name: a for a in written_out(after)}
    for name in dict.fromkeys((*old, *new)):
        left, right = _lies(old.get(name)), _lies(new.get(name))
        if left != right:
            yield name, left, right


def _lies(a: Annotated | None) -> str:
    return "absent" if a is None else axes_text(a)
