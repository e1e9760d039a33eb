"""Small networks of convolutions, planned and compiled by XLA's TPU compiler: memory and FLOPs.

    python benchmarks/tpu_convolutions.py [--keep FOLDER] [--half made|held]

Three convolutions with ReLU between them, the first of one tap (like ones would become a loop), the
middle one plain, strided, dilated or transposed, in two and three dimensions, with 3 to 512
channels and 1 to 256 samples on a device. The rules of costmodels/tiling.py were made from every
other case; the held ones were looked at only afterwards. Prints Markdown: predicted / compiled - 1
of each case, and medians of both halves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from planner.export.jax_program import result_program  # noqa: E402
from planner.planning import Options  # noqa: E402
from planner.request import Request, plan  # noqa: E402
from planner.source import Source  # noqa: E402
from planner.verify import (  # noqa: E402
    Compiled,
    Verification,
    compare_compiled,
    compile_result,
    document,
)

DEVICES = 8  # cores of the smallest TPU v3 that libtpu describes
ELEMENTS = 2**25  # about as many numbers are in every activation
MIDDLE = {
    "plain": "conv(h, w2)", "strided": "conv(h, w2, stride=2)",
    "dilated": "conv(h, w2, dilation=2)", "transposed": "conv_transpose(h, w2, stride=2)",
}  # fmt: skip
# (spatial dimensions, samples on a device, channels), each with one of the middles in turn.
GRID = (
    (2, 8, 64), (2, 8, 32), (2, 8, 3), (2, 8, 128), (2, 16, 64), (2, 16, 256), (2, 64, 32),
    (2, 128, 64), (2, 256, 16), (2, 256, 128), (2, 4, 64), (2, 2, 128), (2, 1, 64), (2, 1, 512),
    (3, 8, 64), (3, 8, 3), (3, 8, 128), (3, 16, 32), (3, 1, 32), (3, 1, 64), (3, 1, 128), (3, 1, 3),
    (3, 2, 64), (3, 4, 32), (3, 1, 512), (3, 64, 128),
)  # fmt: skip
QUANTITIES = ("peak", "FLOPs per device", "compute time")


@dataclass(frozen=True)
class Case:
    half: str
    rank: int
    samples: int
    channels: int
    middle: str

    @property
    def name(self) -> str:
        return f"{self.rank}d-{self.samples}x{self.channels}-{self.middle}"

    @property
    def size(self) -> int:
        """Points along every spatial dimension."""
        points = log2(ELEMENTS / (self.samples * self.channels)) / self.rank
        return int(2 ** round(points))

    def text(self) -> str:
        space = "ZYX"[-self.rank :]
        dims = ", ".join(f"{d}: {self.size}" for d in space)
        shape = ", ".join(("B", *space, "C"))
        outer, inner, ones = (", ".join(str(n) * self.rank) for n in (3, 2, 1))
        whole = ", null" * (self.rank + 1)
        middle = inner if self.middle == "transposed" else outer
        return f"""
mesh: {{topology: "tpu-v3:2x2", shape: {{data: {DEVICES}}}}}
dims: {{B: {DEVICES * self.samples}, {dims}, C: {self.channels}}}
training: {{batch: B, optimizer: sgd, compute: bf16, remat: none}}
graph:
  inputs: {{x: "bf16[{shape}]"}}
  params: {{w1: "[{ones}, C, C]", w2: "[{middle}, C, C]", w3: "[{outer}, C, C]"}}
  ops:
    - h = relu(conv(x, w1))
    - m = relu({MIDDLE[self.middle]})
    - y = conv(m, w3)
    - loss = mean(y * y)
constraints: {{x: [data{whole}]}}
"""


def cases() -> Iterator[Case]:
    kinds = tuple(MIDDLE)
    for i, (rank, samples, channels) in enumerate(GRID):
        yield Case(("made", "held")[i % 2], rank, samples, channels, kinds[i // 2 % len(kinds)])


def errors(case: Case, folder: Path | None) -> dict[str, float]:
    """Predicted / compiled - 1 of every quantity. What the compiler made is kept in `folder`."""
    source = Source(case.name, f"{case.name}.yaml", case.text())
    result = plan(Request(source, options=Options())).result
    program = result_program(result)
    kept = None if folder is None else folder / f"{case.name}.json"
    if kept is not None and kept.is_file():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known.pop("program") == program:
            compiled = Compiled(**known)
            return found(compare_compiled(result, compiled))
    compiled = compile_result(result)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"program": program, **asdict(compiled)})
        kept.write_text(text, encoding="utf-8")
    return found(compare_compiled(result, compiled))


def found(verified: Verification) -> dict[str, float]:
    rows = document(verified)["quantities"]
    return {r["name"]: r["error"] for r in rows if r["name"] in QUANTITIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="what was compiled so far")
    parser.add_argument("--half", choices=("made", "held"), help="default: both")
    given = parser.parse_args()
    print("| half | case | points | peak | FLOPs | compute |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    halves: dict[str, list[dict[str, float]]] = {"made": [], "held": []}
    for case in cases():
        if given.half not in (None, case.half):
            continue
        row = errors(case, given.keep)
        halves[case.half].append(row)
        cells = " | ".join(f"{row[q]:+.1%}" for q in QUANTITIES)
        print(f"| {case.half} | `{case.name}` | {case.size} | {cells} |", flush=True)
    for half, rows in halves.items():
        if rows:
            middles = " | ".join(f"{median(abs(r[q]) for r in rows):.1%}" for q in QUANTITIES)
            print(f"| {half} | median of sizes | | {middles} |")


if __name__ == "__main__":
    main()
