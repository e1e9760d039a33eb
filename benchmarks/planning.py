"""How long planning takes, and in how much memory: over mesh size, depth, axes, and the zoo.

Every case runs `python cli.py` in a process of its own, so peak memory is that of a user's run.
Prints Markdown tables; docs/benchmarks.md holds one run of

    python benchmarks/planning.py
    python benchmarks/planning.py zoo        # one of: devices, layers, written-out, axes, zoo
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
# The same kind of decoder as a graph: its layers in a repeat, or each by itself.
GRAPH = """\
dims: {B: 512, S: 1024, D: 1024, F: 4096, N: 16, H: 64, V: 32000}
training: {batch: B, optimizer: adamw, compute: bf16, remat: full}
graph:
  inputs: {tokens: "i32[B, S]", targets: "i32[B, S]"}
"""
PARAMETERS = {
    "scale": "[D]", "wq": "[D, N, H]", "wk": "[D, N, H]", "wv": "[D, N, H]", "wo": "[N, H, D]",
    "scale_ff": "[D]", "wi": "[D, F]", "wf": "[F, D]",
}  # fmt: skip
LAYER = """\
n{i} = rms_norm(x, scale{i})
q{i} = einsum("B S D, D N H -> B S N H", n{i}, wq{i})
k{i} = einsum("B S D, D N H -> B S N H", n{i}, wk{i})
v{i} = einsum("B S D, D N H -> B S N H", n{i}, wv{i})
a{i} = attention(q{i}, k{i}, v{i}, causal=True)
x = x + einsum("B S N H, N H D -> B S D", a{i}, wo{i})
m{i} = rms_norm(x, scale_ff{i})
h{i} = gelu(einsum("B S D, D F -> B S F", m{i}, wi{i}))
x = x + einsum("B S F, F D -> B S D", h{i}, wf{i})
"""
LOSS = 'loss = cross_entropy(einsum("B S D, V D -> B S V", x, embed), targets)'
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
    objective: bool = False  # said too, for comparison


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_bytes: int
    result: str


def repeated(layers: int) -> str:
    params = ", ".join(f'{name}: "{dims}"' for name, dims in PARAMETERS.items())
    ops = "".join(f"        - {op}\n" for op in LAYER.format(i="").splitlines())
    return "".join(
        [
            f'{GRAPH}  params: {{embed: "[V, D]"}}\n  ops:\n    - x = gather(embed, tokens)\n',
            f"    - repeat: {{name: layers, times: {layers}, carry: [x]}}\n",
            f"      params: {{{params}}}\n      ops:\n{ops}    - {LOSS}\n",
        ]
    )


def written_out(layers: int) -> str:
    params = "".join(
        f', {name}{i}: "{dims}"' for i in range(layers) for name, dims in PARAMETERS.items()
    )
    ops = ["x = gather(embed, tokens)"]
    ops += [op for i in range(layers) for op in LAYER.format(i=i).splitlines()]
    lines = "".join(f"    - {op}\n" for op in [*ops, LOSS])
    return f'{GRAPH}  params: {{embed: "[V, D]"{params}}}\n  ops:\n{lines}'


def cases(folder: Path) -> dict[str, list[Case]]:
    def saved(name: str, text: str) -> str:
        path = folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def placed(mesh: str, shape: str, *more: str, model: str = "") -> tuple[str, ...]:
        return (model or decoder, "--mesh", mesh, "--shape", shape, *more)

    decoder = saved("decoder", MODEL)
    graphs = {
        f"{n}, {how}": saved(f"{how}-{n}".replace(" ", "-"), write(n))
        for n in LAYERS
        for how, write in (("repeat", repeated), ("written out", written_out))
    }

    return {
        "devices": [Case(f"{n}, {s}", placed(m, s)) for n, (m, s) in DEVICES.items()],
        "layers": [
            Case(str(n), placed(CUBE, AXES[2], "--set", f"architecture.layers={n}")) for n in LAYERS
        ],
        "written-out": [
            Case(label, placed(CUBE, AXES[2], model=file), objective=True)
            for label, file in graphs.items()
        ],
        "axes": [Case(f"{n}, {shape}", placed(CUBE, shape)) for n, shape in AXES.items()],
        "zoo": [Case(name, (name,)) for name in ZOO],
    }


def measure(case: Case) -> Measured:
    command = [sys.executable, "cli.py", *case.arguments, "--quiet", "--format", "json"]
    with tempfile.TemporaryFile() as output:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL)
        status, usage = _wait(process.pid, begun + LIMIT_S)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    return Measured(
        seconds, usage.ru_maxrss * 1024, _result(process.returncode, text, case.objective)
    )


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


def _result(code: int, text: bytes, objective: bool) -> str:
    if code not in (0, 1):
        return f"no plan (exit code {code})"
    document = json.loads(text)
    solver, fits = document["solver"], document["memory"]["fits"]
    gap = "" if solver["gap"] is None else f", gap {solver['gap']:.2%}"
    verdict = "" if fits else ", does not fit"
    cost = f", objective {solver['objective_s']:.9g} s" if objective else ""
    return f"{solver['status']}{gap}{cost}{verdict}"


def table(title: str, rows: Iterable[Case]) -> None:
    print(f"\n| {title} | seconds | peak memory | result |\n| --- | ---: | ---: | --- |")
    for case in rows:
        m = measure(case)
        peak = f"{m.peak_bytes / 2**20:.0f} MiB"
        print(f"| {case.label} | {m.seconds:.1f} | {peak} | {m.result} |", flush=True)


def main(wanted: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known = cases(Path(folder))
        unknown = set(wanted) - known.keys()
        if unknown:
            sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        for name in wanted or known:
            table(name, known[name])


if __name__ == "__main__":
    main(sys.argv[1:])
