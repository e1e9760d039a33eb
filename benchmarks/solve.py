"""Every contest problem of a folder: cost, ratio to the best known, bound, time, peak memory.

    python benchmarks/solve.py FOLDER [--time-limit S] [--backend auto] [--best FILE] [--seed N]
                               [--busy]

Only running `solve_file` and printing belong here. Each problem runs in a process of its own, so
that the peak memory is its own. Best costs and limits come from `best-known.json` beside this
file (or `--best`): {"problems": {NAME: {"best": cost, "time_limit_s": seconds}}}. On a machine that
others use, `--busy` counts CPU seconds and leaves the second process out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from planner.ilp import clock, partner
from planner.ilp.contest import solve_file
from planner.ilp.contest_reader import BadProblem

DEFAULT_LIMIT_S = 180.0
HERE = Path(__file__).resolve().parent
HEAD = (
    f"{'problem':28} {'cost':>16} {'ratio':>9} {'bound':>16} {'gap':>8} {'status':>10} "
    f"{'first s':>8} {'time s':>7} {'CPU s':>7} {'peak GB':>8}"
)


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """The search counts CPU seconds of one process in place of the wall clock's."""
    alone = mock.patch.object(partner, "possible", return_value=False)
    with alone, mock.patch.object(clock, "time", SimpleNamespace(monotonic=time.process_time)):
        yield


def measure(
    path: str, backend: str, limit_s: float, seed: int, busy: bool = False
) -> dict[str, Any]:
    """The result of one problem, with `first_s`, `cpu_s` and `peak_bytes` of this process."""
    with busy_machine() if busy else contextlib.nullcontext():
        return _measure(path, backend, limit_s, seed, time.process_time if busy else time.monotonic)


def _measure(
    path: str, backend: str, limit_s: float, seed: int, now: Callable[[], float]
) -> dict[str, Any]:
    begin = now()
    first: list[float] = []

    def progress(cost: float, bound: float) -> None:
        if not first and cost < float("inf"):
            first.append(now() - begin)

    try:
        result = solve_file(path, time_limit=limit_s, backend=backend, seed=seed, progress=progress)
    except BadProblem as error:
        return {"error": str(error)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    below = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["first_s"] = first[0] if first else None
    result["cpu_s"] = used.ru_utime + used.ru_stime + below.ru_utime + below.ru_stime
    result["peak_bytes"] = 1024 * max(used.ru_maxrss, below.ru_maxrss)
    return result


def row(name: str, result: dict[str, Any], best: int | None) -> str:
    """One line of the table."""
    if "error" in result:
        return f"{name:28} {result['error']}"
    cost, bound, first_s = result["cost"], result["bound"], result["first_s"]
    ratio = f"{cost / best:9.5f}" if cost and best else f"{'':9}"
    gap = f"{(cost - bound) / cost:8.5f}" if cost and bound is not None else f"{'':8}"
    return (
        f"{name:28} {cost if cost is not None else 'none':>16} {ratio} "
        f"{bound if bound is not None else 'none':>16} {gap} {result['status']:>10} "
        f"{'' if first_s is None else format(first_s, '.1f'):>8} {result['seconds']:7.1f} "
        f"{result['cpu_s']:7.1f} {result['peak_bytes'] / 1e9:8.2f}"
    )


def name_of(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")


def problems(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith((".json", ".json.gz")))


def best_known(file: Path) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = json.loads(file.read_text())["problems"]
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limit", type=float, help="seconds; default: the problem's own")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--best", type=Path, default=HERE / "best-known.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", action="store_true", help="limits in CPU seconds, one process")
    options = parser.parse_args()
    known = best_known(options.best)
    context = multiprocessing.get_context("spawn")
    print(HEAD, flush=True)
    total = 0.0
    for path in problems(options.folder):
        name = name_of(path)
        about = known.get(name, {})
        limit_s = options.time_limit or about.get("time_limit_s", DEFAULT_LIMIT_S)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            arguments = (str(path), options.backend, limit_s, options.seed, options.busy)
            result = pool.submit(measure, *arguments).result()
        print(row(name, result, about.get("best")), flush=True)
        if about and result.get("cost"):
            total += about["best"] / result["cost"]
    print(f"sum of best / cost: {total:.4f}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    sys.exit(main())
