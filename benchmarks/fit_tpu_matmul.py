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

import numpy as np

Errors = tuple[np.ndarray, np.ndarray]
ROOT = Path(__file__).resolve().parent.parent

TOPOLOGIES = {
    "v2": "v2:2x2", "v3": "v3:2x2", "v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2", "v7": "tpu7x:2x2x1",
}  # fmt: skip
PRODUCTS = ("dense", "gradient", "f32-result", "batched")
PASSES = ("tpu-v2", "tpu-v3", "tpu-v4")  # chips whose passes are estimated as slow as they are
FITTED = ("compute", "memory", "overhead_s", "drain_s", "result_s", "stream_overhead_s")
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


def fit_tables(samples: Path) -> None:
    """Fit every chip in `samples`; write costmodels/data/tpu-<chip>.yaml and print the errors."""
    sys.path.append(str(ROOT))
    import meshes
    from meshes.document import parse

    rows = _read(samples)
    for name in sorted({row["chip"] for row in rows}):
        entry = f"tpu-{name}"
        example = parse(meshes.catalogue_text(entry), entry).text("example")
        chip = meshes.resolve(example).chip
        products = [r for r in rows if r["chip"] == name and r["form"] in PRODUCTS]
        table, errors, kept = _fit(chip, products)
        stream, overhead = _streams(chip, [r for r in rows if r["chip"] == name], table.memory)
        text = _table_text(entry, table, stream, overhead, errors, len(products), kept)
        (ROOT / "costmodels" / "data" / f"{entry}.yaml").write_text(text, encoding="utf-8")
        print(f"{entry}: {_error_text(errors)}; {kept} of {len(products)} products used")


# Search box of the fit: compute and memory fractions, overhead and drain in microseconds,
# picoseconds per result element of 2 and 4 bytes.
LOWER = np.array([0.5, 0.4, 0.0, 0.0, 0.0, 0.0])
UPPER = np.array([1.0, 0.95, 5.0, 60.0, 40.0, 40.0])
LONG_S = 100e-6


def _fit(chip: Any, products: list[dict[str, str]]) -> tuple[Any, Errors, int]:
    """(table, relative errors of all and of long operations, rows used).

    Least weighted mean |log error|, by a seeded random descent. Rows that the compiler prices below
    the time of their own HBM traffic are left out: it assumed operands that already sit in
    on-chip memory.
    """
    sizes = np.array([[int(r[c]) for c in ("batch", "m", "n", "k")] for r in products], float).T
    wide = np.array([r["form"] == "f32-result" for r in products])
    seconds = np.array([int(r["cycles"]) for r in products]) / chip.clock_hz
    b, m, n, k = sizes
    traffic = b * (2 * (m * k + k * n) + np.where(wide, 4, 2) * m * n)
    real = seconds >= traffic / chip.hbm_bytes_per_s

    def errors(point: np.ndarray) -> np.ndarray:
        return np.log(_predict(chip, _as_table(point), sizes, wide) / seconds)[real]

    # A step's time is in its long operations: a microsecond's error there matters little.
    weight = np.clip(seconds[real] / LONG_S, 0.2, 1.0)
    best = _descend(lambda point: float(np.average(np.abs(errors(point)), weights=weight)))
    found = np.expm1(errors(best))
    return _as_table(best), (found, found[seconds[real] > LONG_S]), int(real.sum())


def _descend(loss: Any) -> np.ndarray:
    """Random descent from several starts, the step shrinking as it stops helping."""
    choose = np.random.default_rng(0)
    best, lowest = LOWER, np.inf
    for _ in range(4):
        point = choose.uniform(LOWER, np.array([1.0, 0.95, 3, 5, 20, 20]))
        value, step = loss(point), 0.3
        while step > 1e-4:
            move = choose.normal(size=point.size) * (choose.random(point.size) < 0.4)
            trial = np.clip(point + step * move * (UPPER - LOWER) * 0.2, LOWER, UPPER)
            attempt = loss(trial)
            step *= 1.1 if attempt < value else 0.99
            if attempt < value:
                point, value = trial, attempt
            step = min(step, 1.0)
        if value < lowest:
            best, lowest = point, value
    return best


