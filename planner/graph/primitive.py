"""What ops that are no `map` share: distinct factor names, naming a dimension, emission.

Ops themselves belong to `structural.py` (data movement) and `windows.py` (convolution, pooling).
Besides its own attributes every such op carries

    visits   the factors whose product is the number of points it visits
    work     vector operations at each of these points (0: it only moves data)
    matmul   (products only) the factors of batch, m, n and k of the equivalent matmul
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from planner.graph.builder import Builder, GraphError
from planner.graph.core import Factor, Op, Rule, Tensor


@dataclass
class FactorList:
    """The factors of one rule, numbered in the order they are added."""

    factors: list[Factor] = field(default_factory=list)

    def add(self, label: str, size: int, kind: str = "parallel") -> int:
        """Number of a new factor called `label`, primed while another one has that name."""
        names = {f.name for f in self.factors}
        while label in names:
            label += "'"
        self.factors.append(Factor(label, size, kind))
        return len(self.factors) - 1


def axis_of(b: Builder, name: str, tensor: str, dim: int | str) -> int:
    """Position of dimension `dim` (its name, or a number that may be negative) of `tensor`."""
    t = b.lookup(tensor)
    if isinstance(dim, str):
        if t.dims.count(dim) != 1:
            count = "no" if dim not in t.dims else "more than one"
            raise GraphError(f"{name}: '{tensor}' {list(t.dims)} has {count} dimension '{dim}'")
        return t.dims.index(dim)
    if not -len(t.shape) <= dim < len(t.shape):
        raise GraphError(
            f"{name}: '{tensor}' {list(t.dims)} has {len(t.shape)} dimensions, none is number {dim}"
        )
    return dim % len(t.shape)


def vector_operations(op: Op) -> float:
    """Vector-unit work of an op of this kind; that of products is in `contraction_sizes`."""
    return prod(op.rule.factors[i].size for i in op.attrs["visits"]) * float(op.attrs["work"])


def emit(
    b: Builder,
    kind: str,
    ins: Sequence[str],
    outs: Sequence[Tensor],
    rule: Rule,
    attrs: Mapping[str, Any],
) -> tuple[str, ...]:
    """Appends an op; the tensors of `outs` get names unique in the graph, which are returned."""
    named = [replace(t, name=b.unique(t.name)) for t in outs]
    names = tuple(t.name for t in named)
    b.emit(Op(names[0], kind, tuple(ins), names, rule, dict(attrs), b.phase), named)
    return names
