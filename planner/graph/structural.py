"""Ops that move or order data: reshape, transpose, concat, slice, pad, put, pop, cumsum, sort,
top-k.

The dimension that an op rearranges is blocked (whole on every device), all others are parallel.
Dimensions are given by name or number; with `label` the changed dimension gets a new name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, gcd, log2, prod

from planner.graph import expr as ex
from planner.graph.builder import Builder, GraphError, distinct
from planner.graph.core import Dims, Factor, Op, Rule, Tensor
from planner.graph.primitive import FactorList, axis_of, emit

# ---- reshape and transpose --------------------------------------------------------------------


def reshape(
    b: Builder, x: str, shape: Sequence[int], dims: Sequence[str], name: str = "reshape"
) -> str:
    """x in row-major order as [shape]; one size may be -1. `dims` name the new dimensions.

    Splits and merges are followed factor by factor, so shards survive: [B, S, N·H] sharded over
    its last dimension becomes [B, S, N, H] sharded over N.
    """
    x = b.use(x)
    t = b.lookup(x)
    sizes = _complete(name, t, shape)
    if len(dims) != len(sizes):
        raise GraphError(f"{name}: {len(sizes)} sizes {list(sizes)}, but names {list(dims)}")
    rule = reshape_rule(t.shape, t.dims, sizes, dims)
    out = Tensor(name, sizes, t.dtype, tuple(dims))
    return _emit_reshape(b, x, rule, out)


def _complete(name: str, t: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    known = prod(n for n in shape if n != -1)
    if list(shape).count(-1) > 1 or min(shape, default=1) < -1 or known == 0:
        raise GraphError(f"{name}: {list(shape)} is no shape")
    sizes = tuple(t.elements // known if n == -1 else n for n in shape)
    if prod(sizes) != t.elements:
        raise GraphError(
            f"{name}: '{t.name}' {list(t.shape)} has {t.elements} elements, "
            f"{list(shape)} has {known}"
        )
    return sizes


def _emit_reshape(b: Builder, x: str, rule: Rule, out: Tensor) -> str:
    visits = tuple(f for dim in rule.outs[0] for f in dim)
    return emit(b, "reshape", (x,), [out], rule, {"visits": visits, "work": 0})[0]


def reshape_rule(
    before: Sequence[int],
    before_dims: Sequence[str],
    after: Sequence[int],
    after_dims: Sequence[str],
) -> Rule:
    """The common refinement of two shapes with the same number of elements.

    Both are read from the major end; the greatest common divisor of what is left of the current
    dimensions becomes a factor of both. Where neither divides the other, (4, 3) → (6, 2), what
    remains until the shapes meet again is blocked on either side. Dimensions of size 1 have no
    factors.
    """
    sides = (_Side(before, before_dims), _Side(after, after_dims))
    found = FactorList()
    while not (sides[0].done or sides[1].done):
        left, right = (side.left for side in sides)
        common = gcd(left, right)
        if common > 1:
            # Named after the dimension that is just this factor, if there is one.
            named = sides[0] if sides[0].shape[sides[0].at] == common else sides[1]
            number = found.add(named.label, common)
            for side in sides:
                side.take(number, common)
        if left != common and right != common:
            _block_until_met(sides, found)
    return Rule(tuple(found.factors), (sides[0].dims,), (sides[1].dims,), ((0,),))


class _Side:
    """One shape of a reshape, consumed factor by factor from the major end."""

    def __init__(self, shape: Sequence[int], labels: Sequence[str]) -> None:
        self.shape, self.labels = shape, labels
        self.found: list[list[int]] = [[] for _ in shape]
        self.at = 0
        self.taken = 1  # elements of the whole shape that the factors so far make up
        self.left = shape[0] if shape else 1
        self._advance()

    def _advance(self) -> None:
        while self.left == 1 and not self.done:
            self.at += 1
            self.left = 1 if self.done else self.shape[self.at]

    @property
    def done(self) -> bool:
        return self.at >= len(self.shape)

    @property
    def label(self) -> str:
        return self.labels[self.at]

    @property
    def dims(self) -> Dims:
        return tuple(tuple(f) for f in self.found)

    def take(self, factor: int, size: int) -> None:
        self.found[self.at].append(factor)
        self.left //= size
        self.taken *= size
        self._advance()


def _block_until_met(sides: tuple[_Side, _Side], found: FactorList) -> None:
    """Gives each side blocked factors of its own until both have covered the same elements."""
    first = True
    while first or sides[0].taken != sides[1].taken:
        first = False
        side = min(sides, key=lambda s: s.taken)
        side.take(found.add(side.label, side.left, "blocked"), side.left)


def _reshape_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    rule = replace(op.rule, ins=op.rule.outs, outs=op.rule.ins)
    return {0: _emit_reshape(b, cotangents[op.outs[0]], rule, _gradient(b, op.ins[0]))}


def transpose(b: Builder, x: str, order: Sequence[int | str], name: str = "transpose") -> str:
    """x with its dimensions in `order` (names or numbers); an ordinary `map`."""
    x = b.use(x)
    t = b.lookup(x)
    at = [axis_of(b, name, x, d) for d in order]
    if sorted(at) != list(range(len(t.shape))):
        raise GraphError(f"{name}: {list(order)} is no order of the dimensions {list(t.dims)}")
    labels = distinct(t.dims)
    return b.map(name, [(x, labels)], [labels[i] for i in at], ex.x(0), dtype=t.dtype)


# ---- concat, slice, pad -------------------------------------------------------------------------


def _gradient(b: Builder, of: str) -> Tensor:
    return replace(b.lookup(of), name=f"{of}.grad", role="activation")


def _with_dim(t: Tensor, axis: int, size: int, label: str | None, name: str) -> Tensor:
    """A result like `t` but for the size (and the name) of one dimension."""
    shape = tuple(size if i == axis else n for i, n in enumerate(t.shape))
    dims = tuple((label or d) if i == axis else d for i, d in enumerate(t.dims))
    return Tensor(name, shape, t.dtype, dims)


def concat(
    b: Builder, xs: Sequence[str], dim: int | str, label: str | None = None, name: str = "concat"
) -> str:
    """The tensors one after the other along `dim`; all other sizes are equal."""
    if not xs:
        raise GraphError(f"{name}: nothing to concatenate")
    xs = [b.use(x) for x in xs]
    tensors = [b.lookup(x) for x in xs]
    first = tensors[0]
    axis = axis_of(b, name, xs[0], dim)
    for t in tensors[1:]:
        if _without(t.shape, axis) != _without(first.shape, axis) or t.dtype != first.dtype:
            raise GraphError(
                f"{name}: '{t.name}' {t.dtype}{list(t.shape)} does not continue "
                f"'{first.name}' {first.dtype}{list(first.shape)} along '{first.dims[axis]}'"
            )
    total = sum(t.shape[axis] for t in tensors)
    found = FactorList()
    own = [found.add(d, n) for d, n in zip(first.dims, first.shape, strict=True)]
    found.factors[own[axis]] = replace(found.factors[own[axis]], size=total, kind="blocked")
    parts = [
        found.add(f"{t.dims[axis]}.{i}", t.shape[axis], "blocked") for i, t in enumerate(tensors)
    ]
    out = _dims(own)
    rule = Rule(
        tuple(found.factors), tuple(_swap(out, axis, p) for p in parts), (out,),
        (tuple(range(len(xs))),),
    )  # fmt: skip
    attrs = {"axis": axis, "visits": tuple(own), "work": 0}
    return emit(b, "concat", xs, [_with_dim(first, axis, total, label, name)], rule, attrs)[0]


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _dims(factors: Sequence[int]) -> Dims:
    return tuple((f,) for f in factors)


def _swap(dims: Dims, axis: int, factor: int) -> Dims:
    return (*dims[:axis], (factor,), *dims[axis + 1 :])


def _changed(t: Tensor, axis: int, size: int) -> tuple[tuple[Factor, ...], Dims, Dims]:
    """Factors, operand and result dimensions of an op that resizes one dimension to `size`."""
    found = FactorList()
    own = [
        found.add(d, n, "blocked" if i == axis else "parallel")
        for i, (d, n) in enumerate(zip(t.dims, t.shape, strict=True))
    ]
    after = found.add(f"{t.dims[axis]}.out", size, "blocked")
    before = _dims(own)
    return tuple(found.factors), before, _swap(before, axis, after)


def _slices(count: int, start: int, stop: int, step: int) -> int:
    """How many of `count` positions range(start, stop, step) holds; 0 if it leaves them."""
    if not 0 <= start < stop <= count or step < 1:
        return 0
    return ceil((stop - start) / step)


def slice_dim(
    b: Builder, x: str, dim: int | str, start: int, stop: int, step: int = 1,
    label: str | None = None, name: str = "slice",
) -> str:  # fmt: skip
    """x[…, start:stop:step, …] along `dim`; negative bounds count from the end."""
    x = b.use(x)
    t = b.lookup(x)
    axis = axis_of(b, name, x, dim)
    count = t.shape[axis]
    low, high = (v + count if v < 0 else v for v in (start, stop))
    if not _slices(count, low, high, step):
        raise GraphError(
            f"{name}: [{start}:{stop}:{step}] is no part of dimension '{t.dims[axis]}' "
            f"of '{x}', whose size is {count}"
        )
    out = _with_dim(t, axis, _slices(count, low, high, step), label, name)
    return _emit_slice(b, x, axis, (low, high, step), out)


def _emit_slice(
    b: Builder, x: str, axis: int, bounds: tuple[int, int, int], out: Tensor
) -> str:
    factors, before, after = _changed(b.lookup(x), axis, out.shape[axis])
    rule = Rule(factors, (before,), (after,), ((0,),))
    visits = tuple(f for dim in after for f in dim)
    attrs = {"axis": axis, "bounds": bounds, "visits": visits, "work": 0}
    return emit(b, "slice", (x,), [out], rule, attrs)[0]


def pad(
    b: Builder, x: str, dim: int | str, low: int, high: int, value: float = 0.0,
    interior: int = 0, label: str | None = None, name: str = "pad",
) -> str:  # fmt: skip
    """x with `low` entries of `value` before it along `dim`, `high` after it, and `interior`
    between any two."""
    x = b.use(x)
    t = b.lookup(x)
    axis = axis_of(b, name, x, dim)
    if min(low, high, interior) < 0:
        raise GraphError(f"{name}: padding ({low}, {high}, {interior}) must not be negative")
    size = low + (t.shape[axis] - 1) * (interior + 1) + 1 + high
    out = _with_dim(t, axis, size, label, name)
    return _emit_pad(b, x, axis, (low, high, interior), value, out)


def _emit_pad(
    b: Builder, x: str, axis: int, padding: tuple[int, int, int], value: float, out: Tensor
) -> str:
    factors, before, after = _changed(b.lookup(x), axis, out.shape[axis])
    rule = Rule(factors, (before,), (after,), ((0,),) if value == 0 else ())
    visits = tuple(f for dim in after for f in dim)
    attrs = {"axis": axis, "padding": padding, "value": value, "visits": visits, "work": 0}
    return emit(b, "pad", (x,), [out], rule, attrs)[0]


def _concat_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    axis, g = op.attrs["axis"], cotangents[op.outs[0]]
    found, start = {}, 0
    for j, x in enumerate(op.ins):
        stop = start + b.lookup(x).shape[axis]
        if j in wanted:
            found[j] = _emit_slice(b, g, axis, (start, stop, 1), _gradient(b, x))
        start = stop
    return found


def _slice_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    axis, (start, _, step) = op.attrs["axis"], op.attrs["bounds"]
    x, g = op.ins[0], cotangents[op.outs[0]]
    last = start + (b.lookup(g).shape[axis] - 1) * step
    padding = (start, b.lookup(x).shape[axis] - 1 - last, step - 1)
    return {0: _emit_pad(b, g, axis, padding, 0.0, _gradient(b, x))}


def _pad_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    axis, (low, high, interior) = op.attrs["axis"], op.attrs["padding"]
    x, g = op.ins[0], cotangents[op.outs[0]]
    bounds = (low, b.lookup(g).shape[axis] - high, interior + 1)
    return {0: _emit_slice(b, g, axis, bounds, _gradient(b, x))}


# ---- slots of a buffer --------------------------------------------------------------------------


def put(b: Builder, buffer: str, row: str, slot: str, name: str = "put") -> str:
    """`buffer` [slots, …] with `row` […] in `slot` [], in place."""
    rule, attrs = _slots(b.lookup(buffer))
    whole, one = rule.outs[0], rule.outs[0][1:]
    out = replace(b.lookup(buffer), name=name, role="activation")
    rule = replace(rule, ins=(whole, one, ()))
    return emit(b, "put", (buffer, row, slot), [out], rule, attrs)[0]


def pop(
    b: Builder, buffer: str, slot: str, name: str = "pop", rest: str = "rest"
) -> tuple[str, str]:
    """What `slot` [] of `buffer` [slots, …] holds, and the buffer with zeros there: the adjoint of
    `put`."""
    t = b.lookup(buffer)
    rule, attrs = _slots(t)
    whole, one = rule.outs[0], rule.outs[0][1:]
    row = Tensor(name, t.shape[1:], t.dtype, t.dims[1:])
    left = replace(t, name=rest, role="activation")
    rule = replace(rule, ins=(whole, ()), outs=(one, whole))
    taken, kept = emit(b, "pop", (buffer, slot), [row, left], rule, attrs)
    return taken, kept


def _slots(t: Tensor) -> tuple[Rule, dict[str, object]]:
    found = FactorList()
    own = [
        found.add(d, n, "parallel" if i else "blocked")
        for i, (d, n) in enumerate(zip(t.dims, t.shape, strict=True))
    ]
    return Rule(tuple(found.factors), (), (_dims(own),)), {"visits": tuple(own[1:]), "work": 0}


def _put_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    buffer, row, slot = op.ins
    names = (f"{row}.grad", f"{buffer}.grad")
    taken, kept = pop(b, cotangents[op.outs[0]], slot, *names)
    return {0: kept, 1: taken}


def _pop_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    row, rest = (cotangents.get(o) or _zeros(b, b.lookup(o)) for o in op.outs)
    return {0: put(b, rest, row, op.ins[1], f"{op.ins[0]}.grad")}


def _zeros(b: Builder, like: Tensor) -> str:
    sizes = dict(zip(like.dims, like.shape, strict=True))
    return b.map(f"{like.name}.zeros", [], like.dims, ex.c(0), dtype=like.dtype, sizes=sizes)


# ---- cumsum, sort, top-k ------------------------------------------------------------------------


def cumsum(
    b: Builder, x: str, dim: int | str, *, reverse: bool = False, exclusive: bool = False,
    name: str = "cumsum",
) -> str:  # fmt: skip
    """Running sums along `dim`, from the end if `reverse`, without the own entry if `exclusive`."""
    x = b.use(x)
    t = b.lookup(x)
    axis = axis_of(b, name, x, dim)
    return _emit_cumsum(b, x, axis, reverse, exclusive, Tensor(name, t.shape, t.dtype, t.dims))


def _emit_cumsum(
    b: Builder, x: str, axis: int, reverse: bool, exclusive: bool, out: Tensor
) -> str:
    t = b.lookup(x)
    found = FactorList()
    own = [
        found.add(d, n, "blocked" if i == axis else "parallel")
        for i, (d, n) in enumerate(zip(t.dims, t.shape, strict=True))
    ]
    rule = Rule(tuple(found.factors), (_dims(own),), (_dims(own),), ((0,),))
    attrs = {
        "axis": axis, "reverse": reverse, "exclusive": exclusive, "visits": tuple(own), "work": 1,
    }  # fmt: skip
    return emit(b, "cumsum", (x,), [out], rule, attrs)[0]


def _cumsum_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    a, g = op.attrs, cotangents[op.outs[0]]
    out = _gradient(b, op.ins[0])
    return {0: _emit_cumsum(b, g, a["axis"], not a["reverse"], a["exclusive"], out)}


def top_k(
    b: Builder, x: str, k: int, dim: int | str = -1, label: str | None = None, name: str = "top_k"
) -> tuple[str, str]:
    """The k largest entries along `dim`, largest first, and their positions (i32)."""
    return _sorted(b, x, dim, k, True, label, name)


def sort(
    b: Builder, x: str, dim: int | str = -1, *, descending: bool = False, name: str = "sort"
) -> tuple[str, str]:
    """x sorted along `dim`, and the positions (i32) its entries come from; ties keep order."""
    count = b.lookup(x).shape[axis_of(b, name, x, dim)]
    return _sorted(b, x, dim, count, descending, None, name)


def _sorted(
    b: Builder, x: str, dim: int | str, k: int, descending: bool, label: str | None, name: str
) -> tuple[str, str]:
    x = b.use(x)
    t = b.lookup(x)
    axis = axis_of(b, name, x, dim)
    count = t.shape[axis]
    if not 1 <= k <= count:
        raise GraphError(f"{name}: {k} of the {count} entries of '{t.dims[axis]}' in '{x}'")
    factors, before, after = _changed(t, axis, k)
    rule = Rule(factors, (before,), (after, after))
    # A merge or bitonic network compares every entry about log₂ n times.
    attrs = {
        "axis": axis, "keep": k, "descending": descending,
        "visits": tuple(f for dim_ in before for f in dim_), "work": max(1, ceil(log2(count))),
    }  # fmt: skip
    values = _with_dim(t, axis, k, label, name)
    places = replace(values, name=f"{name}.indices", dtype="i32")
    values_name, places_name = emit(b, "sort", (x,), [values, places], rule, attrs)
    return values_name, places_name


def _sort_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    """Cotangents of the kept entries go back to the positions they came from."""
    if op.outs[0] not in cotangents:
        return {}
    before, after = op.rule.ins[0], op.rule.outs[0]
    rule = Rule(op.rule.factors, (after, after), (before,), ((1,),))
    attrs = {
        "axis": op.attrs["axis"], "size": b.lookup(op.ins[0]).shape[op.attrs["axis"]],
        "visits": tuple(f for dim in before for f in dim), "work": 0,
    }  # fmt: skip
    ins = (op.outs[1], cotangents[op.outs[0]])
    return {0: emit(b, "unsort", ins, [_gradient(b, op.ins[0])], rule, attrs)[0]}


Vjp = Callable[[Builder, Op, Mapping[str, str], Sequence[int]], dict[int, str]]
VJPS: dict[str, Vjp] = {
    "reshape": _reshape_vjp,
    "concat": _concat_vjp,
    "slice": _slice_vjp,
    "pad": _pad_vjp,
    "put": _put_vjp,
    "pop": _pop_vjp,
    "cumsum": _cumsum_vjp,
    "sort": _sort_vjp,
}
