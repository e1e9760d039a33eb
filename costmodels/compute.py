"""Seconds of one local operation: a roofline with measured efficiency, per chip.

Matmuls, TPU (systolic array). C is the arithmetic, M the HBM traffic, R the work on results
(adding up and narrowing them in the vector unit), each at its fitted rate:

    seconds = overhead + largest + min(second, drain) + min(third, drain)

The compiler overlaps the three, except while the first block comes in and the last goes out:
that is `drain`, about the time to fill the on-chip memory once. Elementwise work inside of a
product (see planner.lowering.inside) adds its time in the vector unit: so the compiler's estimates
for attention on v4, with two to seven operations per element, are met to a tenth.

Matmuls, GPU (multiprocessors). The result is cut in tiles, tiles run in waves of one per
multiprocessor, the last wave is as long as a full one; the best of a few tile sizes and
splits of the contracted dimension is taken, as vendor libraries do. A tile takes the time of its
contracted length and of a fixed length more, for filling and draining:

    seconds = launch + max(waves * tile time + adding up the splits, HBM traffic)

Streams (element-wise passes, reductions, optimizer updates) take the time of their HBM bytes
at the measured efficiency, or of their vector arithmetic if that is longer.

The parameters are in data/<chip.efficiency>.yaml, with their sources and how well they fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from meshes import Chip, canonical_dtype

_REGISTER_ROWS = 8  # a TPU vector register holds 8 x 128 words (scaling-book, "tpus")
_ITEM_BYTES = {"f8": 1, "i8": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}


@dataclass(frozen=True)
class Efficiency:
    """Fitted parameters of one chip; fractions are of the catalogue's rates.

    compute, memory: of peak FLOP/s and of HBM bytes/s inside a matmul.
    result_s: seconds per result element, by bytes of an element.
    stream: fraction of HBM bytes/s of element-wise passes, by bytes of an element.
    tiles: (m, n, fraction of a multiprocessor's peak), GPUs only.
    fill: filling and draining a tile, in units of contracted length, GPUs only.
    eager_dispatch_s: Chip.dispatch_s of a machine whose framework issues op by op.
    sizes: the smallest and the largest side of products that were fitted to, where that is known.
    """

    compute: float
    memory: float
    overhead_s: float
    stream_overhead_s: float
    drain_s: float
    result_s: tuple[tuple[int, float], ...]
    stream: tuple[tuple[int, float], ...]
    tiles: tuple[tuple[int, int, float], ...]
    splits: tuple[int, ...]
    fill: float = 0.0
    eager_dispatch_s: float = 0.0
    sizes: tuple[int, int] | None = None


def matmul_seconds(
    chip: Chip,
    batch: ArrayLike,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    dtype: str = "bf16",
    result_dtype: str | None = None,
    vector_flops: ArrayLike = 0.0,
    more_bytes: ArrayLike = 0.0,
) -> float | np.ndarray:
    """Time of `batch` products [m, k] × [k, n] on one device; vectorised over the sizes.

    `dtype` is that of the operands, and of the result unless `result_dtype` is given. On TPUs a
    product may do `vector_flops` of elementwise work, too, and read `more_bytes` for it. Zero
    if a size is zero. Raises ValueError for negative sizes or an unknown dtype.
    """
    table = efficiency(chip.efficiency)
    return matmul_with(
        table, chip, batch, m, n, k, dtype=dtype, result_dtype=result_dtype,
        vector_flops=vector_flops, more_bytes=more_bytes,
    )  # fmt: skip


def matmul_with(
    table: Efficiency,
    chip: Chip,
    batch: ArrayLike,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    dtype: str,
    result_dtype: str | None = None,
    vector_flops: ArrayLike = 0.0,
    more_bytes: ArrayLike = 0.0,
) -> float | np.ndarray:
    """matmul_seconds with another table than the chip's own: what a fit varies."""
    sizes = [np.asarray(x, dtype=float) for x in (batch, m, n, k)]
    if any(np.any(x < 0) for x in sizes):
        raise ValueError("matmul sizes must not be negative")
    b, rows, columns, inner = np.broadcast_arrays(*sizes)
    item, result_item = _item_bytes(dtype), _item_bytes(result_dtype or dtype)
    traffic = b * (item * (rows * inner + inner * columns) + result_item * rows * columns)
    memory = (traffic + np.asarray(more_bytes)) / (chip.hbm_bytes_per_s * table.memory)
    peak = chip.peak_flops(dtype)
    if chip.matrix_unit.kind == "mxu":
        arithmetic = _padded_flops(chip, b, rows, columns, inner) / (peak * table.compute)
        results = b * rows * columns * _by_item(table.result_s, result_item)
        seconds = _overlapped(table, arithmetic, memory, results)
        seconds = seconds + np.asarray(vector_flops) / chip.vector_flops
    else:
        seconds = _tiled(chip, table, peak, b, rows, columns, inner, memory)
    seconds = np.where(b * rows * columns * inner > 0, seconds, 0.0)
    return float(seconds) if seconds.ndim == 0 else seconds


def stream_seconds(
    chip: Chip, bytes: ArrayLike, flops: ArrayLike = 0.0, dtype: str = "bf16"
) -> float | np.ndarray:
    """Time of a pass that moves `bytes` through HBM and does `flops` of vector arithmetic.

    `dtype` is that of the arrays: chips whose vector unit is 32 bits wide lose time on
    widening and narrowing. Zero if there is nothing to do. Raises ValueError for negatives.
    """
    return stream_with(efficiency(chip.efficiency), chip, bytes, flops, dtype=dtype)


def stream_with(
    table: Efficiency, chip: Chip, bytes: ArrayLike, flops: ArrayLike = 0.0, *, dtype: str
) -> float | np.ndarray:
    """stream_seconds with another table than the chip's own: what a fit varies."""
    moved, work = np.broadcast_arrays(np.asarray(bytes, float), np.asarray(flops, float))
    if np.any(moved < 0) or np.any(work < 0):
        raise ValueError("bytes and flops must not be negative")
    rate = chip.hbm_bytes_per_s * _by_item(table.stream, _item_bytes(dtype))
    busy = np.maximum(moved / rate, work / chip.vector_flops)
    start = chip.launch_s + table.stream_overhead_s
    seconds = np.where(busy > 0, start + busy, 0.0)
    return float(seconds) if seconds.ndim == 0 else seconds


def _padded_flops(
    chip: Chip, b: np.ndarray, m: np.ndarray, n: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """FLOPs of a systolic array: k and the longer of m, n fill whole tiles.

    The compiler streams the shorter side, eight rows (one vector register) at a time.
    """
    tile = chip.matrix_unit.tile
    streamed = np.ceil(np.minimum(m, n) / _REGISTER_ROWS) * _REGISTER_ROWS
    held = np.ceil(np.maximum(m, n) / tile[1]) * tile[1]
    return 2 * b * streamed * held * np.ceil(k / tile[2]) * tile[2]


def _overlapped(
    table: Efficiency, arithmetic: np.ndarray, memory: np.ndarray, results: np.ndarray
) -> np.ndarray:
    """TPU: three overlapping kinds of work, see the module's head."""
    third, second, largest = np.sort(np.stack([arithmetic, memory, results]), axis=0)
    drain = np.minimum(second, table.drain_s) + np.minimum(third, table.drain_s)
    return table.overhead_s + largest + drain


def _tiled(
    chip: Chip,
    table: Efficiency,
    peak: float,
    b: np.ndarray,
    m: np.ndarray,
    n: np.ndarray,
    k: np.ndarray,
    memory: np.ndarray,
) -> np.ndarray:
    """GPU: the best tile and split of the contracted dimension."""
    units = chip.matrix_unit.units
    step = chip.matrix_unit.tile[2]
    best = np.full(b.shape, np.inf)
    for tile_m, tile_n, fraction in table.tiles:
        count = b * np.ceil(m / tile_m) * np.ceil(n / tile_n)
        for split in table.splits:
            depth = np.ceil(k / split / step) * step + table.fill
            tile_s = 2 * tile_m * tile_n * depth * units / (peak * fraction * table.compute)
            # Every split writes partial sums in f32 and one pass reads them all.
            adding = 8 * split * b * m * n / chip.hbm_bytes_per_s if split > 1 else 0.0
            best = np.minimum(best, np.ceil(count * split / units) * tile_s + adding)
    return chip.launch_s + table.overhead_s + np.maximum(best, memory)


def _item_bytes(dtype: str) -> int:
    name = canonical_dtype(dtype)
    if name not in _ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(_ITEM_BYTES)}")
    return _ITEM_BYTES[name]


def _by_item(rows: tuple[tuple[int, float], ...], item: int) -> float:
    """Entry of the narrowest type at least as wide as `item`, else of the widest."""
    for width, value in rows:
        if item <= width:
            return value
    return rows[-1][1]


@cache
def efficiency(name: str) -> Efficiency:
    """The table that a chip names: one of costmodels/data, or one written out as JSON.

    ValueError if there is none of that name, or if the JSON is no table.
    """
    if name.startswith("{"):
        try:
            return from_data(json.loads(name))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"efficiency is no table of a chip: {error!r}") from None
    path = files("costmodels") / "data" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no fitted efficiency table {name!r} in costmodels/data")
    return from_data(yaml.safe_load(path.read_text(encoding="utf-8")))


