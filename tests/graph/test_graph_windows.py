"""Convolution and pooling against loops written out, against JAX, and in sizes and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from graph_support import CASES, step_of
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph import windows
from planner.graph.builder import Builder, GraphError, contraction_sizes
from planner.graph.core import Op
from planner.graph.primitive import vector_operations
from planner.values import kernels, reference

RNG = np.random.default_rng(0)


def image(b: Builder, *shape: int) -> str:
    dims = ("B", *("H", "W", "Z")[: len(shape) - 2], "C")
    return b.input("x", shape, dims, "f32")


def filters(b: Builder, *shape: int) -> str:
    dims = (*("kh", "kw", "kz")[: len(shape) - 2], "I", "O")
    return b.input("w", shape, dims, "f32")


def apply(b: Builder, result: str, *args: np.ndarray) -> np.ndarray:
    graph = b.graph([result])
    return reference.evaluate(graph, dict(zip(graph.inputs, args, strict=True)))[result]


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))

    def some(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    taps, stride, dilation = some(1, 3), some(1, 3), some(1, 2)
    padding = list(zip(some(0, 2), some(0, 2), strict=True))
    spatial = [
        max(1, (k - 1) * d + 1 - lo - hi) + draw(st.integers(0, 2))
        for k, d, (lo, hi) in zip(taps, dilation, padding, strict=True)
    ]
    groups = draw(st.sampled_from([1, 2]))
    return {
        "taps": taps, "stride": stride, "dilation": dilation, "spatial": spatial,
        "padding": draw(st.sampled_from([padding, "same"])), "groups": groups,
    }  # fmt: skip


def naive_conv(x: np.ndarray, w: np.ndarray, window: windows.Window, groups: int) -> np.ndarray:
    """The definition: a sum over taps and channels at every output point."""
    out = np.zeros((x.shape[0], *window.results, w.shape[-1]))
    c, n = w.shape[-2], w.shape[-1] // groups
    for point in product(*map(range, window.results)):
        for tap in product(*map(range, window.taps)):
            at = tuple(
                o * s + k * d - lo
                for o, s, k, d, (lo, _) in zip(
                    point, window.stride, tap, window.dilation, window.padding, strict=True
                )
            )
            if any(not 0 <= i < size for i, size in zip(at, window.spatial, strict=True)):
                continue
            for f in range(w.shape[-1]):
                g = f // n
                read = x[(slice(None), *at, slice(g * c, (g + 1) * c))]
                out[(slice(None), *point, f)] += read @ w[(*tap, slice(None), f)]
    return out


def window_of(op: Op) -> windows.Window:
    names = ("spatial", "taps", "stride", "dilation", "padding")
    return windows.Window(*(op.attrs[n] for n in names))


@settings(max_examples=40, deadline=None)
@given(geometries())
def test_conv_is_its_definition(g: dict[str, Any]) -> None:
    b = Builder()
    shape = (2, *g["spatial"], 2 * g["groups"])
    x, w = image(b, *shape), filters(b, *g["taps"], 2, 2 * g["groups"])
    y = windows.conv(
        b, x, w, stride=g["stride"], dilation=g["dilation"], padding=g["padding"],
        groups=g["groups"],
    )  # fmt: skip
    op = b.nodes[-1]
    assert isinstance(op, Op)
    xs, ws = RNG.normal(size=shape), RNG.normal(size=b.lookup(w).shape)
    expected = naive_conv(xs, ws, window_of(op), g["groups"])
    assert b.lookup(y).shape == expected.shape
    np.testing.assert_allclose(apply(b, y, xs, ws), expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(geometries())
def test_transposed_conv_is_the_adjoint(g: dict[str, Any]) -> None:
    """⟨conv(x), y⟩ = ⟨x, conv_transpose(y)⟩, taps [C, O] read the other way round."""
    b = Builder()
    padding = "same" if g["padding"] == "same" else "valid"
    up = {"stride": g["stride"], "dilation": g["dilation"], "padding": padding}
    shape = (2, *g["spatial"], 4)
    big = windows.conv_transpose(b, image(b, *shape), filters(b, *g["taps"], 4, 3), **up)
    large = b.lookup(big).shape
    small, w = RNG.normal(size=shape), RNG.normal(size=(*g["taps"], 4, 3))
    c = Builder()
    y = windows.conv(c, image(c, *large), filters(c, *g["taps"], 3, 4), **up)
    assert c.lookup(y).shape == shape
    x = RNG.normal(size=large)
    left = (apply(c, y, x, np.swapaxes(w, -1, -2)) * small).sum()
    right = (apply(b, big, small, w) * x).sum()
    assert left == pytest.approx(right, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "taps", "options", "expected"),
    [
        (224, 7, {"stride": 2, "padding": "same"}, 112),  # the stem of a ResNet
        (224, 16, {"stride": 16, "padding": "valid"}, 14),  # the patches of a ViT
        (10, 3, {"dilation": 2, "padding": "valid"}, 6),
        (10, 3, {"dilation": 2, "padding": "same"}, 10),
        (7, 2, {"stride": 3, "padding": [(1, 0)]}, 3),
        (5, 3, {"padding": 1}, 5),
    ],
)
def test_result_sizes(n: int, taps: int, options: dict[str, Any], expected: int) -> None:
    b = Builder()
    y = windows.conv(b, image(b, 2, n, 3), filters(b, taps, 3, 4), **options)
    assert b.lookup(y).shape == (2, expected, 4)
    assert b.lookup(y).dims == ("B", "H", "O")


@pytest.mark.parametrize(
    ("n", "taps", "options", "expected"),
    [
        (14, 2, {"stride": 2, "padding": "same"}, 28),  # a U-Net's way up
        (14, 3, {"stride": 2, "padding": "same"}, 28),
        (14, 3, {"stride": 2, "padding": "valid"}, 29),
        (14, 1, {"stride": 2, "padding": "valid"}, 28),
        (14, 4, {"stride": 2, "padding": 1}, 28),  # a DCGAN layer
    ],
)
def test_transposed_result_sizes(
    n: int, taps: int, options: dict[str, Any], expected: int
) -> None:
    b = Builder()
    y = windows.conv_transpose(b, image(b, 2, n, 3), filters(b, taps, 3, 4), **options)
    assert b.lookup(y).shape == (2, expected, 4)


def test_flops_of_a_resnet_stem_and_its_gradients() -> None:
    """2 · batch · outputs · taps · channels in · channels out, thrice, as for any product."""

    def build(b: Builder) -> str:
        x = b.param("p", (2, 32, 32, 3), ("B", "H", "W", "C"))
        w = b.param("w", (7, 7, 3, 64), ("kh", "kw", "I", "O"))
        y = windows.conv(b, x, w, stride=2)
        return b.map("loss", [(y, b.lookup(y).dims)], (), ("x", 0))

    products = {
        op.kind: contraction_sizes(op) for op, _ in step_of(build).walk() if "conv" in op.kind
    }
    points = 2 * 16 * 16
    assert products == {
        "conv": (1, points, 64, 49 * 3),
        "conv_dx": (1, points, 3, 49 * 64),
        "conv_dw": (1, 49 * 3, 64, points),
    }


def test_flops_of_grouped_and_depthwise_convolutions() -> None:
    b = Builder()
    windows.conv(b, image(b, 2, 8, 6), filters(b, 3, 1, 6), groups=6)
    op = b.nodes[-1]
    assert isinstance(op, Op)
    assert contraction_sizes(op) == (6, 16, 1, 3)
    assert vector_operations(op) == 0


def test_pooling_counts_one_operation_per_tap() -> None:
    b = Builder()
    windows.max_pool(b, image(b, 2, 8, 8, 6), window=2)
    op = b.nodes[-1]
    assert isinstance(op, Op)
    assert contraction_sizes(op) is None
    assert vector_operations(op) == 2 * 4 * 4 * 6 * 4


def test_pooling_values() -> None:
    b = Builder()
    x = image(b, 1, 4, 4, 1)
    top = windows.max_pool(b, x, window=2)
    mean = windows.avg_pool(b, x, window=2, padding=[(1, 0), (0, 1)], stride=(3, 4))
    values = np.arange(16.0).reshape(1, 4, 4, 1)
    out = reference.evaluate(b.graph([top, mean]), {"x": values})
    assert out[top][0, :, :, 0].tolist() == [[5, 7], [13, 15]]
    # Rows (padding, 0) and (2, 3) of columns (0, 1); padding counts as zeros.
    assert out[mean][0, :, :, 0].tolist() == [[0.25], [10.5]]


def test_of_equal_maxima_the_first_takes_the_gradient() -> None:
    b = Builder()
    x = b.param("x", (1, 4, 1), ("B", "H", "C"))
    windows.max_pool(b, x, window=2)
    op = next(n for n in b.nodes if n.name == "max_pool")
    assert isinstance(op, Op)
    g = b.input("g", (1, 2, 1), ("B", "H", "C"), "f32")
    windows.VJPS["max_pool"](b, op, {"max_pool": g}, [0])
    back = b.nodes[-1]
    assert isinstance(back, Op)
    xs = np.array([3.0, 3.0, 1.0, 2.0]).reshape(1, 4, 1)
    ys = np.array([3.0, 2.0]).reshape(1, 2, 1)
    (dx,) = kernels.evaluate(back, [xs, ys, np.array([5.0, 7.0]).reshape(1, 2, 1)], {})
    assert dx.ravel().tolist() == [5, 0, 0, 7]


def test_upsampling_repeats_points() -> None:
    b = Builder()
    y = windows.upsample(b, image(b, 1, 2, 1), factor=3)
    out = apply(b, y, np.array([1.0, 2.0]).reshape(1, 2, 1))
    assert out.ravel().tolist() == [1, 1, 1, 2, 2, 2]


def test_spatial_dimensions_of_upsampling_stay_shardable() -> None:
    b = Builder()
    windows.upsample(b, image(b, 2, 4, 4, 3), factor=2)
    op = b.nodes[-1]
    assert isinstance(op, Op)
    kinds = {f.name: f.kind for f in op.rule.factors}
    assert kinds["H"] == "parallel"
    assert kinds["H.again"] == "blocked"


def test_factor_kinds_of_a_convolution() -> None:
    step = step_of(CASES["conv"])
    kinds = {
        op.kind: {f.name: f.kind for f in op.rule.factors}
        for op, _ in step.walk()
        if op.kind in windows.ROLES
    }
    window = dict.fromkeys(("H", "W", "H.out", "W.out", "kH", "kW"), "window")
    assert kinds["conv"] == {"B": "parallel", "C": "reduce", "O": "parallel"} | window
    assert kinds["conv_dx"] == {"B": "parallel", "C": "parallel", "O": "reduce"} | window
    assert kinds["conv_dw"] == {"B": "reduce", "C": "parallel", "O": "parallel"} | window


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((2, 8, 3), (3, 4, 5), {}, "3 channels, but 'w' reads 4 in each of 1 groups"),
        ((2, 8, 4), (3, 2, 5), {"groups": 2}, "5 features do not divide into 2 groups"),
        ((2, 8, 3), (3, 3, 3, 5), {}, "needs at least 4: batch, spatial, channels"),
        ((2, 2, 3), (3, 3, 5), {"padding": "valid"}, "does not fit into [2]"),
        ((2, 8, 3), (3, 3, 5), {"padding": "sane"}, "'same', 'valid' or pairs, not 'sane'"),
        ((2, 8, 3), (3, 3, 5), {"padding": [(1, -1)]}, "none negative"),
        ((2, 8, 3), (3, 3, 5), {"padding": [1, 1]}, "1 spatial dimensions, but padding is"),
        ((2, 8, 3), (3, 3, 5), {"stride": 0}, "stride [0] must be at least 1"),
        ((2, 8, 3), (3, 3, 5), {"dilation": (1, 2)}, "but dilation is [1, 2]"),
        ((2, 3), (3, 5), {}, "must be [taps…, channels / groups, features]"),
    ],
)
def test_errors_name_the_op_and_the_cause(
    x: tuple[int, ...], w: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    b = Builder()
    with pytest.raises(GraphError) as error:
        windows.conv(b, image(b, *x), filters(b, *w), name="stem", **options)
    assert str(error.value).startswith("stem: ")
    assert message in str(error.value)


def test_a_transposed_result_must_have_points() -> None:
    b = Builder()
    with pytest.raises(GraphError, match=r"spatial sizes \[-1\]"):
        windows.conv_transpose(b, image(b, 2, 1, 3), filters(b, 3, 3, 4), padding=2)


def test_pooling_needs_an_image() -> None:
    b = Builder()
    with pytest.raises(GraphError, match=r"pool: 'x'.* is not"):
        windows.max_pool(b, image(b, 2, 3), window=2, name="pool")


# ---- JAX ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax() -> Iterator[Any]:
    """JAX computing in float64, for this module only."""
    module = pytest.importorskip("jax")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", before)


def layouts(rank: int) -> tuple[str, str, str]:
    spatial = "HWD"[:rank]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


@settings(max_examples=15, deadline=None)
@given(g=geometries())
def test_conv_and_its_gradients_agree_with_jax(jax: Any, g: dict[str, Any]) -> None:
    b = Builder()
    shape, rank = (2, *g["spatial"], 2 * g["groups"]), len(g["taps"])
    x, w = image(b, *shape), filters(b, *g["taps"], 2, 2 * g["groups"])
    windows.conv(
        b, x, w, stride=g["stride"], dilation=g["dilation"], padding=g["padding"],
        groups=g["groups"],
    )  # fmt: skip
    op = b.nodes[-1]
    assert isinstance(op, Op)
    xs, ws = RNG.normal(size=shape), RNG.normal(size=b.lookup(w).shape)
    padding = g["padding"].upper() if isinstance(g["padding"], str) else g["padding"]

    def theirs(a: Any, f: Any) -> Any:
        return jax.lax.conv_general_dilated(
            a, f, g["stride"], padding, rhs_dilation=g["dilation"],
            dimension_numbers=layouts(rank), feature_group_count=g["groups"],
        )  # fmt: skip

    value, pull = jax.vjp(theirs, xs, ws)
    (ours,) = kernels.evaluate(op, [xs, ws], {})
    np.testing.assert_allclose(ours, value, atol=1e-10)
    cotangent = RNG.normal(size=ours.shape)
    name = b.input("g", ours.shape, b.lookup(op.outs[0]).dims, "f32")
    windows.VJPS["conv"](b, op, {op.outs[0]: name}, [0, 1])
    dx, dw = (n for n in b.nodes[-2:] if isinstance(n, Op))
    for found, expected in zip(
        (*kernels.evaluate(dx, [cotangent, ws], {}), *kernels.evaluate(dw, [xs, cotangent], {})),
        pull(cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (2, 2), (1, 2), (4, 3), (3, 1)])
def test_transposed_conv_agrees_with_jax(jax: Any, padding: str, taps: int, stride: int) -> None:
    b = Builder()
    y = windows.conv_transpose(
        b, image(b, 2, 5, 3), filters(b, taps, 3, 4), stride=stride, padding=padding
    )
    xs, ws = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(taps, 3, 4))
    # transpose_kernel swaps the channels and mirrors the taps: the gradient of a convolution.
    expected = jax.lax.conv_transpose(
        xs, np.swapaxes(ws, 1, 2), (stride,), padding.upper(), transpose_kernel=True,
        dimension_numbers=("NHC", "HIO", "NHC"),
    )  # fmt: skip
    np.testing.assert_allclose(apply(b, y, xs, ws), expected, atol=1e-10)


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, "valid"), (3, 2, "same")])
def test_max_pool_agrees_with_jax(jax: Any, window: int, stride: int, padding: str) -> None:
    b = Builder()
    y = windows.max_pool(b, image(b, 2, 7, 6, 3), window=window, stride=stride, padding=padding)
    xs = RNG.normal(size=(2, 7, 6, 3))
    expected = jax.lax.reduce_window(
        xs, -np.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), padding.upper()
    )
    np.testing.assert_allclose(apply(b, y, xs), expected)
