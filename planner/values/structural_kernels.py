"""Values of reshape, concat, slice, pad, put, pop, cumsum, sort and their gradients in NumPy.

The rearranged dimension is whole on every device, so `op.attrs` describe it; all other sizes
come from the arrays, which may be shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.graph.core import Op

Array = NDArray[Any]
Offsets = Mapping[str, int]


def local_sizes(op: Op, args: Sequence[Array]) -> list[int]:
    """Size of every factor here: the rule's, or less where an array is a shard of the rule's.

    In a dimension of several factors shards are contiguous, so the major one is cut first.
    """
    sizes = [f.size for f in op.rule.factors]
    for array, dims in zip(args, op.rule.ins, strict=True):
        for n, dim in zip(array.shape, dims, strict=True):
            parts = prod(op.rule.factors[f].size for f in dim) // n
            for f in dim:
                cut = gcd(op.rule.factors[f].size, parts)
                sizes[f] = op.rule.factors[f].size // cut
                parts //= cut
    return sizes


def counted(op: Op, args: Sequence[Array], offsets: Offsets) -> list[Array]:
    """Operands of a sum of products, zero beyond the end of every unevenly split factor that it
    adds up over."""
    names = [f.name for f in op.rule.factors]
    found = list(args)
    for name, size in op.attrs.get("sums", {}).items():
        for i, dims in enumerate(op.rule.ins):
            if (names.index(name),) in dims:
                axis = dims.index((names.index(name),))
                at = offsets[name] + np.arange(found[i].shape[axis])
                kept = (at < size).reshape([-1 if d == axis else 1 for d in range(len(dims))])
                found[i] = np.where(kept, found[i], 0)
    return found


def _along(array: Array, axis: int, part: slice) -> tuple[slice, ...]:
    return tuple(part if i == axis else slice(None) for i in range(array.ndim))


def _reshape(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    sizes = local_sizes(op, args)
    return (args[0].reshape([prod(sizes[f] for f in dim) for dim in op.rule.outs[0]]),)


def _concat(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    return (np.concatenate(args, axis=op.attrs["axis"]),)


def _slice(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    start, stop, step = op.attrs["bounds"]
    return (args[0][_along(args[0], op.attrs["axis"], slice(start, stop, step))],)


def _pad(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    x, axis = args[0], op.attrs["axis"]
    low, high, interior = op.attrs["padding"]
    spread = (x.shape[axis] - 1) * (interior + 1) + 1
    shape = [low + spread + high if i == axis else n for i, n in enumerate(x.shape)]
    out = np.full(shape, op.attrs["value"], dtype=x.dtype)
    out[_along(x, axis, slice(low, low + spread, interior + 1))] = x
    return (out,)


def _put(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    buffer, row, slot = args
    out = np.array(buffer)
    out[int(slot)] = row
    return (out,)


def _pop(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    buffer, slot = args
    rest = np.array(buffer)
    rest[int(slot)] = 0
    return np.array(buffer[int(slot)]), rest


def _cumsum(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    axis = op.attrs["axis"]
    x = np.flip(args[0], axis) if op.attrs["reverse"] else args[0]
    total = np.cumsum(x, axis)
    if op.attrs["exclusive"]:
        total = total - x
    return (np.flip(total, axis) if op.attrs["reverse"] else total,)


def _sort(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    x, axis = args[0], op.attrs["axis"]
    order = np.argsort(-x if op.attrs["descending"] else x, axis=axis, kind="stable")
    kept = order[_along(x, axis, slice(op.attrs["keep"]))]
    return np.take_along_axis(x, kept, axis), kept


def _unsort(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    places, g = args
    axis = op.attrs["axis"]
    out = np.zeros([op.attrs["size"] if i == axis else n for i, n in enumerate(g.shape)])
    np.put_along_axis(out, places.astype(np.int64), g, axis)
    return (out,)


EVALUATORS: dict[str, Callable[[Op, Sequence[Array], Offsets], tuple[Array, ...]]] = {
    "reshape": _reshape,
    "concat": _concat,
    "slice": _slice,
    "pad": _pad,
    "put": _put,
    "pop": _pop,
    "cumsum": _cumsum,
    "sort": _sort,
    "unsort": _unsort,
}
