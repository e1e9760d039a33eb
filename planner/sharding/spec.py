"""How a tensor lies on the mesh: for every dimension an ordered tuple of mesh axes.

The first axis of a dimension is the major one. `partial` axes hold pieces that still have to
be combined. Specs are canonical where choices make them: axes in mesh order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Spec:
    dims: tuple[tuple[str, ...], ...]
    partial: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that split the tensor."""
        return tuple(a for d in self.dims for a in d)

    def local_shape(self, shape: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
        """Shape on one device; `shape` must be divisible (see `fits`)."""
        return tuple(
            n // prod(sizes[a] for a in d) for n, d in zip(shape, self.dims, strict=True)
        )

    def fits(self, shape: Sequence[int], sizes: Sizes) -> bool:
        """Whether every dimension divides evenly."""
        return all(
            n % prod(sizes[a] for a in d) == 0 for n, d in zip(shape, self.dims, strict=True)
        )

    def shards(self, sizes: Sizes) -> int:
        return prod(sizes[a] for a in self.axes)

    def without_partial(self) -> Spec:
        return Spec(self.dims)

    def stacked(self) -> Spec:
        """The spec of a stack of such tensors: a new, whole leading dimension."""
        return Spec(((), *self.dims), self.partial)

    def __str__(self) -> str:
        inner = ", ".join("+".join(d) if d else "·" for d in self.dims)
        return f"[{inner}]" + (f" partial({'+'.join(self.partial)})" if self.partial else "")


def replicated(rank: int) -> Spec:
    return Spec(((),) * rank)


def all_specs(shape: Sequence[int], sizes: Sizes, partial: bool = False) -> tuple[Spec, ...]:
    """Every even, canonically ordered spec of a tensor; with `partial` also unreduced ones."""
    found = [Spec(((),) * len(shape))]
    for axis in sizes:
        grown = list(found)
        for spec in found:
            for d in range(len(shape)):
                dims = tuple((*a, axis) if i == d else a for i, a in enumerate(spec.dims))
                grown.append(Spec(dims, spec.partial))
            if partial:
                grown.append(Spec(spec.dims, (*spec.partial, axis)))
        found = [s for s in grown if s.fits(shape, sizes)]
    return tuple(found)
