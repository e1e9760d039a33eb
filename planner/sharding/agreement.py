"""Where a plan asks something of a tensor that propagation cannot know.

A reader finds a tensor in the spec where it lies and follows it, with two exceptions that every
compiler makes: dimensions that are summed over may be gathered, since their axes can be needed
elsewhere in the same product (weights stored in pieces, activations split along the model
dimension), and whatever is whole may be split further. Every other resharding is a *dispute*: two
tensors at an op ask for different things, and compilers settle that differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.graph.builder import contraction_sizes
from planner.graph.core import Graph, Op
from planner.sharding.flow import Conversion
from planner.sharding.spec import Spec

Axes = tuple[str, ...]

DISPUTE = 2.0
# A weight lies split where its product is not. The product is known from elsewhere more often
# than not: what it is added to or read with is larger, and the same for all layers.
DISPUTE_OF_WEIGHT = 1.0


@dataclass
class Agreement:
    """Counts the disputes of conversions in the forward pass of `graph`."""

    graph: Graph
    weights: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = self.graph.of_parameters()
        self._readers: dict[str, list[tuple[Op, int]]] = {}
        for op, _ in self.graph.walk():
            if op.phase == "forward":
                for slot, name in enumerate(op.ins):
                    self._readers.setdefault(name, []).append((op, slot))
        self._slices: dict[str, list[str]] = {}
        for loop in self.graph.loops():
            for read in loop.reads:
                self._slices.setdefault(read.outer, []).append(read.inner)
        self._summed: dict[str, frozenset[int] | None] = {}

    def disputes(
        self, c: Conversion, sources: Sequence[Spec], targets: Sequence[Spec]
    ) -> NDArray[np.float64]:
        """What to count for every pair of specs: an array of shape (sources, targets)."""
        found = np.zeros((len(sources), len(targets)))
        if c.phase != "forward":
            return found
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                found[i, j] = self.between(c.tensor, source, target)
        return found

    def between(self, name: str, source: Spec, target: Spec) -> float:
        """What to count where tensor `name` lies one way and is needed another way."""
        summed = self._summed_dims(name) or frozenset()
        return _disputes(source, target, summed, name in self.weights)

    def leaves_sum(self, name: str, source: Spec, target: Spec) -> bool:
        """Whether an axis that splits what is to be summed over is to split another dimension:
        a compiler that is not told before the product sums over it."""
        summed = self._summed_dims(name) or frozenset()
        return bool(_gathered(source, target, summed).intersection(target.axes))

    def _summed_dims(self, name: str) -> frozenset[int] | None:
        """The dimensions that all of its readers sum over, counted from the last one as -1.
        None without readers."""
        if name not in self._summed:
            each = [self._summed_by(op, slot) for op, slot in self._readers.get(name, [])]
            each += [self._summed_dims(inner) for inner in self._slices.get(name, [])]
            known = [dims for dims in each if dims is not None]
            self._summed[name] = frozenset.intersection(*known) if known else None
        return self._summed[name]

    def _summed_by(self, op: Op, slot: int) -> frozenset[int] | None:
        dims = op.rule.ins[slot]
        if contraction_sizes(op) is not None:
            kept = {f for out in op.rule.outs for d in out for f in d}
            return frozenset(
                i - len(dims) for i, factors in enumerate(dims) if not kept.intersection(factors)
            )
        if len(op.ins) == 1 and op.rule.outs == (dims,):  # a cast: as the result is read
            return self._summed_dims(op.outs[0])
        return frozenset()


def _disputes(source: Spec, target: Spec, summed: frozenset[int], weight: bool) -> float:
    dims = _dims(source, target)
    followed = {i for i, (lies, read) in dims.items() if read[: len(lies)] == lies}
    if not followed.issuperset(dims.keys() - summed):
        return DISPUTE_OF_WEIGHT if weight else DISPUTE
    if followed.issuperset(dims):
        return 0.0
    # Summed over by some of the axes, and gathered along others: which, nobody can know. Nor that
    # an axis is to leave the sum for another dimension.
    parted = any(dims[i][1] for i in summed.intersection(dims))
    moved = _gathered(source, target, summed).intersection(target.axes)
    return DISPUTE if parted or moved else 0.0


def _gathered(source: Spec, target: Spec, of: frozenset[int]) -> set[str]:
    """The axes of dimensions `of` that these do not keep."""
    dims = _dims(source, target)
    return {a for i in of.intersection(dims) for a in dims[i][0] if a not in dims[i][1]}


def _dims(source: Spec, target: Spec) -> dict[int, tuple[Axes, Axes]]:
    """By dimension, counted from the last one as -1; a slice lies like its stack."""
    both = min(len(source.dims), len(target.dims))
    return {-i: (source.dims[-i], target.dims[-i]) for i in range(1, both + 1)}
