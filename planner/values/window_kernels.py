"""Values of convolutions, pooling and upsampling in NumPy, from whole or local arrays.

Batch and channel sizes come from the arrays, which may be shards; spatial sizes and window
geometry from the op's attributes (see `planner.graph.windows.Window`), of which a shard's op has
its own (`planner.lowering.halo`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.graph.core import Op
from planner.values.structural_kernels import counted, local_sizes

Array = NDArray[Any]
Offsets = Mapping[str, int]
Slices = tuple[slice, ...]


def _taps(op: Op) -> Iterator[tuple[tuple[int, ...], Slices]]:
    """Every tap of the window, and the points of the padded x [b, spatial…] that it meets."""
    a = op.attrs
    results = a["results"]
    for tap in product(*(range(k) for k in a["taps"])):
        met = (
            slice(k * d, k * d + s * (n - 1) + 1, s)
            for k, d, s, n in zip(tap, a["dilation"], a["stride"], results, strict=True)
        )
        yield tap, (slice(None), *met)


def _padded(op: Op, x: Array, value: float = 0.0) -> Array:
    """x [batch, spatial…, C] with the window's padding."""
    pads = [(0, 0), *op.attrs["padding"], (0, 0)]
    return np.pad(x.astype(np.float64), pads, constant_values=value)


