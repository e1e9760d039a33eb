"""Values of single ops in NumPy: what a kernel computes from whole or local arrays.

The same functions serve the single-device graph and the virtual devices: `indices` gives the
global index of every position along a factor, so a shard knows where it lies. What sums must not
count, beyond the end of an unevenly split factor, is masked (`attrs["sums"]`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.graph import expr as ex
from planner.graph.core import Op
from planner.values import structural_kernels, window_kernels

Array = NDArray[Any]
Offsets = Mapping[str, int]
Evaluator = Callable[[Op, Sequence[Array], Offsets], tuple[Array, ...]]


def evaluate(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    """Results of `op` on local arrays; `offsets[f]` is the first global index along factor f."""
    return EVALUATORS[op.kind](op, args, offsets)


def _map(op: Op, args: Sequence[Array], offsets: Offsets) -> tuple[Array, ...]:
    factors = op.rule.factors
    if op.attrs.get("onehot") == "take":
        return (_take(op, args, offsets),)
    if op.attrs.get("onehot") == "scatter":
        return (_scatter(op, args, offsets),)
    sizes = _local_sizes(op, args)
    rank = len(factors)
    spread = [_spread(a, dims, rank) for a, dims in zip(args, op.rule.ins, strict=True)]
    indices = {
        f.name: (offsets.get(f.name, 0) + np.arange(sizes[i])).reshape(
            [-1 if j == i else 1 for j in range(rank)]
        )
        for i, f in enumerate(factors)
    }
    nothing = -np.inf if op.rule.combiner == "max" else 0.0
    found = []
    for k, e in enumerate(op.attrs["exprs"]):
        value = ex.evaluate(e, spread, indices)
        for name, size in op.attrs.get("sums", {}).items():
            value = np.where(indices[name] < size, value, nothing)
        found.append(_reduce(op, value, sizes, op.rule.outs[k]))
    return tuple(found)


def _local_sizes(op: Op, args: Sequence[Array]) -> list[int]:
    sizes = [f.size for f in op.rule.factors]
    for array, dims in zip(args, op.rule.ins, strict=True):
        for n, d in zip(array.shape, dims, strict=True):
            sizes[d[0]] = n
    return sizes


def _spread(array: Array, dims: Sequence[Sequence[int]], rank: int) -> Array:
    """`array` with one axis per factor of the op, in factor order, for broadcasting."""
    order = sorted(range(len(dims)), key=lambda i: dims[i][0])
    shape = [1] * rank
    for i, d in enumerate(dims):
        shape[d[0]] = array.shape[i]
    return np.transpose(array, order).reshape(shape)


def _reduce(op: Op, value: Any, sizes: Sequence[int], out: Sequence[Sequence[int]]) -> Array:
    full = np.broadcast_to(np.asarray(value, dtype=np.float64), sizes)
    kept = [d[0] for d in out]
    gone = tuple(i for i in range(len(sizes)) if i not in kept)
    if gone:
        full = full.max(axis=gone) if op.rule.combiner == "max" else full.sum(axis=gone)
    ordered = sorted(kept)
    return np.array(np.transpose(full, [ordered.index(k) for k in kept]))


def _take(op: Op, args: Sequence[Array], offsets: Offsets) -> Array:
    """table[ids] where the local rows of the table hold the id, else 0."""
    table, ids = args
    rows = table.shape[0]
    local = ids.astype(np.int64) - offsets.get(op.attrs["along"], 0)
    inside = (local >= 0) & (local < rows)
    return np.where(inside[..., None], table[np.clip(local, 0, rows - 1)], 0.0)


def _scatter(op: Op, args: Sequence[Array], offsets: Offsets) -> Array:
    """Sum of cotangent rows by id, for the rows that live here."""
    args = structural_kernels.counted(op, args, offsets)
    ids, rows = args if args[0].ndim < args[1].ndim else args[::-1]
    along = op.attrs["along"]
    size = next(f.size for f in op.rule.factors if f.name == along)
    local = ids.astype(np.int64) - offsets.get(along, 0)
    inside = (local >= 0) & (local < size)
    out = np.zeros((size, rows.shape[-1]))
    np.add.at(out, local[inside], rows[inside])
    return out


EVALUATORS: dict[str, Evaluator] = {
    "map": _map,
    **structural_kernels.EVALUATORS,
    **window_kernels.EVALUATORS,
}
