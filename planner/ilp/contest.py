"""Contest problems from file to file: read, solve within a time limit, write atomically.

Only what `plan solve` does belongs here. The cost written is the integer evaluation below,
which shares nothing with the solvers; nothing is written unless a choice passes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ilp.clock import Clock, Stop
from planner.ilp.contest_reader import FORBIDDEN, RawProblem, read
from planner.ilp.problem import Edge, Matrix, Problem, Usage, Vector
from planner.ilp.solver import check_backend, outcome_of, search

Ints = NDArray[np.int64]
Progress = Callable[[float, float], None]
FINISHING_S = 1.0
"""Kept back from the time limit for pricing and writing the solution."""
FINISHING_SHARE = 0.02


def price(raw: RawProblem, choice: Sequence[int]) -> tuple[int, int]:
    """Exact integer (cost, peak usage) of a choice. Raises ValueError if it is no choice."""
    if len(choice) != len(raw.costs):
        raise ValueError(f"expected {len(raw.costs)} strategies, got {len(choice)}")
    cost = 0
    changes: dict[int, int] = {}
    for n, s in enumerate(choice):
        if not 0 <= s < len(raw.costs[n]):
            raise ValueError(f"node {n} has no strategy {s}")
        cost += int(raw.costs[n][s])
        start, stop = int(raw.intervals[n, 0]), int(raw.intervals[n, 1])
        if start < stop:
            changes[start] = changes.get(start, 0) + int(raw.usages[n][s])
            changes[stop] = changes.get(stop, 0) - int(raw.usages[n][s])
    for (i, j), table in zip(raw.edges.tolist(), raw.edge_costs, strict=True):
        cost += int(table[choice[i] * len(raw.costs[j]) + choice[j]])
    live = peak = 0
    for t in sorted(changes):
        live += changes[t]
        peak = max(peak, live)
    return cost, peak


def as_problem(raw: RawProblem) -> Problem:
    """The same problem for the solvers: float64, forbidden entries infinite.

    Equal matrices stay one object (integers up to 2^53 are exact in float64).
    """
    vectors: dict[int, Vector] = {}
    tables: dict[tuple[int, int], Matrix] = {}

    def vector(values: Ints) -> Vector:
        if id(values) not in vectors:
            vectors[id(values)] = _floats(values)
        return vectors[id(values)]

    def table(values: Ints, i: int, j: int) -> Matrix:
        shape = (len(raw.costs[i]), len(raw.costs[j]))
        key = (id(values), shape[0])
        if key not in tables:
            tables[key] = _floats(values).reshape(shape)
        return tables[key]

    edges = tuple(
        Edge(i, j, table(values, i, j))
        for (i, j), values in zip(raw.edges.tolist(), raw.edge_costs, strict=True)
    )
    usages = tuple(
        Usage(n, start, stop, values.astype(np.float64))
        for n, ((start, stop), values) in enumerate(
            zip(raw.intervals.tolist(), raw.usages, strict=True)
        )
    )
    return Problem(tuple(vector(c) for c in raw.costs), edges, usages, float(raw.usage_limit))


def _floats(values: Ints) -> Vector:
    numbers: Vector = values.astype(np.float64)
    numbers[values >= FORBIDDEN] = np.inf
    return numbers


def solve_file(
    path: str | Path, *, time_limit: float | None = None, backend: str = "auto", seed: int = 0,
    out: str | Path | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Solves the problem in `path`; reading counts towards `time_limit` (seconds).

    Returns `cost`, `solution`, `status`, `bound`, `seconds` and `interrupted`; `cost` and
    `solution` are None where nothing was found. SIGINT and SIGTERM end the search early and
    the best choice is still returned, and written to `out` where one was found. Raises
    BadProblem for bad input and ValueError for an unknown backend.
    """
    check_backend(backend)
    with _signals() as stop:
        clock = Clock.of(time_limit, stop)
        raw = read(Path(path))
        problem = as_problem(raw)
        working = _working(clock)
        found = search(problem, backend, working, None, seed, None, 0.0, progress, pair=True)
        outcome = outcome_of(problem, found, None, working)
    result = _result(raw, outcome.choice, outcome.status, outcome.bound)
    result["seconds"] = clock.seconds()
    result["interrupted"] = stop.asked
    if out is not None and result["solution"] is not None:
        write(Path(out), {k: v for k, v in result.items() if k != "interrupted"})
    return result


def _working(clock: Clock) -> Clock:
    """The clock without the time that finishing needs."""
    if clock.deadline is None:
        return clock
    spare = max(FINISHING_S, FINISHING_SHARE * clock.left())
    return Clock(clock.deadline - spare, clock.stop, clock.begin)


def _result(raw: RawProblem, choice: Ints | None, status: str, bound: float) -> dict[str, Any]:
    """What is said about a choice: only what integer evaluation confirms."""
    result: dict[str, Any] = {"cost": None, "solution": None, "status": status, "bound": None}
    if choice is not None:
        cost, peak = price(raw, choice.tolist())
        if peak > raw.usage_limit:
            raise RuntimeError(f"the choice found needs {peak} of {raw.usage_limit}")
        result["cost"], result["solution"] = cost, [int(s) for s in choice]
    if math.isfinite(bound):
        # Costs are integers, so a bound may be rounded up (less float noise).
        result["bound"] = max(0, math.ceil(bound - 1e-9 * max(1.0, abs(bound))))
        if choice is not None:
            result["bound"] = min(result["bound"], result["cost"])
    if status == "optimal":
        result["bound"] = result["cost"]
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON to `path` through a temporary file beside it, so that no half file ever exists."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(result, file)
            file.write("\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set the stop flag; outside the main thread nothing is installed."""
    stop = Stop()

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
