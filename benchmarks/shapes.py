"""Is `--shape auto` ever slower than a shape that somebody would write? Model by machine.

Every plan is made by `python cli.py` in a process of its own. Prints one Markdown row per pair;
docs/mesh-shapes.md holds one run of

    python benchmarks/shapes.py
    python benchmarks/shapes.py --only lamda-137b          # the pairs of some models
    python benchmarks/shapes.py --at-once 7 --results FILE # side by side, each on two cores of its
                                                           # own; what FILE has is not planned again

Exit code 1 if a shape written by hand was faster than the one found.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
    ("llama3-70b", "tpu-v4:8x8x8"), ("llama3-70b", "dgx-a100-80gb:64"),
    ("mixtral-8x7b", "tpu-v4:4x4x8"), ("mixtral-8x7b", "dgx-a100-80gb:16"),
    ("gpt3-175b", "tpu-v4:8x16x16"), ("resnet-50", "tpu-v3:8x8"),
)  # fmt: skip


Job = tuple[str, str, str]  # model, machine, shape


@dataclass(frozen=True)
class Planned:
    """What `plan` says of one shape. `step_s` is None where nothing fits or is possible."""

    shape: str
    step_s: float | None
    seconds: float


class Runner:
    """Plans jobs, each on `cores` of its own, and remembers them in a file if there is one."""

    def __init__(self, at_once: int, results: Path | None) -> None:
        self.results, self.lock = results, threading.Lock()
        self.known: dict[Job, Planned] = {}
        if results is not None and results.exists():
            for line in results.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                job = tuple(entry.pop("job"))
                self.known[job] = Planned(**entry)
        cores = sorted(os.sched_getaffinity(0))
        self.free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for k in range(at_once):
            self.free.put(cores if at_once == 1 else cores[2 * k : 2 * k + 2])
        self.pool = ThreadPoolExecutor(at_once)

    def plan(self, jobs: Sequence[Job]) -> None:
        list(self.pool.map(self._plan, [job for job in jobs if job not in self.known]))

    def _plan(self, job: Job) -> None:
        cores = self.free.get()
        self.known[job] = planned = _planned(job, cores)
        self.free.put(cores)
        if self.results is not None:
            with self.lock, self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, **asdict(planned)}) + "\n")


def by_hand(devices: int) -> Iterator[str]:
    """Shapes that people write: one axis; data by model parallelism; a square; three axes."""
    yield f"x={devices}"
    for model in (4, 8, 16, 64):
        yield f"x={devices // model},y={model}"
    square = 1 << (devices.bit_length() - 1) // 2
    yield f"x={square},y={devices // square}"
    yield f"x={devices // 64},y=8,z=8"


def _planned(job: Job, cores: Sequence[int]) -> Planned:
    model, machine, shape = job
    command = [sys.executable, "cli.py", model, "--mesh", machine, "--shape", shape]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--quiet", "--format", "json"], cwd=ROOT, capture_output=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    seconds = time.monotonic() - begun
    if done.returncode != 0:
        return Planned(shape, None, seconds)
    document = json.loads(done.stdout)
    found = ",".join(f"{name}={size}" for name, size in document["mesh"]["axes"].items())
    return Planned(found, document["step_time_s"], seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="models; default: all")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.at_once > 1 and 2 * options.at_once > len(os.sched_getaffinity(0)):
        parser.error("--at-once: two cores for each plan are more than there are")
    pairs = [pair for pair in PAIRS if not options.only or pair[0] in options.only]
    hand = {pair: list(dict.fromkeys(by_hand(MACHINES[pair[1]]))) for pair in pairs}
    runner = Runner(options.at_once, options.results)
    jobs = [(*pair, shape) for pair in pairs for shape in ("auto", *hand[pair])]
    if options.at_once > 1:
        runner.plan(jobs)
    print("| model | machine | found | step | best by hand | step | ratio | seconds |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
    worse = 0
    for pair in pairs:
        runner.plan([job for job in jobs if job[:2] == pair])
        found, *tried = (runner.known[job] for job in jobs if job[:2] == pair)
        fitting = [p for p in tried if p.step_s is not None]
        best = min(fitting, key=lambda p: p.step_s or 0.0, default=None)
        ratio = "–"
        if best is not None and best.step_s is not None:
            worse += found.step_s is None or found.step_s > best.step_s * (1 + ROUNDING)
            ratio = "none found" if found.step_s is None else f"{found.step_s / best.step_s:.3f}"
        cells = (
            *pair, found.shape, _time(found), best.shape if best else "none fits",
            _time(best) if best else "–", ratio, f"{found.seconds:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if worse else 0


def _time(p: Planned) -> str:
    return "none fits" if p.step_s is None else f"{p.step_s:.4g} s"


if __name__ == "__main__":
    sys.exit(main())
