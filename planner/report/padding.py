"""Dimensions that axes do not divide: which a plan pads, and which it could if it were asked to.

For people; what is read off a result, nothing is decided here.
"""

from __future__ import annotations

from math import prod

from planner.report import amounts
from planner.result import Result
from planner.sharding.choices import WHOLE_NAMES
from planner.sharding.spec import block_length, divides

SHOWN = 4  # dimensions that a line names
LARGE = 0.01  # of the largest tensor: dimensions of smaller ones are not worth a line


def padding_notes(result: Result) -> list[str]:
    if not result.model.uneven:
        return _could(result)
    found = [
        f"{name} {size} over {parts} (+{amounts.share(_added(size, parts))})"
        for name, size, parts in _padded(result)
    ]
    return [f"padded: {_some(found)}"] if found else []


def _padded(result: Result) -> list[tuple[str, int, int]]:
    """Dimensions of ops that the plan splits unevenly, with their sizes and shards."""
    sizes = dict(result.mesh.axes)
    found: dict[tuple[str, int, int], None] = {}
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.origin or op.name)
        if choice is None:  # of a pipeline's stage
            continue
        for factor, axes in zip(op.rule.factors, choice.split, strict=True):
            parts = prod(sizes[a] for a in axes)
            if factor.size % parts:
                found[factor.name.removesuffix(".out"), factor.size, parts] = None
    return list(found)


def _added(size: int, parts: int) -> float:
    return block_length(size, parts) * parts / size - 1


def _could(result: Result) -> list[str]:
    """What could be split only with padding, if the model allowed it."""
    axes = [n for _, n in result.mesh.axes if n > 1]
    tensors = sorted(result.model.graph.all_tensors().values(), key=lambda t: -t.elements)
    found: dict[str, None] = {}
    for tensor in tensors:
        if tensor.elements < LARGE * tensors[0].elements:
            break
        for name, size in zip(tensor.dims, tensor.shape, strict=True):
            even = name in WHOLE_NAMES or any(divides(size, n) for n in axes)
            if not even and any(divides(size, n, uneven=True) for n in axes):
                found[f"{name} {size}"] = None
    if not found:
        return []
    return [
        f"no axis divides {_some(list(found))}; with uneven: true (--set uneven=true) axes may "
        "split such dimensions, with padding"
    ]


def _some(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{', '.join(found[:SHOWN])}{more}"