def _as_table(point: np.ndarray) -> Any:
    from costmodels.compute import Efficiency

    compute, memory, overhead, drain, narrow, wide = map(float, point)
    results = ((2, narrow * 1e-12), (4, wide * 1e-12))
    return Efficiency(
        compute, memory, overhead * 1e-6, 0.0, drain * 1e-6, results, ((4, 1.0),), (), (1,)
    )


def _predict(chip: Any, table: Any, sizes: np.ndarray, wide: np.ndarray) -> np.ndarray:
    from costmodels.compute import matmul_with

    narrow_s = matmul_with(table, chip, *sizes, dtype="bf16", result_dtype="bf16")
    wide_s = matmul_with(table, chip, *sizes, dtype="bf16", result_dtype="f32")
    return np.where(wide, wide_s, narrow_s)


def _streams(
    chip: Any, rows: list[dict[str, str]], memory: float
) -> tuple[dict[int, float], float]:
    """(fraction of HBM bytes/s by bytes of an element, overhead in seconds) of passes.

    Largest passes for the fractions, smallest for the overhead. From v5 on the estimates of
    element-wise passes lie far under what is measured (v6e copies at 0.83), so those chips
    take the fraction of memory-bound products.
    """

    def rate(form: str, moved: int) -> float:
        best = max((r for r in rows if r["form"] == form), key=lambda r: int(r["cycles"]))
        bytes_moved = moved * int(best["m"]) * int(best["n"])
        return bytes_moved / (int(best["cycles"]) / chip.clock_hz) / chip.hbm_bytes_per_s

    smallest = min(int(r["cycles"]) for r in rows if r["form"] == "copy-f32") / chip.clock_hz
    overhead = smallest - 64 * 512 * 8 / chip.hbm_bytes_per_s
    if chip.name in PASSES:
        narrow = (rate("add-bf16", 6) + rate("gelu-bf16", 4)) / 2
        return {2: narrow, 4: (rate("add-f32", 12) + rate("copy-f32", 8)) / 2}, overhead
    return {2: memory, 4: memory}, overhead


def _error_text(errors: Errors) -> str:
    every, long = (np.abs(e) for e in errors)
    worst = f"90 % within {np.quantile(every, 0.9):.3f}, max {every.max():.3f}"
    text = f"mean {every.mean():.3f}, median {np.median(every):.3f}, {worst}"
    return f"{text}; over 100 us mean {long.mean():.3f}, max {long.max():.3f}"


def _table_text(
    entry: str, table: Any, stream: dict[int, float], overhead: float, errors: Errors,
    total: int, kept: int,
) -> str:  # fmt: skip
    narrow, wide = (value for _, value in table.result_s)
    fitted, derived = [*FITTED, "stream"], ""
    if entry not in PASSES:
        fitted = [*FITTED]
        derived = "  derived: {libtpu: [stream]}   # as memory: estimates of passes are too low\n"
    return f"""\
# Written by benchmarks/fit_tpu_matmul.py; fractions are of the catalogue's rates.
schema_version: 1
sources:
  libtpu: "estimated cycles of libtpu 0.0.52 for {kept} of {total} matmuls"
sizes: [{min(SIZES + ODD_SIZES)}, {max(SIZES + ODD_SIZES)}]
fit_error: "{_error_text(errors)}"
compute: {table.compute:.4f}
memory: {table.memory:.4f}
overhead_s: {table.overhead_s:.3e}
drain_s: {table.drain_s:.3e}
result_s: {{2: {narrow:.3e}, 4: {wide:.3e}}}
stream_overhead_s: {overhead:.3e}
stream: {{2: {stream[2]:.3f}, 4: {stream[4]:.3f}}}
marks:
  fitted: {{libtpu: [{", ".join(fitted)}]}}
{derived}"""


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("chips", nargs="+", choices=sorted(TOPOLOGIES))
    compiling.add_argument("--out", type=Path, required=True)
    fitting = commands.add_parser("fit")
    fitting.add_argument("samples", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compile":
        compile_samples(options.chips, options.out)
        return
    fit_tables(options.samples)


if __name__ == "__main__":
    main(sys.argv[1:])