def _own(op: Op, x: Array, offsets: Offsets) -> Array:
    """Of the padded x what belongs to this shard."""
    names = (op.rule.factors[inner].name for inner, _ in op.rule.windows)
    inside = []
    for name, own, crops in zip(names, op.attrs["own"], op.attrs["crops"], strict=True):
        start = crops[offsets.get(name, 0) // own]
        inside.append(slice(start, start + own))
    index = (slice(None), *inside)
    return x[index]


def _zeros(op: Op, batch: int, channels: int) -> Array:
    """The padded x, all zero."""
    pads, sizes = op.attrs["padding"], op.attrs["spatial"]
    padded = (n + lo + hi for n, (lo, hi) in zip(sizes, pads, strict=True))
    return np.zeros((batch, *padded, channels))


def _flat(op: Op, array: Array) -> tuple[Array, tuple[int, ...]]:
    """`array` with all leading dimensions merged into one, and what they were."""
    lead = array.shape[: array.ndim - len(op.attrs["taps"]) - 1]
    return array.reshape(prod(lead), *array.shape[len(lead) :]), lead


# ---- convolution: x [b, points, g, c], w [taps, c, g, n], y [b, points, g, n] -----------------


def _split(array: Array, groups: int) -> Array:
    """[b, spatial…, (g, c)] → [b, points, g, c]."""
    points = prod(array.shape[1:-1])
    return array.reshape(array.shape[0], points, groups, array.shape[-1] // groups)


def _groups(op: Op, args: Sequence[Array]) -> int:
    """Number of channel groups that live here."""
    group = op.attrs["parts"]["b"]
    return local_sizes(op, args)[group[0]] if group else 1


def _tap_filter(op: Op, tap: Array, groups: int) -> Array:
    """One tap of w as [c, g, n]."""
    first, last = tap.shape
    split = tap.reshape(first, groups, last // groups)
    return split.transpose(2, 1, 0) if op.attrs["flipped"] else split


def _conv(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    args = counted(op, args, offsets)
    (x, lead), w, groups = _flat(op, args[0]), args[1], _groups(op, args)
    padded = _padded(op, x)
    total: Any = 0.0
    for tap, points in _taps(op):
        read = _split(padded[points], groups)
        total = total + np.einsum("bpgc,cgn->bpgn", read, _tap_filter(op, w[tap], groups))
    return (total.reshape(*lead, *op.attrs["results"], prod(total.shape[2:])),)


def _conv_dx(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    args = counted(op, args, offsets)
    (y, lead), w, groups = _flat(op, args[0]), args[1], _groups(op, args)
    channels = w.shape[-1] if op.attrs["flipped"] else w.shape[-2] * groups
    padded = _zeros(op, y.shape[0], channels)
    split = _split(y, groups)
    for tap, points in _taps(op):
        part = np.einsum("bpgn,cgn->bpgc", split, _tap_filter(op, w[tap], groups))
        padded[points] += part.reshape(y.shape[0], *op.attrs["results"], channels)
    return (_own(op, padded, offsets).reshape(*lead, *op.attrs["own"], channels),)


def _conv_dw(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    args = counted(op, args, offsets)
    (x, _), (y, _), groups = _flat(op, args[0]), _flat(op, args[1]), _groups(op, args)
    padded, split = _padded(op, x), _split(y, groups)
    form = "bpgc,bpgn->ngc" if op.attrs["flipped"] else "bpgc,bpgn->cgn"
    taps = [
        np.einsum(form, _split(padded[points], groups), split)
        for _, points in _taps(op)
    ]
    first, *last = taps[0].shape
    return (np.stack(taps).reshape(*op.attrs["taps"], first, prod(last)),)


# ---- pooling and upsampling --------------------------------------------------------------------


def _max_pool(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    x, lead = _flat(op, args[0])
    padded = _padded(op, x, -np.inf)
    reads = [padded[points] for _, points in _taps(op)]
    top = np.maximum.reduce(reads)
    return (top.reshape(*lead, *top.shape[1:]),)


def _max_pool_dx(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    """Of the taps that attain the maximum the first one takes the cotangent."""
    (x, lead), (y, _), (g, _) = (_flat(op, a) for a in args)
    padded, out = _padded(op, x, -np.inf), _zeros(op, x.shape[0], x.shape[-1])
    free = np.ones(y.shape, dtype=bool)
    for _, points in _taps(op):
        top = free & (padded[points] == y)
        out[points] += g * top
        free &= ~top
    return (_own(op, out, offsets).reshape(*lead, *op.attrs["own"], x.shape[-1]),)


def _avg_pool(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    x, lead = _flat(op, args[0])
    padded = _padded(op, x)
    mean = sum(padded[points] for _, points in _taps(op)) / prod(op.attrs["taps"])
    return (np.asarray(mean).reshape(*lead, *op.attrs["results"], x.shape[-1]),)


def _avg_pool_dx(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    g, lead = _flat(op, args[0])
    out = _zeros(op, g.shape[0], g.shape[-1])
    for _, points in _taps(op):
        out[points] += g / prod(op.attrs["taps"])
    return (_own(op, out, offsets).reshape(*lead, *op.attrs["own"], g.shape[-1]),)


def _upsample(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    out = args[0]
    for axis, times in enumerate(op.attrs["times"], start=1):
        out = np.repeat(out, times, axis)
    return (out,)


def _upsample_dx(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    g, times = args[0], op.attrs["times"]
    pairs = [n for size, t in zip(g.shape[1:-1], times, strict=True) for n in (size // t, t)]
    split = g.reshape(g.shape[0], *pairs, g.shape[-1])
    return (split.sum(axis=tuple(range(2, 2 * len(times) + 1, 2))),)


def _shift(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    """A shard's op gets its operand moved already: then there is no padding."""
    x, ((low, _),) = args[0], op.attrs["padding"]
    axis = op.attrs["axis"]
    kept = np.roll(x, low, axis)
    if op.attrs["wrap"]:
        return (kept,)
    gone = slice(0, low) if low >= 0 else slice(low, None)
    kept[tuple(gone if i == axis else slice(None) for i in range(x.ndim))] = 0
    return (kept,)


# ---- halos -------------------------------------------------------------------------------------


def _halo(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    """What a shard reads of a dimension: its own block, between pieces of its neighbours'."""
    a = op.attrs
    axis, first = a["dim"], offsets["shard"] * a["own"] - a["low"]
    joined = np.concatenate(list(args), axis=axis)
    at = a["starts"][offsets["shard"]] + np.arange(a["length"])  # positions in the whole
    low, high = first, first + joined.shape[axis]
    if not a["wrap"]:
        low, high = max(low, 0), min(high, a["size"])
    here = (at >= low) & (at < high)
    read = np.take(joined, np.where(here, at - first, 0), axis=axis).astype(np.float64)
    mask = here.reshape([-1 if i == axis else 1 for i in range(joined.ndim)])
    return (np.where(mask, read, a["fill"]),)


EVALUATORS: dict[str, Callable[[Op, Sequence[Array], Offsets], tuple[Array, ...]]] = {
    "conv": _conv,
    "conv_dx": _conv_dx,
    "conv_dw": _conv_dw,
    "max_pool": _max_pool,
    "max_pool_dx": _max_pool_dx,
    "avg_pool": _avg_pool,
    "avg_pool_dx": _avg_pool_dx,
    "upsample": _upsample,
    "upsample_dx": _upsample_dx,
    "shift": _shift,
    "halo": _halo,
}
