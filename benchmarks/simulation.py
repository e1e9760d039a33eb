"""Seconds of one simulation: a folded 64-layer model, and a pipelined one of 105 layers.

    python benchmarks/simulation.py

Lowering is not counted, prices of kernels and collectives are: what a search over plans pays for
each. Prints the best of several runs.
"""

from __future__ import annotations

import sys
import timeit
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from costmodels.pipeline import PipelineProgram  # noqa: E402
from costmodels.pipeline_time import simulate_pipeline  # noqa: E402
from costmodels.pricing import prices  # noqa: E402
from costmodels.simulate import simulate  # noqa: E402
from planner.result import Result  # noqa: E402
from planner.validation import suitefile  # noqa: E402
from planner.validation.predict import simulate_run  # noqa: E402

CASES = (("seeds", "seed-lamda-137b"), ("megatron", "korthikanti-530b-full"))
REPEATS = 7


def once(result: Result) -> None:
    prices.cache_clear()
    if isinstance(result.program, PipelineProgram):
        simulate_pipeline(result.program, result.mesh)
    else:
        simulate(result.program, result.mesh)


def main() -> None:
    for suite, wanted in CASES:
        run = next(r for r in suitefile.load(suite).runs if r.id == wanted)
        result = simulate_run(run)
        best = min(timeit.repeat(lambda r=result: once(r), number=1, repeat=REPEATS))
        print(f"{wanted}: {best * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
