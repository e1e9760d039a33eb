"""Halo exchange before an op whose spatial dimensions are split, and the op that a shard runs.

For every operand that a shard reads beyond its own block: the edges of the neighbours' blocks
are handed over, and one pass puts them around the block (with padding where there is nothing).
Where a shard reads just its neighbour's block, handing it over is all.
The geometry is that of `planner.sharding.halo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from costmodels.program import ITEM_BYTES, Kernel
from planner.graph.core import Factor, Op, Rule, Tensor
from planner.sharding.choices import Choice, padded_sums
from planner.sharding.halo import Read, along, split_windows
from planner.sharding.spec import Sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Halo:
    """What happens to operand `slot`: `low` and `high` are the shapes of the pieces from the
    neighbours (None: nothing is needed), `result` that of what the op then reads. `kernel` joins
    them, if there is anything to join."""

    read: Read
    low: Shape | None
    high: Shape | None
    result: Shape
    kernel: Kernel | None

    def bytes(self, dtype: str) -> int:
        """Memory of the pieces and of the result."""
        joined = self.result if self.kernel is not None else None
        shapes = [shape for shape in (self.low, self.high, joined) if shape]
        return sum(prod(shape) for shape in shapes) * ITEM_BYTES[dtype]


def halos(
    op: Op, choice: Choice, tensors: Mapping[str, Tensor], sizes: Sizes
) -> tuple[Halo, ...]:
    """Of every operand and split dimension that needs one, in the order they are made."""
    found = []
    shapes: dict[int, Shape] = {}
    for w in split_windows(op.rule, choice.split):
        for read in along(op, choice.split, sizes, w).reads:
            if read.as_it_lies:
                continue
            tensor = tensors[op.ins[read.slot]]
            whole = choice.operand(op.rule, read.slot).local_shape(tensor.shape, sizes)
            shape = shapes.get(read.slot, whole)
            halo = _halo(op, read, shape, tensor)
            found.append(halo)
            shapes[read.slot] = halo.result
    return tuple(found)


def _halo(op: Op, read: Read, shape: Shape, tensor: Tensor) -> Halo:
    def wide(n: int) -> Shape:
        return (*shape[: read.dim], n, *shape[read.dim + 1 :])

    low, high = (wide(n) if n else None for n in (read.low, read.high))
    result = wide(read.length)
    if read.whole_blocks:
        return Halo(read, low, high, result, None)
    factors = (
        Factor("shard", 1),
        *(Factor(f"d{i}", n) for i, n in enumerate(shape)),
        Factor("reads", read.length),
    )
    own = tuple((1 + i,) for i in range(len(shape)))
    made = tuple((len(factors) - 1,) if i == read.dim else d for i, d in enumerate(own))
    ins = [name for name, piece in (("low", low), ("own", shape), ("high", high)) if piece]
    attrs = {
        "dim": read.dim, "own": read.own, "size": read.size, "low": read.low,
        "starts": read.starts, "length": read.length, "fill": read.fill, "wrap": read.wrap,
    }  # fmt: skip
    rule = Rule(factors, (own,) * len(ins), (made,))
    payload = Op(f"{op.name}.halo", "halo", tuple(ins), ("out",), rule, attrs, op.phase)
    moved = sum(prod(piece) for piece in (low, shape, high, result) if piece)
    size = float(moved * ITEM_BYTES[tensor.dtype])
    kernel = Kernel(
        payload.name, "halo", tensor.dtype, size, 0.0, payload=payload,
        offsets={"shard": read.axes},
    )  # fmt: skip
    return Halo(read, low, high, result, kernel)


def local_op(op: Op, choice: Choice, sizes: Sizes) -> Op:
    """The op as one device runs it, on operands with their halos. `sums` says up to where
    unevenly split factors count that it adds up over (their padding is masked)."""
    local = choice.local(op, sizes)
    sums = padded_sums(op.rule, choice, sizes)
    if sums:
        local = replace(local, attrs={**local.attrs, "sums": sums})
    windows = split_windows(op.rule, choice.split)
    if not windows:
        return local
    changed = {
        key: list(op.attrs[key]) for key in ("spatial", "padding", "results", "own", "crops")
    }
    for w in windows:
        geometry = along(op, choice.split, sizes, w)
        changed["spatial"][w] = geometry.spatial
        changed["padding"][w] = (0, 0)
        changed["results"][w] = geometry.results
        changed["own"][w] = local.rule.factors[op.rule.windows[w][0]].size
        changed["crops"][w] = geometry.crops
    attrs = {**local.attrs, **{key: tuple(value) for key, value in changed.items()}}
    return replace(local, attrs=attrs)
