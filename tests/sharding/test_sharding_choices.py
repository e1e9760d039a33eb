"""Choices of ops: complete, distinct, and their specs fit the local op."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod

import pytest
from small_models import steps

from planner.graph.core import Dims, Op, Rule
from planner.sharding.choices import OpChoices
from planner.sharding.spec import Spec

STEPS = steps()
MESHES = {
    "8": (("d", 8),),
    "4x2": (("model", 4), ("data", 2)),
    "b,a,c": (("b", 2), ("a", 2), ("c", 2)),
}


@cache
def ops() -> dict[str, Op]:
    """One op of every kind of rule in the small models."""
    found = {}
    for make in STEPS.values():
        for op, _ in make().walk():
            found.setdefault((op.kind, op.rule), op)
    return {op.name + str(i): op for i, op in enumerate(found.values())}


def local_shape(rule: Rule, dims: Dims) -> tuple[int, ...]:
    return tuple(prod(rule.factors[f].size for f in dim) for dim in dims)


def whole_shapes(op: Op) -> list[tuple[Dims, tuple[int, ...]]]:
    return [(d, local_shape(op.rule, d)) for d in (*op.rule.ins, *op.rule.outs)]


@pytest.mark.parametrize("mesh", MESHES)
def test_specs_give_the_shapes_of_the_local_op(mesh: str) -> None:
    """Operand and result specs divide the tensors into what the local rule says; axes are used
    once, in mesh order, and those that split a summed factor are pending in the results."""
    axes = MESHES[mesh]
    sizes = dict(axes)
    order = {a: i for i, a in enumerate(sizes)}
    for op in ops().values():
        found = OpChoices(op, axes)
        for choice in found.choices:
            local = choice.local(op, sizes).rule
            ins = [choice.operand(op.rule, i) for i in range(len(op.rule.ins))]
            outs = [choice.result(op.rule, k, list(sizes)) for k in range(len(op.rule.outs))]
            for spec, (dims, shape) in zip((*ins, *outs), whole_shapes(op), strict=True):
                assert spec.fits(shape, sizes)
                assert spec.local_shape(shape, sizes) == local_shape(local, dims), op.name
                used = (*spec.axes, *spec.partial)
                assert len(set(used)) == len(used)
                assert list(spec.partial) == sorted(spec.partial, key=order.__getitem__)
            summed = {
                a
                for f, split in zip(op.rule.factors, choice.split, strict=True)
                if f.kind == "reduce"
                for a in split
            }
            passed = {a for _, split in choice.passed for a in split}
            for spec, dims in zip(outs, op.rule.outs, strict=True):
                kept = {f for dim in dims for f in dim}
                gone = [x for x, y in op.rule.windows if not kept & {x, y}]
                assert set(spec.partial) == summed | passed | {
                    a for f in gone for a in choice.split[f]
                }
            for spec in ins:
                assert set(spec.partial) == passed


@pytest.mark.parametrize("mesh", MESHES)
def test_choices_are_all_that_divide_and_stay_contiguous(mesh: str) -> None:
    """Against the definition: every axis on one splittable factor, on the two of one spatial
    dimension, passed on, or unused. Space may stay whole where blocks are shorter than windows."""
    axes = MESHES[mesh]
    for op in ops().values():
        rule = op.rule
        places: list[object] = [None]
        places += [
            i for i, f in enumerate(rule.factors)
            if f.kind in ("parallel", "reduce") and f.size > 1
            and f.name not in ("layers", "repeats", "micro")
        ]  # fmt: skip
        places += rule.windows
        choices = OpChoices(op, axes).choices
        if any(len(group) == len(op.ins) for group in rule.linear):
            places.append("passed")
        wanted = set()
        for at in product(places, repeat=len(axes)):
            split = tuple(
                tuple(a for (a, _), p in zip(axes, at, strict=True) if holds(p, i))
                for i in range(len(rule.factors))
            )
            passed = tuple(a for (a, _), p in zip(axes, at, strict=True) if p == "passed")
            if contiguous(rule, split, dict(axes)):
                wanted.add((split, passed))
        found = [(c.split, tuple(a for _, s in c.passed for a in s)) for c in choices]
        assert len(set(found)) == len(found), op.name
        wanted -= {w for w in wanted - set(found) if short(op, w[0], dict(axes))}
        if any(passed for _, passed in found) or "passed" not in places:
            assert set(found) == wanted, op.name
        else:  # products pass no pending sums on: they would have to be multiplied out
            assert set(found) == {w for w in wanted if not w[1]}, op.name


def holds(place: object, factor: int) -> bool:
    return place == factor or (isinstance(place, tuple) and factor in place)


def short(op: Op, split: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> bool:
    """Whether some split block of space is shorter than the window around it."""
    for w, pair in enumerate(op.rule.windows):
        extent = (op.attrs["taps"][w] - 1) * op.attrs["dilation"][w] + 1
        parts = prod(sizes[a] for a in split[pair[0]])
        if parts > 1 and min(op.rule.factors[f].size // parts for f in pair) < extent:
            return True
    return False


def contiguous(rule: Rule, split: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> bool:
    parts = [prod(sizes[a] for a in axes) for axes in split]
    if any(f.size % n for f, n in zip(rule.factors, parts, strict=True)):
        return False
    for dims in (*rule.ins, *rule.outs):
        for dim in dims:
            for major, minor in product(range(len(dim)), repeat=2):
                cut = parts[dim[major]] < rule.factors[dim[major]].size
                if major < minor and cut and parts[dim[minor]] > 1:
                    return False
    return True


def test_recomputed_ops_follow_their_origin() -> None:
    """A recomputed op has the choices of the op it repeats: one decision serves both."""
    graph = STEPS["decoder full adafactor"]()
    by_name = {op.name: op for op, _ in graph.walk()}
    again = [op for op in by_name.values() if op.origin]
    assert again
    for op in again:
        assert op.rule == by_name[op.origin].rule


def test_a_matmul_on_two_axes() -> None:
    """The classical choices of y = x·w are there, with the specs everybody expects."""
    op = next(o for o in ops().values() if o.name == "layers.h")  # B S D, D F -> B S F
    found = {}
    for c in OpChoices(op, (("data", 2), ("model", 2))).choices:
        found[c.operand(op.rule, 0), c.operand(op.rule, 1)] = c.result(
            op.rule, 0, ["data", "model"]
        )
    none = ()
    batch = (("data",), none, none)
    assert found[Spec(batch), Spec((none, ("model",)))] == Spec((("data",), none, ("model",)))
    rows = Spec((("data",), none, ("model",)))
    assert found[rows, Spec((("model",), none))] == Spec(batch, ("model",))
    assert found[Spec((none, none, none)), Spec((none, none))] == Spec((none, none, none))
