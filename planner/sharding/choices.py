"""One op under one assignment of mesh axes to factors: the strategies of the search.

A `Choice` says which axes split which factor, and which axes hold unreduced sums that pass
through a linear op. Operand and result specs, and the local op, follow from it and the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from planner.graph.builder import contraction_sizes
from planner.graph.core import Dims, Factor, Op, Rule
from planner.sharding.halo import reaches_neighbours
from planner.sharding.spec import Sizes, Spec, block_length, divides

WHOLE_KINDS = ("blocked", "window")  # factors that no axis splits on their own
WHOLE_NAMES = ("layers", "repeats", "micro")  # stacked dimensions stay whole


@dataclass(frozen=True)
class Choice:
    """`split[f]`: axes over factor f, major first. `passed`: (linear group, axes) pairs, at most
    one of them: only the group of all operands passes. Axes are in mesh order throughout."""

    split: tuple[tuple[str, ...], ...]
    passed: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def operand(self, rule: Rule, i: int) -> Spec:
        """The spec in which operand i must be given."""
        partial = [a for group, axes in self.passed if i in rule.linear[group] for a in axes]
        return Spec(self._dims(rule.ins[i]), tuple(partial))

    def result(self, rule: Rule, k: int, mesh_order: Sequence[str]) -> Spec:
        """The spec of result k as computed: split reduce factors leave partial sums."""
        partial = {a for _, axes in self.passed for a in axes}
        for factor, axes in zip(rule.factors, self.split, strict=True):
            if factor.kind == "reduce":
                partial.update(axes)
        made = {f for d in rule.outs[k] for f in d}
        for pair in rule.windows:
            if not made.intersection(pair):  # summed over positions: the gradient of a filter
                partial.update(self.split[pair[0]])
        return Spec(self._dims(rule.outs[k]), tuple(a for a in mesh_order if a in partial))

    def _dims(self, dims: Dims) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(a for f in d for a in self.split[f]) for d in dims)

    def local(self, op: Op, sizes: Sizes) -> Op:
        """The op as one device runs it: factors divided by their axes, padding included."""
        factors = tuple(
            Factor(f.name, block_length(f.size, prod(sizes[a] for a in axes)), f.kind)
            for f, axes in zip(op.rule.factors, self.split, strict=True)
        )
        return replace(op, rule=replace(op.rule, factors=factors))

    def describe(self, rule: Rule) -> str:
        outer = {of_y for _, of_y in rule.windows}
        parts = [
            f"{f.name}:{'+'.join(axes)}"
            for i, (f, axes) in enumerate(zip(rule.factors, self.split, strict=True))
            if axes and i not in outer
        ]
        parts += [f"partial:{'+'.join(axes)}" for _, axes in self.passed]
        return " ".join(parts) or "replicated"


@dataclass(frozen=True)
class OpChoices:
    """All choices of one op on one mesh, with their specs; `uneven`: with padding if need be."""

    op: Op
    sizes: tuple[tuple[str, int], ...]
    uneven: bool = False

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(enumerate_choices(self.op, dict(self.sizes), self.uneven))

    def operand_specs(self, i: int) -> list[Spec]:
        return [c.operand(self.op.rule, i) for c in self.choices]

    def result_specs(self, k: int) -> list[Spec]:
        order = [a for a, _ in self.sizes]
        return [c.result(self.op.rule, k, order) for c in self.choices]


def enumerate_choices(op: Op, sizes: Sizes, uneven: bool = False) -> Iterator[Choice]:
    """Every assignment of each axis to one factor, one spatial dimension, one linear group, or
    nothing."""
    rule = op.rule
    options: list[_Option] = [None]
    options += [(i,) for i, f in enumerate(rule.factors) if _splittable(f)]
    options += rule.windows
    options += [_Passed(g) for g, group in enumerate(rule.linear) if _passes(op, group)]
    partial: list[Choice] = [Choice(((),) * len(rule.factors))]
    for axis, size in sizes.items():
        if size == 1:
            continue
        grown = []
        for option in options:
            for choice in partial:
                added = _with_axis(choice, axis, option)
                if _divides(rule, added, sizes, uneven):
                    grown.append(added)
        partial = grown
    yield from (
        c
        for c in partial
        if _orderly(rule, c, sizes)
        and (not uneven or _pads_whole_dimensions(rule, c, sizes))
        and _keeps_axes(rule, c, sizes)
        and reaches_neighbours(op, c.split, sizes)
    )


def bound_name(label: str, axis: str) -> str:
    """The name of a dimension that `axis` has to split, and nothing else."""
    return f"{label}@{axis}"


def bound_to(name: str) -> str:
    """The axis that has to split a dimension of this name; "" if any may."""
    return name.removesuffix(".out").partition("@")[2]


def _keeps_axes(rule: Rule, choice: Choice, sizes: Sizes) -> bool:
    for factor, axes in zip(rule.factors, choice.split, strict=True):
        axis = bound_to(factor.name)
        if axis and axes != ((axis,) if sizes[axis] > 1 else ()):
            return False
    return True


@dataclass(frozen=True)
class _Passed:
    """The linear group through which an axis's partial sums pass."""

    group: int