def from_data(data: Mapping[str, Any]) -> Efficiency:
    """A table as YAML or JSON holds it; widths of types may be text, as JSON has them."""
    return Efficiency(
        compute=float(data["compute"]),
        memory=float(data["memory"]),
        overhead_s=float(data["overhead_s"]),
        stream_overhead_s=float(data["stream_overhead_s"]),
        drain_s=float(data.get("drain_s", 0)),
        result_s=_table(data.get("result_s", {4: 0})),
        stream=_table(data["stream"]),
        tiles=tuple((int(m), int(n), float(e)) for m, n, e in data.get("tiles", ())),
        splits=tuple(data.get("splits", (1,))),
        fill=float(data.get("fill", 0)),
        eager_dispatch_s=float(data.get("eager_dispatch_s", 0)),
        sizes=(int(data["sizes"][0]), int(data["sizes"][1])) if "sizes" in data else None,
    )


def to_data(table: Efficiency) -> dict[str, Any]:
    """What `from_data` reads."""
    return {
        "compute": table.compute, "memory": table.memory, "overhead_s": table.overhead_s,
        "stream_overhead_s": table.stream_overhead_s, "drain_s": table.drain_s,
        "result_s": {str(width): value for width, value in table.result_s},
        "stream": {str(width): value for width, value in table.stream},
        "tiles": [list(tile) for tile in table.tiles], "splits": list(table.splits),
        "fill": table.fill, "eager_dispatch_s": table.eager_dispatch_s,
        **({} if table.sizes is None else {"sizes": list(table.sizes)}),
    }  # fmt: skip


def _table(rows: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted((int(width), float(value)) for width, value in rows.items()))
