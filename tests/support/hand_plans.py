"""Annotations that experts write by hand, for any model: what a found plan is measured against.

Every pattern is a function of dimension names: `batch` and `model` are the mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.graph.core import Graph, Tensor
from planner.pins import Annotation

Axes = tuple[tuple[str, ...], ...]
Pattern = Callable[[Tensor, str, str], Axes]

WIDE = "FNV"  # feed-forward, heads, vocabulary: what tensor parallelism splits
NAMED = ("q", "k", "v", "mix", "h", "in", "gate", "x", "mid", "logits", "o", "out")


def data_parallel(t: Tensor, batch: str, model: str) -> Axes:
    return _batch(t, (batch, model)) if t.role != "parameter" else ((),) * _rank(t)


def fsdp(t: Tensor, batch: str, model: str) -> Axes:
    """Parameters over all devices along their largest dimension, batch over all devices."""
    if t.role != "parameter":
        return _batch(t, (batch, model))
    shape = t.shape[-_rank(t) :]
    at = shape.index(max(shape))
    return tuple((batch, model) if i == at else () for i in range(len(shape)))


def megatron(t: Tensor, batch: str, model: str) -> Axes:
    """Heads, feed-forward and vocabulary over one axis, batch over the other."""
    if t.role == "parameter":
        return _wide(t, model)
    return tuple(b or w for b, w in zip(_batch(t, (batch,)), _wide(t, model), strict=True))


def gspmd_2d(t: Tensor, batch: str, model: str) -> Axes:
    """GSPMD's "2-D finalized": weights over both axes, activations' widest dimension too."""
    dims = _own(t)
    wide = _wide(t, model)
    if t.role == "parameter":
        if len(dims) < 2 or t.name == "embed":
            return tuple((model,) if d == "D" and len(dims) > 1 else () for d in dims)
        return tuple(w or ((batch,) if d == "D" else ()) for d, w in zip(dims, wide, strict=True))
    split = tuple((model,) if d == "D" else w for d, w in zip(dims, wide, strict=True))
    return tuple(b or s for b, s in zip(_batch(t, (batch,)), split, strict=True))


PATTERNS: dict[str, Pattern] = {
    "data parallel": data_parallel, "FSDP": fsdp, "Megatron": megatron, "GSPMD 2-D": gspmd_2d,
}  # fmt: skip


def hand_annotation(
    graph: Graph, pattern: Pattern, sizes: dict[str, int], batch: str, model: str
) -> Annotation:
    """`pattern` for the parameters and main activations of `graph`; a dimension that several
    axes do not divide is left to the first of them, if those divide it."""
    found = {}
    for name, t in graph.all_tensors().items():
        if name.endswith("[i]") or not (t.role == "parameter" or _named(name, t)):
            continue
        axes = pattern(t, batch, model)
        shape = t.shape[len(t.shape) - len(axes) :]
        found[name] = tuple(
            _dividing(n, a, sizes) for n, a in zip(shape, axes, strict=True)
        )
    return found


def _dividing(n: int, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
    """The longest beginning of `axes` that divides `n`."""
    return next(axes[:i] for i in range(len(axes), -1, -1) if n % _size(axes[:i], sizes) == 0)


def _named(name: str, t: Tensor) -> bool:
    return name.rsplit(".", 1)[-1] in NAMED and len(t.dims) > 2 and t.dims[0] == "B"


def _size(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    size = 1
    for axis in axes:
        size *= sizes[axis]
    return size


def _own(t: Tensor) -> tuple[str, ...]:
    return tuple(d for d in t.dims if d != "layers") if t.role == "parameter" else t.dims


def _rank(t: Tensor) -> int:
    return len(_own(t))


def _batch(t: Tensor, axes: tuple[str, ...]) -> Axes:
    return tuple(axes if d == "B" else () for d in _own(t))


def _wide(t: Tensor, axis: str) -> Axes:
    """`axis` on the first dimension that tensor parallelism splits."""
    dims = _own(t)
    at = next((i for i, d in enumerate(dims) if d in WIDE), -1)
    return tuple((axis,) if i == at else () for i in range(len(dims)))
