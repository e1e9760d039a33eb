"""Ours against plain CBC and HiGHS on the unreduced program, in the same time.

    python benchmarks/solve_baselines.py FOLDER [--time-limit S] [--best FILE]

Only the comparison belongs here. Baselines build the whole program through PuLP and get no
presolve, bound or start of ours; building counts towards the limit, as reading does.
"""

from __future__ import annotations

import argparse
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from solve import DEFAULT_LIMIT_S, HEAD, HERE, best_known, measure, name_of, problems, row

BACKENDS = ("auto", "highs", "cbc")
GRACE = 3
"""A baseline that does not stop by itself is ended after this many limits: then it has nothing."""


def work(path: str, backend: str, limit_s: float, pipe: Connection) -> None:
    pipe.send(measure(path, backend, limit_s, 0))


def within(path: str, backend: str, limit_s: float) -> dict[str, Any]:
    """The result, or that there is none: a solver inside a library hears no polite signal."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(path, backend, limit_s, there))
    process.start()
    there.close()
    try:
        if not here.poll(GRACE * limit_s):
            return {"error": f"nothing after {GRACE * limit_s:.0f} s"}
        result: dict[str, Any] = here.recv()
        return result
    except EOFError:
        return {"error": "the process ended without a result (out of memory?)"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limit", type=float, help="seconds; default: the problem's own")
    parser.add_argument("--best", type=Path, default=HERE / "best-known.json")
    options = parser.parse_args()
    known = best_known(options.best)
    print(HEAD, flush=True)
    for path in problems(options.folder):
        name = name_of(path)
        about = known.get(name, {})
        limit_s = options.time_limit or about.get("time_limit_s", DEFAULT_LIMIT_S)
        for backend in BACKENDS:
            result = within(str(path), backend, limit_s)
            print(row(f"{name[-20:]} {backend}", result, about.get("best")), flush=True)


if __name__ == "__main__":
    main()
