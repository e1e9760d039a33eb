"""`plan sweep`: one model on many machines; what a run takes and costs on each.

Every machine is planned by itself, on processes of this machine or of a Dask cluster. What has
been found is told at once, so that a caller can keep it and a later sweep need not find it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

from meshes import LogicalMesh
from planner.errors import InputError
from planner.export.stamp import tool_version
from planner.placing import place
from planner.planning import NothingFits, Unsolved
from planner.progress import Progress
from planner.request import Request, plan
from planner.search.pool import Spread, over, processes

FITS, TOO_LARGE, UNSOLVED, LOST = (
    "fits", "does not fit", "no plan in time", "planning ran out of memory",
)  # fmt: skip
HOUR_S, DAY_S = 3600.0, 86400.0


@dataclass(frozen=True)
class Row:
    """What planning found on one machine; infinite where there is no plan."""

    mesh: str
    chip: str
    devices: int
    outcome: str
    shape: Mapping[str, int] | None = None
    step_time_s: float = inf
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """What the run is to do. `prices`: of a device hour, by chip or mesh name, or "" for any."""

    tokens: float | None = None
    deadline_s: float | None = None
    prices: Mapping[str, float] | None = None

    def seconds(self, row: Row) -> float | None:
        """Of the whole run on the machine of `row`."""
        if self.tokens is None or row.outcome != FITS:
            return None
        return self.tokens / row.tokens_per_s

    def device_hours(self, row: Row) -> float | None:
        seconds = self.seconds(row)
        return None if seconds is None else seconds * row.devices / HOUR_S

    def cost(self, row: Row) -> float | None:
        hours, prices = self.device_hours(row), self.prices or {}
        price = next((prices[n] for n in (row.mesh, row.chip, "") if n in prices), None)
        return None if hours is None or price is None else hours * price

    def passes(self, row: Row) -> bool:
        """Whether it fits and is done by the deadline."""
        seconds = self.seconds(row)
        late = self.deadline_s is not None and seconds is not None and seconds > self.deadline_s
        return row.outcome == FITS and not late

    def smallest(self, rows: Sequence[Row]) -> Row | None:
        """Of the machines that pass the one with the fewest devices; of equals the fastest."""
        passing = [row for row in rows if self.passes(row)]
        return min(passing, key=lambda r: (r.devices, r.step_time_s), default=None)


def price_list(given: Sequence[str]) -> dict[str, float]:
    """`2.5`, `tpu-v4=3.2` → prices by name, "" for any machine. Raises InputError."""
    found = {}
    for text in given:
        name, _, price = text.rpartition("=")
        try:
            value = float(price)
        except ValueError:
            value = inf
        if not 0 <= value < inf:
            raise InputError(f"--price {text!r}: {price!r} is no price", "write 2.5 or tpu-v4=3.2")
        found[name.strip()] = value
    return found


def sweep(
    request: Request, meshes: Sequence[str], known: Mapping[str, Row] | None = None,
    found: Callable[[str, Row], None] | None = None, progress: Progress | None = None,
    scheduler: str | None = None,
) -> list[Row]:  # fmt: skip
    """A row for every machine, in their order. `known` rows are taken as they are; `found` is
    told of every new one, under the name by which it will be known."""
    requests = [replace(request, mesh=mesh) for mesh in meshes]
    keys = [key_of(r) for r in requests]
    rows = {k: row for k, row in (known or {}).items() if k in keys}
    missing = list(dict.fromkeys(k for k in keys if k not in rows))
    calls = [requests[keys.index(k)] for k in missing]

    def done(index: int, row: Row) -> None:
        rows[missing[index]] = row
        if found is not None and row.outcome not in (UNSOLVED, LOST):  # more may find one
            found(missing[index], row)
        if progress is not None:
            progress(f"planned {row.mesh}", len(rows) / len(set(keys)))

    if calls:
        with _workers(len(calls), scheduler) as spread:
            spread(plan_row, calls, done, _lost)
    return [rows[k] for k in keys]


def key_of(request: Request) -> str:
    """Names what `plan_row` makes of a request: equal only if all that counts is equal. Raises
    what placing the model raises."""
    model = request.source.load()
    machine = place(model, request.mesh, request.shape, request.source.folder)
    candidates = [(mesh.axes, mesh.parts) for mesh in machine.meshes()]
    mesh = machine.topology.fingerprint
    what = (tool_version(), model.digest, mesh, candidates, request.options)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def plan_row(request: Request) -> Row:
    """Plans one machine."""
    model = request.source.load()
    mesh = place(model, request.mesh, request.shape, request.source.folder).meshes()[0]
    options = replace(request.options, least_memory=False)
    try:
        planned = plan(replace(request, options=options))
    except NothingFits:
        return _row(mesh, TOO_LARGE)
    except Unsolved:
        return _row(mesh, UNSOLVED)
    r = planned.result
    return replace(
        _row(mesh, FITS), shape=dict(r.mesh.axes), step_time_s=r.timing.step_time_s,
        tokens_per_s=r.tokens_per_s, mfu=r.mfu, peak_bytes=r.memory.peak_bytes,
    )  # fmt: skip


def _lost(request: Request) -> Row:
    """Of a machine whose planning ran out of memory."""
    model = request.source.load()
    mesh = place(model, request.mesh, request.shape, request.source.folder).meshes()[0]
    return _row(mesh, LOST)


def _row(mesh: LogicalMesh, outcome: str) -> Row:
    return Row(mesh.topology.name, mesh.chip.name, mesh.devices, outcome)


@contextmanager
def _workers(calls: int, scheduler: str | None) -> Iterator[Spread]:
    if scheduler is None:
        with processes(calls) as spread:
            yield spread
        return
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "--scheduler needs Dask", "pip install 'shardplan[dask]', here and on the workers"
        ) from None
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler at {scheduler!r}: {error}") from None
    with client:
        yield over(client.get_executor())
