"""What shards of a spatial dimension read beyond their own block: halos.

Where an axis splits the spatial dimension of a convolution or pooling, it splits the dimension
of x and that of y alike. A shard of the result then needs a range of the operand that overlaps
the blocks of its neighbours:

    y block of B points from r·B         x from s·r·B - low, (B - 1)·s + reach points of it
    x block of A points from r·A         y whose windows meet the block
    x block, when y are maxima of x      x of all windows that meet the block

(shard r, stride s, padding low). The ranges of all shards are equally long; what lies outside of
the whole dimension counts as padding, that of an unevenly split one too. Only geometry belongs
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from planner.graph.core import Op, Rule
from planner.graph.windows import reach
from planner.sharding.spec import Sizes, block_length

Split = tuple[tuple[str, ...], ...]

# Kind → operand → what a shard reads of it; other operands are read as they lie.
_READS = {
    "conv": {0: "x"}, "conv_dw": {0: "x"}, "conv_dx": {0: "y"},
    "max_pool": {0: "x"}, "max_pool_dx": {0: "around", 1: "y", 2: "y"},
    "shift": {0: "x"}, "avg_pool": {0: "x"}, "avg_pool_dx": {0: "y"},
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """Of dimension `dim` (`size` in blocks of `own`) of operand `slot`, shard r reads
    `length` points from `starts[r]`; `fill` stands for what does not exist. With `wrap` the
    first and the last shard are neighbours. `beyond`: what counts depends on what lies where an
    uneven dimension is padded."""

    slot: int
    dim: int
    axes: tuple[str, ...]
    size: int
    own: int
    starts: tuple[int, ...]
    length: int
    fill: float
    wrap: bool = False
    beyond: bool = False

    @property
    def low(self) -> int:
        """Points from the neighbour before: the most that any shard needs."""
        first = -self.size if self.wrap else 0
        return max(0, *(r * self.own - max(s, first) for r, s in enumerate(self.starts)))

    @property
    def high(self) -> int:
        """Points from the neighbour after."""
        last = 2 * self.size if self.wrap else self.size
        return max(
            0,
            *(
                min(s + self.length, last) - (r + 1) * self.own
                for r, s in enumerate(self.starts)
            ),
        )

    @property
    def whole_blocks(self) -> bool:
        """Whether every shard reads its neighbour's block and nothing else."""
        one = {s - r * self.own for r, s in enumerate(self.starts)}
        whole = self.length == self.own and one in ({self.own}, {-self.own})
        return whole and self.fill == 0 and not self.beyond

    @property
    def as_it_lies(self) -> bool:
        here = all(s == r * self.own for r, s in enumerate(self.starts))
        return here and self.length <= self.own and not self.beyond


@dataclass(frozen=True)
class Along:
    """One split spatial dimension of an op: how its shards compute their part.

    `spatial`: points of x (padding included) that a shard's op works on; `results`: of y.
    `crops[r]`: where its block begins in those points, for ops that make x.
    """

    window: int
    reads: tuple[Read, ...]
    spatial: int
    results: int
    crops: tuple[int, ...]


def split_windows(rule: Rule, split: Split) -> list[int]:
    """Numbers of the spatial dimensions that axes split."""
    return [w for w, (inner, _) in enumerate(rule.windows) if split[inner]]


def along(op: Op, split: Split, sizes: Sizes, window: int) -> Along:
    """The geometry of spatial dimension `window` of `op`, which `split` splits."""
    inner, outer = op.rule.windows[window]
    axes = split[inner]
    shards = range(prod(sizes[a] for a in axes))
    a, b = (block_length(op.rule.factors[f].size, len(shards)) for f in (inner, outer))
    stride = op.attrs["stride"][window]
    low, high = op.attrs["padding"][window]
    extent = reach(op.attrs["taps"][window], op.attrs["dilation"][window])
    wanted = _READS[op.kind]
    if "y" not in wanted.values():
        first = tuple(stride * r * b - low for r in shards)
        spatial, results, crops = (b - 1) * stride + extent, b, first
        ranges = {"x": (first, spatial)}
    else:
        begin = tuple(
            min(-((extent - 1 - low - r * a) // stride), (r * a + low) // stride) for r in shards
        )
        last = ((r * a + a - 1 + low) // stride for r in shards)
        results = max(e - s + 1 for s, e in zip(begin, last, strict=True))
        crops = tuple(r * a + low - stride * s for r, s in enumerate(begin))
        spatial = max((results - 1) * stride + extent, *(c + a for c in crops))
        ranges = {
            "y": (begin, results),
            "around": (tuple(stride * s - low for s in begin), spatial),
        }
    # Single points without a border: no result that counts comes from where there is padding.
    alone = extent == 1 and low == high == 0 and op.kind != "conv_dw"
    reads = [
        _read(op, slot, inner if what != "y" else outer, axes, *ranges[what], alone)
        for slot, what in wanted.items()
    ]
    return Along(window, tuple(reads), spatial, results, crops)


def _read(
    op: Op, slot: int, factor: int, axes: tuple[str, ...], starts: tuple[int, ...], length: int,
    alone: bool,
) -> Read:  # fmt: skip
    dim = op.rule.ins[slot].index((factor,))
    size = op.rule.factors[factor].size
    maxima = op.kind in ("max_pool", "max_pool_dx") and slot == 0
    fill = float("-inf") if maxima else 0.0
    wrap = op.attrs.get("wrap", False)
    own = block_length(size, len(starts))
    beyond = own * len(starts) > size and starts[-1] + length > size and not alone
    return Read(slot, dim, axes, size, own, starts, length, fill, wrap, beyond)


def reaches_neighbours(op: Op, split: Split, sizes: Sizes) -> bool:
    """Whether no shard needs more than its two neighbours have: one shift each way is enough.
    From one end to the other that takes blocks of equal length."""
    return all(
        max(read.low, read.high) <= read.own
        and not (read.wrap and read.size % len(read.starts))
        for w in split_windows(op.rule, split)
        for read in along(op, split, sizes, w).reads
    )
