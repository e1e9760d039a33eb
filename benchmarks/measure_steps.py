"""Runs exported training steps on the accelerator at hand: seconds of a step, and peak memory.

    plan export plan.json --format jax-program > step.py
    python benchmarks/measure_steps.py step.py …        # needs only jax, and the machine itself

Prints one JSON line per program: seconds of one of ten steps in a row, and what the compiler says
a device needs. docs/validation.md has a run on one H100.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax

FIRST, STEPS = 3, 10


def measured(path: Path) -> dict[str, Any]:
    program = runpy.run_path(str(path))
    mesh = program["make_mesh"](jax.devices())
    step = program["compiled_step"](mesh).lower(*program["shapes"]()).compile()
    m = step.memory_analysis()
    peak = (
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )  # fmt: skip
    params, states = program["initialise"](jax.random.key(0), mesh)
    batch = program["random_batch"](jax.random.key(1), mesh)
    loss = None
    started = 0.0
    for i in range(FIRST + STEPS):
        if i == FIRST:
            jax.block_until_ready((loss, params))
            started = time.perf_counter()
        loss, params, states = step(params, states, batch)
    jax.block_until_ready((loss, params))
    seconds = (time.perf_counter() - started) / STEPS
    return {"program": path.stem, "step_time_s": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(measured(Path(argument))), flush=True)
