"""Is `--shape auto` ever slower than a shape that somebody would write? Model by machine.

Every plan is made by `python cli.py` in a process of its own. Prints one Markdown row per pair, as
soon as it is known; docs/mesh-shapes.md holds one run of

    python benchmarks/shapes.py
    python benchmarks/shapes.py lamda-137b     # the pairs of some models only

Exit code 1 if a shape written by hand was faster than the one found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDING = 1e-9  # of two sums of the same seconds

MACHINES = {
    "tpu-v3:8x8": 128, "tpu-v3:16x16": 512, "tpu-v3:32x32": 2048, "tpu-v4:4x4x8": 128,
    "tpu-v4:8x8x8": 512, "tpu-v4:8x16x16": 2048, "dgx-a100-80gb:16": 128, "dgx-a100-80gb:64": 512,
    "dgx-a100-80gb:128": 1024,
}  # fmt: skip
PAIRS = (
    *((m, t) for m in ("lamda-137b", "bert-480b") for t in ("tpu-v3:32x32", "tpu-v4:8x16x16")),
    *((m, t) for m in ("glam-1.2t", "gshard-m4") for t in ("tpu-v3:32x32", "tpu-v4:8x16x16")),
    *((m, t) for m in ("lamda-137b", "vit-22b") for t in ("tpu-v4:8x8x8", "tpu-v3:16x16")),
    *((m, t) for m in ("t5-11b", "vit-22b", "llama3-8b") for t in ("tpu-v3:8x8", "tpu-v4:4x4x8")),
    *((m, "dgx-a100-80gb:16") for m in ("t5-11b", "vit-22b", "llama3-8b")),
    *((m, "dgx-a100-80gb:64") for m in ("t5-11b", "vit-22b", "lamda-137b")),
    *((m, "dgx-a100-80gb:128") for m in ("gpt3-175b", "bert-480b", "gshard-m4", "glam-1.2t")),
    ("t5-11b", "tpu-v3:16x16"), ("gpt3-175b", "tpu-v3:32x32"), ("unet-2d", "tpu-v3:8x8"),
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What `plan` says of one shape. `step_s` is None where nothing fits or is possible."""

    shape: str
    step_s: float | None
    seconds: float


def by_hand(devices: int) -> Iterator[str]:
    """Shapes that people write: one axis; data by model parallelism; a square; three axes."""
    yield f"x={devices}"
    for model in (4, 8, 16, 64):
        yield f"x={devices // model},y={model}"
    square = 1 << (devices.bit_length() - 1) // 2
    yield f"x={square},y={devices // square}"
    yield f"x={devices // 64},y=8,z=8"


def planned(model: str, machine: str, shape: str) -> Planned:
    command = [sys.executable, "cli.py", model, "--mesh", machine, "--shape", shape]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--quiet", "--format", "json"], cwd=ROOT, capture_output=True, check=False
    )
    seconds = time.monotonic() - begun
    if done.returncode != 0:
        return Planned(shape, None, seconds)
    document = json.loads(done.stdout)
    found = ",".join(f"{name}={size}" for name, size in document["mesh"]["axes"].items())
    return Planned(found, document["step_time_s"], seconds)


def main(models: list[str]) -> int:
    print("| model | machine | found | step | best by hand | step | ratio | seconds |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
    worse = 0
    for model, machine in PAIRS:
        if models and model not in models:
            continue
        found = planned(model, machine, "auto")
        shapes = dict.fromkeys(by_hand(MACHINES[machine]))
        tried = [planned(model, machine, shape) for shape in shapes]
        fitting = [p for p in tried if p.step_s is not None]
        best = min(fitting, key=lambda p: p.step_s or 0.0, default=None)
        ratio = "–"
        if best is not None and best.step_s is not None:
            worse += found.step_s is None or found.step_s > best.step_s * (1 + ROUNDING)
            ratio = "none found" if found.step_s is None else f"{found.step_s / best.step_s:.3f}"
        cells = (
            model, machine, found.shape, _time(found), best.shape if best else "none fits",
            _time(best) if best else "–", ratio, f"{found.seconds:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if worse else 0


def _time(p: Planned) -> str:
    return "none fits" if p.step_s is None else f"{p.step_s:.4g} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
