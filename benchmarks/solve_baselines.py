"""Ours against plain CBC and HiGHS on the unreduced program, in the same time.

    python benchmarks/solve_baselines.py FOLDER [--time-limit S] [--best FILE]

Only the comparison belongs here. Baselines build the whole program through PuLP and get no
presolve, bound or start of ours; building counts towards the limit, as reading does.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

from solve import DEFAULT_LIMIT_S, HEAD, HERE, best_known, measure, name_of, problems, row

BACKENDS = ("auto", "highs", "cbc")
GRACE = 3
"""A baseline that does not stop by itself is ended after this many limits: then it has nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limit", type=float, help="seconds; default: the problem's own")
    parser.add_argument("--best", type=Path, default=HERE / "best-known.json")
    options = parser.parse_args()
    known = best_known(options.best)
    context = multiprocessing.get_context("spawn")
    print(HEAD, flush=True)
    for path in problems(options.folder):
        name = name_of(path)
        about = known.get(name, {})
        limit_s = options.time_limit or about.get("time_limit_s", DEFAULT_LIMIT_S)
        for backend in BACKENDS:
            label = f"{name[-20:]} {backend}"
            with context.Pool(1) as pool:
                waiting = pool.apply_async(measure, (str(path), backend, limit_s, 0))
                try:
                    result = waiting.get(GRACE * limit_s)
                except multiprocessing.TimeoutError:
                    result = {"error": f"nothing after {GRACE * limit_s:.0f} s"}
            print(row(label, result, about.get("best")), flush=True)


if __name__ == "__main__":
    main()
