"""Resharding laws: what a path does to arrays, what it costs, and when there is none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations, product
from math import isinf, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels.collectives import collective_seconds
from costmodels.program import Buffer, Collective, Program, Step
from planner.sharding.reshard import FREE, Move, Resharder, SpecGraph, payload_elements
from planner.sharding.spec import Spec, all_specs
from planner.values.interpret import Interpreter, Shards, shard, unshard

import meshes  # isort: skip

AXES = {
    1: (("x", 8),),
    2: (("x", 2), ("y", 4)),
    3: (("x", 2), ("y", 2), ("z", 2)),
    4: (("x", 2), ("y", 2), ("z", 2), ("w", 2)),
}
SHAPES = ((8,), (8, 4), (16, 8), (4, 6, 8), (3, 16), (2, 2, 2, 2))
PADDED = ((7,), (25,), (5, 12), (12, 7), (11, 4, 6), (3, 3, 7))  # for most axes uneven
CASES = [(s, False) for s in SHAPES] + [(s, True) for s in (*SHAPES, *PADDED, *PADDED)]
Axes = tuple[tuple[str, int], ...]


def price(kind: str, axes: Sequence[str], payload_bytes: np.ndarray) -> np.ndarray:
    return 1e-6 * len(axes) * (1.5 if kind == "all-reduce" else 1) + payload_bytes * 1e-9


def draw_spec(
    rng: random.Random, shape: Sequence[int], axes: Axes, uneven: bool = False
) -> Spec:
    """Any spec, the axes of a dimension in any order."""
    spec = rng.choice(all_specs(shape, dict(axes), True, uneven))
    dims = tuple(tuple(rng.sample(d, len(d))) for d in spec.dims)
    return Spec(dims, spec.partial)


def scattered(
    array: np.ndarray, spec: Spec, axes: Axes, rng: np.random.Generator, reduce: str
) -> Shards:
    """Shards of `array`; along partial axes, pieces that add up (or whose maximum is) to them."""
    whole = shard(array, spec, axes)
    names = [a for a, _ in axes]
    where = [names.index(a) for a in spec.partial]
    found: Shards = {}
    for device, block in whole.items():
        if any(device[i] for i in where):
            less = block - rng.uniform(0, 1, block.shape)
            found[device] = less if reduce == "max" else rng.normal(size=block.shape)
    for device, block in whole.items():
        if device in found:
            continue
        fixed = [i for i in range(len(device)) if i not in where]
        others = [d for d in found if all(d[i] == device[i] for i in fixed)]
        found[device] = block if reduce == "max" else block - sum(found[d] for d in others)
    return found


def combined(shards: Shards, spec: Spec, axes: Axes, shape: Sequence[int]) -> np.ndarray:
    """The array that `shards` mean; pieces over partial axes added up."""
    names = [a for a, _ in axes]
    where = [names.index(a) for a in spec.partial]
    totals = {
        device: sum(
            block
            for d, block in shards.items()
            if all(d[i] == device[i] for i in range(len(d)) if i not in where)
        )
        for device in shards
    }
    return unshard(totals, spec.without_partial(), axes, shape)  # type: ignore[arg-type]


def program(
    path: Sequence[Move], source: Spec, shape: Sequence[int], axes: Axes, reduce: str
) -> Program:
    """A program of nothing but the path."""
    sizes = dict(axes)
    buffers = {0: Buffer(0, source.local_shape(shape, sizes), "f32", "activations", "a")}
    out = []
    spec = source
    for i, m in enumerate(path):
        local = m.result.local_shape(shape, sizes)
        buffers[i + 1] = Buffer(i + 1, local, "f32", "activations", "a")
        payload = payload_elements(m, spec, shape, sizes) * 4
        out.append(
            Collective(m.kind, m.axes, i, i + 1, payload, m.dim, m.to_dim, m.order, reduce)
        )
        spec = m.result
    return Program(axes, buffers, (Step("path", tuple(out)),), {"a": 0}, {"a": len(path)})


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.sampled_from(CASES), st.integers(0, 10**6))
def test_a_path_turns_shards_into_the_target_s(
    count: int, case: tuple[tuple[int, ...], bool], seed: int
) -> None:
    """Blocks of uneven dimensions, too, whose padding holds no numbers."""
    rng, axes, (shape, uneven) = random.Random(seed), AXES[count], case
    source, target = (draw_spec(rng, shape, axes, uneven) for _ in range(2))
    reduce = rng.choice(("sum", "max"))
    resharder = Resharder(dict(axes), price, uneven)
    path = resharder.path(source, target, shape, 4, reduce)
    seconds = resharder.seconds(source, target, shape, 4, reduce)
    if path is None:
        assert isinf(seconds)
        assert reduce == "max"
        assert set(source.partial) & set(target.partial)
        return
    array = np.random.default_rng(seed).normal(size=shape)
    shards = scattered(array, source, axes, np.random.default_rng(seed), reduce)
    run = program(path, source, shape, axes, reduce)
    moved = Interpreter(run).run({"a": shards})["a"]
    local = target.local_shape(shape, dict(axes))
    assert {b.shape for b in moved.values()} == {local}
    found = combined(moved, target, axes, shape)
    np.testing.assert_allclose(found, array, rtol=1e-9, atol=1e-9)
    paid = sum(
        price(i.kind, i.axes, np.array(i.bytes))
        for i, _ in run.instructions()
        if isinstance(i, Collective) and i.kind not in FREE
    )
    assert seconds == pytest.approx(float(paid), rel=1e-6, abs=1e-12)


def cheap_together(kind: str, axes: Sequence[str], payload_bytes: np.ndarray) -> np.ndarray:
    """As on a torus where only all axes together can use all links."""
    return payload_bytes * 10.0 ** (-9 - 3 * len(axes))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 4), st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_what_stays_is_not_moved(count: int, shape: tuple[int, ...], seed: int) -> None:
    """An axis at one place in source and target takes no part in a collective, but in
    permutations of blocks; nor does one that neither of the two has."""
    rng, axes = random.Random(seed), AXES[count]
    source, target = draw_spec(rng, shape, axes), draw_spec(rng, shape, axes)
    resharder = Resharder(dict(axes), cheap_together)
    assert resharder.seconds(source, source, shape, 4) == 0.0
    both = [{*s, *t} - ({*s} ^ {*t}) for s, t in zip(source.dims, target.dims, strict=True)]
    staying = {*source.partial} & {*target.partial}
    staying |= {a for dim in both for a in dim}
    unused = {*dict(axes)} - {*source.axes, *source.partial}
    for move in resharder.path(source, target, shape, 4) or ():
        if move.kind not in (*FREE, "collective-permute"):
            assert not {*move.axes} & (staying | unused), move


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (12, 8), (2, 4, 8), (7, 9)])
def test_every_spec_can_be_reached(shape: tuple[int, ...], uneven: bool) -> None:
    """What no path may do leaves a path between any two specs that the tensor has."""
    sizes = {"x": 4, "y": 2, "z": 2}
    graph = SpecGraph(len(shape), sizes, uneven)
    specs = [s for s in graph.specs if s.fits(shape, sizes, uneven)]
    assert len(specs) > 4
    seconds = Resharder(sizes, cheap_together, uneven).matrix(specs, specs, shape, 4)
    assert np.isfinite(seconds).all()


def test_no_detour_over_more_axes() -> None:
    """Sums over x of what y splits: x alone adds them up, however cheap both together would be.
    Compilers do so: they neither gather over y first, nor mask and cut again."""
    resharder = Resharder({"x": 4, "y": 4}, cheap_together)
    cases = [
        (Spec((("y",), ()), ("x",)), Spec((("y",), ())), ["all-reduce"], "x"),
        (Spec((("y", "x"), ())), Spec((("y",), ())), ["all-gather"], "x"),
        (Spec((("y",), ())), Spec(((), ())), ["all-gather"], "y"),
        (Spec((("y",), ("x",))), Spec(((), ("x",))), ["all-gather"], "y"),
    ]
    for source, target, kinds, axis in cases:
        path = resharder.path(source, target, (16, 16), 4)
        assert path is not None
        assert [m.kind for m in path] == kinds, (source, target)
        assert path[0].axes == (axis,)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3), st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_equal_axes_are_symmetric(count: int, shape: tuple[int, ...], seed: int) -> None:
    """Exchanging the names of two axes of one size changes no price."""
    rng, axes = random.Random(seed), AXES[3] if count == 3 else (("x", 2), ("y", 2))
    source, target = draw_spec(rng, shape, axes), draw_spec(rng, shape, axes)
    swap = {"x": "y", "y": "x", "z": "z"}

    def swapped(spec: Spec) -> Spec:
        dims = tuple(tuple(swap[a] for a in d) for d in spec.dims)
        return Spec(dims, tuple(sorted(swap[a] for a in spec.partial)))

    resharder = Resharder(dict(axes), price)
    here = resharder.seconds(source, target, shape, 4)
    there = resharder.seconds(swapped(source), swapped(target), shape, 4)
    assert here == pytest.approx(there, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("count", AXES)
@pytest.mark.parametrize(
    ("shape", "uneven"),
    [((8, 4), False), ((4, 6, 8), False), ((7, 12), True), ((11, 4, 6), True)],
)
def test_the_vectorised_prices_are_those_of_the_paths(
    count: int, shape: tuple[int, ...], uneven: bool
) -> None:
    rng, axes = random.Random(count), AXES[count]
    resharder = Resharder(dict(axes), price, uneven)
    sources = [draw_spec(rng, shape, axes, uneven) for _ in range(8)]
    targets = [draw_spec(rng, shape, axes, uneven) for _ in range(8)]
    matrix = resharder.matrix(sources, targets, shape, 2)
    for (i, s), (j, t) in product(enumerate(sources), enumerate(targets)):
        paid, spec = 0.0, s
        for move in resharder.path(s, t, shape, 2) or ():
            if move.kind not in FREE:
                payload = payload_elements(move, spec, shape, dict(axes)) * 2
                paid += float(price(move.kind, move.axes, np.array(payload)))
            spec = move.result
        assert spec == t
        assert matrix[i, j] == pytest.approx(paid, rel=1e-6, abs=1e-12)


def test_known_paths() -> None:
    """The textbook cases are one collective each."""
    resharder = Resharder({"x": 2, "y": 4}, price)
    rows, columns = Spec((("x",), ())), Spec(((), ("x",)))
    whole = Spec(((), ()))
    pending = Spec(((), ()), ("x",))
    cases = [
        (rows, whole, ["all-gather"]), (whole, rows, ["slice"]), (rows, columns, ["all-to-all"]),
        (pending, whole, ["all-reduce"]), (pending, rows, ["reduce-scatter"]),
        (Spec((("x", "y"), ())), Spec((("y", "x"), ())), ["collective-permute"]),
        (whole, pending, ["mask"]), (rows, Spec((("x", "y"), ())), ["slice"]),
    ]  # fmt: skip
    for source, target, kinds in cases:
        path = resharder.path(source, target, (16, 16), 4)
        assert path is not None
        assert [m.kind for m in path] == kinds, (source, target)


def test_uneven_paths_are_padded() -> None:
    """Of 12 points over 8 devices each holds 2: collectives move 16. Over 2 devices blocks of 6
    are not made of blocks of 2: from one to the other only by way of the whole."""
    axes = {"x": 2, "y": 4}
    resharder = Resharder(axes, price, uneven=True)
    eighths, halves = Spec((("x", "y"), ())), Spec((("x",), ()))
    columns, whole = Spec(((), ("x", "y"))), Spec(((), ()))
    cases = [
        (eighths, whole, ["all-gather"], [16 * 16]), (whole, eighths, ["slice"], [12 * 16]),
        (columns, eighths, ["all-to-all"], [16 * 2]),
        (eighths, columns, ["all-to-all"], [2 * 16]),
        (Spec(((), ()), ("x", "y")), eighths, ["reduce-scatter"], [16 * 16]),
        (eighths, halves, ["all-gather", "slice"], [16 * 16, 12 * 16]),
        (halves, eighths, ["all-gather", "slice"], [12 * 16, 12 * 16]),
    ]  # fmt: skip
    for source, target, kinds, elements in cases:
        path = resharder.path(source, target, (12, 16), 4)
        assert path is not None
        assert [m.kind for m in path] == kinds, (source, target)
        before = (source, *(m.result for m in path))
        paid = [
            payload_elements(m, s, (12, 16), axes) for m, s in zip(path, before, strict=False)
        ]
        assert paid == elements, (source, target)
    assert not eighths.fits((12, 16), axes)  # unless it is asked for
    assert isinf(Resharder(axes, price).seconds(whole, eighths, (12, 16), 4))


def test_an_unreduced_maximum_is_not_summed() -> None:
    resharder = Resharder({"x": 2}, price)
    pending = Spec(((),), ("x",))
    assert resharder.path(pending, pending, (4,), 4, "max") is None
    assert isinf(resharder.seconds(pending, pending, (4,), 4, "max"))
    assert resharder.path(pending, pending, (4,), 4) == ()


# ---- specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_specs_are_the_even_canonical_ones(count: int, shape: tuple[int, ...]) -> None:
    """Against the definition: every axis on one dimension, pending, or unused; mesh order."""
    axes = AXES[count]
    sizes = dict(axes)
    wanted = set()
    for places in product(range(-2, len(shape)), repeat=len(axes)):
        at = list(zip(sizes, places, strict=True))
        dims = tuple(tuple(a for a, p in at if p == d) for d in range(len(shape)))
        even = all(n % prod(sizes[a] for a in d) == 0 for n, d in zip(shape, dims, strict=True))
        if even:
            wanted.add(Spec(dims, tuple(a for a, p in at if p == -1)))
    found = all_specs(shape, sizes, partial=True)
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert set(all_specs(shape, sizes)) == {s for s in wanted if not s.partial}


def test_padding_takes_a_third_at_most() -> None:
    axes = {"x": 8}
    sizes = [n for n in range(1, 30) if Spec((("x",),)).fits((n,), axes, uneven=True)]
    assert sizes == [*(6, 7, 8), *range(11, 30)]
    found = all_specs((12, 9), {"x": 2, "y": 4}, uneven=True)
    assert Spec((("x", "y"), ())) in found
    assert Spec((("x",), ("y",))) in found
    assert Spec(((), ("x", "y"))) not in found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_shards_put_together_are_the_array(count: int, shape: tuple[int, ...], seed: int) -> None:
    rng, axes = random.Random(seed), AXES[count]
    spec = draw_spec(rng, shape, axes).without_partial()
    array = np.random.default_rng(seed).normal(size=shape)
    shards = shard(array, spec, axes)
    assert len(shards) == prod(dict(axes).values())
    assert {b.shape for b in shards.values()} == {spec.local_shape(shape, dict(axes))}
    replicas = len(shards) // spec.shards(dict(axes))
    assert sum(b.size for b in shards.values()) == array.size * replicas
    np.testing.assert_array_equal(unshard(shards, spec, axes), array)


def test_the_first_axis_of_a_dimension_is_major() -> None:
    array = np.arange(8)
    axes = (("x", 2), ("y", 4))
    major = shard(array, Spec((("x", "y"),)), axes)
    minor = shard(array, Spec((("y", "x"),)), axes)
    assert [int(major[d][0]) for d in product(range(2), range(4))] == list(range(8))
    assert [int(minor[d][0]) for d in product(range(2), range(4))] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_prices_of_a_real_mesh_are_priced_by_its_collectives() -> None:
    """On a pod, moving a row-sharded matrix to columns costs one all-to-all of the shard."""
    mesh = meshes.logical(meshes.resolve("tpu-v4:4x4x4"), {"x": 16, "y": 4})
    resharder = Resharder(
        dict(mesh.axes), lambda kind, axes, size: collective_seconds(mesh, kind, axes, size)
    )
    shape = (4096, 8192)
    found = resharder.seconds(Spec((("x",), ())), Spec(((), ("x",))), shape, 2)
    wanted = float(collective_seconds(mesh, "all-to-all", ("x",), 4096 * 8192 * 2 / 16))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_permutations_of_one_dimension_keep_the_values() -> None:
    axes = AXES[4]
    array = np.arange(16.0)
    resharder = Resharder(dict(axes), price)
    first = Spec((tuple(a for a, _ in axes),))
    for order in list(permutations([a for a, _ in axes]))[1:]:
        target = Spec((order,))
        path = resharder.path(first, target, (16,), 4)
        assert path is not None
        moved = Interpreter(program(path, first, (16,), axes, "sum")).run(
            {"a": shard(array, first, axes)}
        )["a"]
        np.testing.assert_array_equal(unshard(moved, target, axes), array)
