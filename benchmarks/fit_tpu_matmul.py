"""Calibrate the TPU side of costmodels.compute against XLA's ahead-of-time TPU compiler.

Two steps, in an environment with `jax[cpu]==0.10.2 libtpu==0.0.52` for the first and the
project's own for the second; neither needs a TPU:

    python benchmarks/fit_tpu_matmul.py compile v3 v4 --out samples.csv
    python benchmarks/fit_tpu_matmul.py fit samples.csv          # prints errors, writes tables

`compile` compiles a fixed sample of products (dense, batched, weight-gradient, f32 results)
and element-wise passes for one device of a chip, and reads the cycles that the compiler's own
cost model attributes to the fused operation. `fit` finds the parameters of
costmodels/data/<chip>.yaml. What the compiler thinks is not what a chip does: the estimate
assumes perfect prefetching; see docs/hardware.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOPOLOGIES = {
    "v2": "v2:2x2", "v3": "v3:2x2", "v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2", "v7": "tpu7x:2x2x1",
}  # fmt: skip
FIELDS = ("chip", "form", "batch", "m", "n", "k", "cycles", "total_cycles")

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ODD_SIZES = (96, 192, 320, 640, 1000, 1536, 2560, 5120, 6144, 12288, 25600)
# batch, m, n, k of attention: scores and values for head sizes and lengths of common models.
ATTENTION = tuple(
    (batch, *shape)
    for batch in (8, 32, 128, 512)
    for length in (512, 1024, 2048)
    for head in (64, 128)
    for shape in ((length, length, head), (length, head, length))
)
KNOWN = ((1, 8192, 8192, 8192), (1, 8192, 4096, 8192))


def cases() -> Iterator[tuple[str, int, int, int, int]]:
    """(form, batch, m, n, k): the fixed sample, the same for every chip."""
    choose = random.Random(20240607)
    for shape in KNOWN:
        yield ("dense", *shape)
    for _ in range(130):
        pool = SIZES if choose.random() < 0.7 else ODD_SIZES
        form = choose.choice(("dense", "dense", "dense", "gradient", "f32-result"))
        yield (form, 1, choose.choice(pool), choose.choice(pool), choose.choice(pool))
    for shape in choose.sample(ATTENTION, 36):
        yield ("batched", *shape)
    for rows in (64, 512, 4096, 32768, 131072):
        for columns in (512, 4096):
            for form in ("add-bf16", "add-f32", "copy-f32", "sum-bf16", "gelu-bf16"):
                yield (form, 1, rows, columns, 1)


def compile_samples(chips: list[str], out: Path) -> None:
    """Append one row per case to `out`; needs jax and libtpu."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    done = {tuple(row[f] for f in FIELDS[:6]) for row in _read(out)} if out.exists() else set()
    fresh = not out.exists()
    with out.open("a", newline="") as handle:
        writer = csv.writer(handle)
        if fresh:
            writer.writerow(FIELDS)
        for chip in chips:
            device = _device(chip)
            for case in dict.fromkeys(cases()):
                if (chip, *map(str, case)) in done:
                    continue
                main, total = _cycles(device, *case)
                writer.writerow((chip, *case, main, total))
                handle.flush()


def _device(chip: str) -> Any:
    from jax.experimental import topologies

    extra: dict[str, Any] = {}
    if chip == "v4":  # one device per chip, as programs see it
        bounds = (2, 2, 1)
        extra = {"chip_config_name": "megacore", "chips_per_host_bounds": bounds, "num_slices": 1}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip], **extra
    )
    return described.devices[0]


def _cycles(device: Any, form: str, batch: int, m: int, n: int, k: int) -> tuple[int, int]:
    """(largest operation, all operations) in estimated cycles of the compiled program."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    function, shapes = _program(form, batch, m, n, k)
    arguments = [jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for s, dtype in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = [int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return max(found), sum(found)


def _program(form: str, batch: int, m: int, n: int, k: int) -> tuple[Any, list[Any]]:
    import jax
    import jax.numpy as jnp

    bf16, f32 = jnp.bfloat16, jnp.float32
    products = {
        "dense": ("mk,kn->mn", (m, k), (k, n), bf16),
        "gradient": ("km,kn->mn", (k, m), (k, n), bf16),
        "f32-result": ("mk,kn->mn", (m, k), (k, n), f32),
        "batched": ("bmk,bkn->bmn", (batch, m, k), (batch, k, n), bf16),
    }
    if form in products:
        formula, left, right, result = products[form]

        def product(a: Any, b: Any) -> Any:
            return jnp.einsum(formula, a, b, preferred_element_type=result)

        return product, [(left, bf16), (right, bf16)]
    passes = {
        "add-bf16": (lambda a, b: a + b, 2, bf16),
        "add-f32": (lambda a, b: a + b, 2, f32),
        "copy-f32": (lambda a: -a, 1, f32),
        "sum-bf16": (lambda a: a.astype(f32).sum(-1), 1, bf16),
        "gelu-bf16": (jax.nn.gelu, 1, bf16),
    }
    function, count, dtype = passes[form]
    return function, [((m, n), dtype)] * count


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("chips", nargs="+", choices=sorted(TOPOLOGIES))
    compiling.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    compile_samples(options.chips, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
