"""Fits the A100 table of costmodels/data to the even half of measured runs; prints both halves.

    python benchmarks/fit_a100.py RUNS.csv … [--evaluations 60]

RUNS are vTrain's files of measured iterations (docs/validation.md says where they are); the even
runs of the suite `megatron` are added. Every run is lowered once, then simulated under each
table that the pattern search tries. Runs of the odd half are never looked at before the end. With
`--evaluations 0` only the errors of the present table are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from costmodels.calibrate import search  # noqa: E402
from costmodels.compute import Efficiency, efficiency, to_data  # noqa: E402
from costmodels.pipeline import PipelineProgram  # noqa: E402
from costmodels.pipeline_time import simulate_pipeline  # noqa: E402
from costmodels.simulate import simulate  # noqa: E402
from meshes import LogicalMesh  # noqa: E402
from planner.result import Result  # noqa: E402
from planner.validation import suitefile  # noqa: E402
from planner.validation.predict import simulate_run  # noqa: E402
from planner.validation.split import may_fit  # noqa: E402

TABLE = "a100"
MOST = 0.95  # of HBM and of peak: what no kernel exceeds
# A run that is off by more has a reason outside of the model: it must not decide the fit.
MOST_ERROR = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--evaluations", type=int, default=60)
    options = parser.parse_args()
    halves: dict[bool, list[tuple[Result, float]]] = {True: [], False: []}
    for name in ("megatron", *map(str, options.runs)):
        suite = suitefile.load(name)
        for run in suite.runs:
            even = may_fit(suite.name, run.id)
            if even or not options.evaluations:
                measured = run.measured.step_time_s
                if measured is not None:
                    halves[even].append((simulate_run(run), measured))
        print(f"{suite.name}: {len(suite.runs)} runs", file=sys.stderr)
    start = efficiency(TABLE)
    values = [start.compute, start.fill, start.stream[0][1], start.eager_dispatch_s]

    def loss(tried: Sequence[float]) -> float:
        if tried[0] > MOST or tried[2] > MOST:
            return float("inf")
        errors = np.abs(np.log(ratios(halves[True], table(start, tried))))
        return float(np.minimum(errors, MOST_ERROR).mean())

    if options.evaluations:
        values = search(values, loss, options.evaluations)
    found = table(start, values)
    print(json.dumps(to_data(found)))
    for even, results in halves.items():
        if results:
            errors = np.abs(ratios(results, found) - 1)
            half = "even" if even else "odd"
            print(f"{half}: {len(errors)} runs, mean {errors.mean():.1%}, "
                  f"median {np.median(errors):.1%}")  # fmt: skip


def table(start: Efficiency, values: Sequence[float]) -> Efficiency:
    compute, fill, stream, dispatch_s = values
    shares = tuple((width, stream) for width, _ in start.stream)
    return replace(start, compute=compute, fill=fill, stream=shares, eager_dispatch_s=dispatch_s)


def ratios(results: Sequence[tuple[Result, float]], found: Efficiency) -> np.ndarray:
    """Predicted over measured step times under a table."""
    name = json.dumps(to_data(found))
    return np.array([seconds(r, name, found.eager_dispatch_s) / t for r, t in results])


def seconds(result: Result, name: str, dispatch_s: float) -> float:
    topology = result.mesh.topology
    chip = replace(topology.chip, efficiency=name, dispatch_s=dispatch_s)
    topology = replace(topology, chip=chip)
    mesh = LogicalMesh(topology, result.mesh.axes, result.mesh.parts)
    if isinstance(result.program, PipelineProgram):
        return simulate_pipeline(result.program, mesh).step_time_s
    return simulate(result.program, mesh).step_time_s


if __name__ == "__main__":
    main()
