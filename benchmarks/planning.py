"""How long planning takes, and in how much memory: over mesh size, depth, axes, and the zoo.

Every case runs `python cli.py` in a process of its own, so peak memory is that of a user's run.
Prints Markdown tables; docs/benchmarks.md holds one run of

    python benchmarks/planning.py
    python benchmarks/planning.py zoo        # one of: devices, layers, axes, zoo
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ZOO = sorted(path.stem for path in (ROOT / "planner" / "zoo").glob("*.yaml"))
LIMIT_S = 600.0  # a case that takes longer is reported as such

# A dense decoder of ordinary proportions. Small enough to fit on 8 devices.
MODEL = """\
training: {batch: 512, optimizer: adamw, compute: bf16, remat: full}
architecture:
  {kind: decoder, layers: 24, d_model: 1024, d_ff: 4096, heads: 16, vocab: 32000, sequence: 1024}
"""
DEVICES = {
    8: ("tpu-v4:2x2x2", "x=2,y=4"),
    64: ("tpu-v4:4x4x4", "x=4,y=16"),
    512: ("tpu-v4:8x8x8", "x=8,y=64"),
    4096: ("tpu-v4:16x16x16", "x=16,y=256"),
}
LAYERS = (1, 8, 32, 128)
AXES = {1: "x=64", 2: "x=4,y=16", 3: "x=4,y=4,z=4", 4: "x=4,y=4,z=2,w=2"}
CUBE = "tpu-v4:4x4x4"


@dataclass(frozen=True)
class Case:
    label: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_bytes: int
    result: str


def cases(model: str) -> dict[str, list[Case]]:
    def placed(mesh: str, shape: str, *more: str) -> tuple[str, ...]:
        return (model, "--mesh", mesh, "--shape", shape, *more)

    return {
        "devices": [Case(f"{n}, {s}", placed(m, s)) for n, (m, s) in DEVICES.items()],
        "layers": [
            Case(str(n), placed(CUBE, AXES[2], "--set", f"architecture.layers={n}")) for n in LAYERS
        ],
        "axes": [Case(f"{n}, {shape}", placed(CUBE, shape)) for n, shape in AXES.items()],
        "zoo": [Case(name, (name,)) for name in ZOO],
    }


def measure(arguments: Sequence[str]) -> Measured:
    command = [sys.executable, "cli.py", *arguments, "--quiet", "--format", "json"]
    with tempfile.TemporaryFile() as output:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL)
        status, usage = _wait(process.pid, begun + LIMIT_S)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    return Measured(seconds, usage.ru_maxrss * 1024, _result(process.returncode, text))


def _wait(pid: int, end: float) -> tuple[int, resource.struct_rusage]:
    """Waits for a process, which is killed at `end`, and says what it alone has used."""
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return os.wait4(pid, 0)[1:]
        time.sleep(0.02)


def _result(code: int, text: bytes) -> str:
    if code not in (0, 1):
        return f"no plan (exit code {code})"
    document = json.loads(text)
    solver, fits = document["solver"], document["memory"]["fits"]
    gap = "" if solver["gap"] is None else f", gap {solver['gap']:.2%}"
    verdict = "" if fits else ", does not fit"
    return f"{solver['status']}{gap}{verdict}"


def table(title: str, rows: Iterable[Case]) -> None:
    print(f"\n| {title} | seconds | peak memory | result |\n| --- | ---: | ---: | --- |")
    for case in rows:
        m = measure(case.arguments)
        peak = f"{m.peak_bytes / 2**20:.0f} MiB"
        print(f"| {case.label} | {m.seconds:.1f} | {peak} | {m.result} |", flush=True)


def main(wanted: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.yaml"
        path.write_text(MODEL, encoding="utf-8")
        known = cases(str(path))
        unknown = set(wanted) - known.keys()
        if unknown:
            sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        for name in wanted or known:
            table(name, known[name])


if __name__ == "__main__":
    main(sys.argv[1:])