_Option = tuple[int, ...] | _Passed | None  # factors that an axis splits together


def _splittable(factor: Factor) -> bool:
    return (
        factor.kind not in WHOLE_KINDS and factor.name not in WHOLE_NAMES and factor.size > 1
    )


def _passes(op: Op, group: Sequence[int]) -> bool:
    """Partial sums pass through unary linear ops and through sums of all their operands, but for
    the one that says where in the result the others go."""
    summed = len(op.ins) - (op.attrs.get("onehot") in ("place", "add"))
    return len(group) == summed and contraction_sizes(op) is None


def _with_axis(choice: Choice, axis: str, option: _Option) -> Choice:
    if option is None:
        return choice
    if isinstance(option, _Passed):
        passed = dict(choice.passed)
        passed[option.group] = (*passed.get(option.group, ()), axis)
        return Choice(choice.split, tuple(sorted(passed.items())))
    split = tuple((*a, axis) if i in option else a for i, a in enumerate(choice.split))
    return Choice(split, choice.passed)


def _divides(rule: Rule, choice: Choice, sizes: Sizes, uneven: bool) -> bool:
    return all(
        divides(f.size, prod(sizes[a] for a in axes), uneven)
        for f, axes in zip(rule.factors, choice.split, strict=True)
    )


def _pads_whole_dimensions(rule: Rule, choice: Choice, sizes: Sizes) -> bool:
    """A factor split unevenly is a dimension of its own: in the middle of one there is no room
    for padding (25 heads of 64 over 8 devices are no eighths of 1600)."""
    uneven = {
        i for i, (f, axes) in enumerate(zip(rule.factors, choice.split, strict=True))
        if f.size % prod(sizes[a] for a in axes)
    }  # fmt: skip
    return not uneven or all(
        len(dim) == 1 or uneven.isdisjoint(dim) for dims in (*rule.ins, *rule.outs) for dim in dims
    )


def padded_sums(rule: Rule, choice: Choice, sizes: Sizes) -> dict[str, int]:
    """Unevenly split factors over which shards add up (or take maxima), with their sizes: what
    lies beyond must not count. What windows read is filled by halos."""
    made = {f for dims in rule.outs for d in dims for f in d}
    read = {x for x, _ in rule.windows} | {y for x, y in rule.windows if x in made}
    return {
        f.name: f.size
        for i, (f, axes) in enumerate(zip(rule.factors, choice.split, strict=True))
        if f.size % prod(sizes[a] for a in axes) and i not in made and i not in read
    }


def _orderly(rule: Rule, choice: Choice, sizes: Sizes) -> bool:
    """In a dimension made of several factors a minor one may be split only if every factor
    before it is split completely; else shards would not be contiguous."""
    for dims in (*rule.ins, *rule.outs):
        for dim in dims:
            whole = True
            for f in dim:
                if choice.split[f] and not whole:
                    return False
                parts = prod(sizes[a] for a in choice.split[f])
                whole = whole and parts == rule.factors[f].size
    return True
