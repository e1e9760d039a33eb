"""`plan solve`: a contest problem solved, its progress told, its outcome as an exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from planner.errors import InputError
from planner.ilp.contest import solve_file
from planner.ilp.solver import BACKENDS
from planner.report.console import Screen

OK, NO, NOTHING_FOUND, INTERRUPTED = 0, 1, 3, 130


def solve(
    screen: Screen, problem: Path, time_limit: float | None, backend: str, seed: int,
    output: Path | None,
) -> int:  # fmt: skip
    """Raises InputError or BadProblem for what cannot be read or written."""
    if backend not in BACKENDS:
        raise InputError(f"no backend {backend!r}", f"one of {', '.join(BACKENDS)}")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"cannot write {output}: no folder {output.parent}")
    result = solve_file(
        problem, time_limit=time_limit, backend=backend, seed=seed, out=output,
        progress=_progress(screen),
    )  # fmt: skip
    interrupted = result.pop("interrupted")
    found = result["solution"] is not None
    if output is None:
        screen.data(json.dumps(result))
    screen.remark(
        f"{result['status']}: cost {result['cost']}, bound {result['bound']}, "
        f"{result['seconds']:.1f} s"
    )
    if interrupted:
        return INTERRUPTED
    if found:
        return OK
    return NO if result["status"] == "infeasible" else NOTHING_FOUND


def _progress(screen: Screen) -> Callable[[float, float], None] | None:
    """One line on stderr for every better solution or bound."""
    if screen.quiet:
        return None
    begin, last = time.monotonic(), [""]

    def tell(cost: float, bound: float) -> None:
        line = f"cost {cost:.0f}, bound {bound:.0f}"
        if line != last[0]:
            last[0] = line
            screen.remark(f"{time.monotonic() - begin:8.1f} s  {line}")

    return tell
