"""Measures products and streams on one GPU: the CSV that `plan calibrate` reads.

    python benchmarks/measure_kernels.py kernels.csv      # needs PyTorch and a GPU, about a minute

Medians of twelve runs, after three, each with a cold L2. benchmarks/measured/h100-kernels.csv is
one run of it, and what costmodels/data/h100.yaml is fitted to.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

RUNS, FIRST = 12, 3
FLUSH_BYTES = 2**28  # several times the L2 of any GPU
MOST_BYTES = 30e9  # of one product's operands and result
SIDES = (512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 12288, 16384)
COUNT = 110  # of plain products
ODD = (
    (128, 4096, 4096), (256, 4096, 4096), (384, 8192, 8192), (4096, 4096, 128),
    (8192, 8192, 256), (2048, 50304, 2048), (8192, 32000, 4096),
)  # fmt: skip
# Scores and mixtures of attention: batch, m, n, k.
BATCHED = (
    (32, 2048, 2048, 128), (64, 1024, 1024, 64), (96, 2048, 2048, 64), (128, 1024, 1024, 128),
    (32, 2048, 128, 2048), (64, 1024, 64, 1024), (128, 1024, 128, 1024), (8, 4096, 4096, 128),
)  # fmt: skip
STREAMS_MIB = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


def shapes() -> list[tuple[int, int, int, int]]:
    """(batch, m, n, k): a grid, random sides, narrow ones, attention's."""
    draw = random.Random(0)
    found = {
        (1, m, n, k)
        for m in (1024, 2048, 4096, 8192, 16384)
        for n in (1024, 4096, 12288)
        for k in (1024, 4096, 12288)
    }
    while len(found) < COUNT:
        found.add((1, draw.choice(SIDES), draw.choice(SIDES), draw.choice(SIDES)))
    found.update((1, *sides) for sides in ODD)
    return sorted(found.union(BATCHED))


def seconds(run: Callable[[], object], flush: torch.Tensor) -> float:
    for _ in range(FIRST):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[RUNS // 2] / 1e3


def rows() -> Iterator[tuple[object, ...]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    for batch, m, n, k in shapes():
        if 2 * batch * (m * k + k * n + m * n) > MOST_BYTES:
            continue
        lead = (batch,) if batch > 1 else ()
        x, y = drawn(*lead, m, k), drawn(*lead, k, n)
        out = x @ y
        took = seconds(lambda x=x, y=y, out=out: torch.matmul(x, y, out=out), flush)
        yield "matmul", "bf16", batch, m, n, k, "", f"{took:.7g}"
    for mib in STREAMS_MIB:
        x = drawn(mib * 2**20 // 4)
        out = torch.empty_like(x)
        took = seconds(lambda x=x, out=out: torch.mul(x, 1.5, out=out), flush)
        yield "stream", "bf16", "", "", "", "", 4 * x.numel(), f"{took:.7g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "dtype", "batch", "m", "n", "k", "bytes", "seconds"])
        writer.writerows(rows())


if __name__ == "__main__":
    main()
