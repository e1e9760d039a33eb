"""How a tensor lies on the mesh: for every dimension an ordered tuple of mesh axes.

The first axis of a dimension is the major one. `partial` axes hold pieces that still have to
be combined. Specs are canonical where choices make them: axes in mesh order.

A dimension of n points over k shards lies in blocks of ⌈n/k⌉ points. If k does not divide n it is
*uneven*: the last blocks reach beyond n, and what lies there is padding without a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

Sizes = Mapping[str, int]

# Padding may take at most a third of what the devices hold: of 12 points over 8 devices, or 25.
PADDING_LIMIT = 1.5


def block_length(size: int, parts: int) -> int:
    """Points of a dimension on each of `parts` shards, padding included."""
    return -(-size // parts)


def divides(size: int, parts: int, uneven: bool = False) -> bool:
    """Whether `parts` shards may hold it: evenly or, if `uneven`, with little padding."""
    padded = block_length(size, parts) * parts
    return padded == size or (uneven and padded <= PADDING_LIMIT * size)


@dataclass(frozen=True)
class Spec:
    dims: tuple[tuple[str, ...], ...]
    partial: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that split the tensor."""
        return tuple(a for d in self.dims for a in d)

    def local_shape(self, shape: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
        """Shape on one device, padding included."""
        return tuple(
            block_length(n, prod(sizes[a] for a in d))
            for n, d in zip(shape, self.dims, strict=True)
        )

    def fits(self, shape: Sequence[int], sizes: Sizes, uneven: bool = False) -> bool:
        """Whether every dimension divides (see `divides`)."""
        return all(
            divides(n, prod(sizes[a] for a in d), uneven)
            for n, d in zip(shape, self.dims, strict=True)
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


def all_specs(
    shape: Sequence[int], sizes: Sizes, partial: bool = False, uneven: bool = False
) -> tuple[Spec, ...]:
    """Every canonically ordered spec that fits; with `partial` also unreduced ones."""
    found = [Spec(((),) * len(shape))]
    for axis in sizes:
        grown = list(found)
        for spec in found:
            for d in range(len(shape)):
                dims = tuple((*a, axis) if i == d else a for i, a in enumerate(spec.dims))
                grown.append(Spec(dims, spec.partial))
            if partial:
                grown.append(Spec(spec.dims, (*spec.partial, axis)))
        # More axes never mean less padding: what does not fit need not be grown.
        found = [s for s in grown if s.fits(shape, sizes, uneven)]
    return tuple(found)
