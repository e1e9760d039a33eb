"""Collective times: laws on every catalogue machine, and closed forms worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshes
from costmodels.collectives import collective_seconds
from costmodels.program import MOVES

LAID = {
    name: meshes.logical(meshes.resolve(name), shape)
    for name, shape in [
        ("tpu-v2:16x16", {"x": 16, "y": 32}), ("tpu-v3:32x32", {"x": 32, "y": 64}),
        ("tpu-v3:4x4", {"x": 8, "y": 4}), ("tpu-v4:4x8x8", {"x": 32, "y": 8}),
        ("tpu-v5e:4x8", {"x": 8, "y": 4}), ("tpu-v5p:2x2x4", {"x": 4, "y": 4}),
        ("tpu-v6e:16x16", {"x": 16, "y": 16}), ("tpu-v7:4x4x4", {"x": 16, "y": 8}),
        ("dgx-a100-40gb:4", {"x": 4, "y": 8}), ("dgx-a100-80gb:16", {"x": 32, "y": 4}),
        ("dgx-h100:2", {"x": 2, "y": 8}), ("v100-8:4", {"x": 8, "y": 4}),
    ]
}  # fmt: skip
AXES = (("x",), ("y",), ("x", "y"))
BYTES = st.floats(0, 1e12)


def case(f):
    laid, kinds = st.sampled_from(sorted(LAID)), st.sampled_from(MOVES)
    return settings(max_examples=150, deadline=None)(
        given(name=laid, kind=kinds, axes=st.sampled_from(AXES), size=BYTES)(f)
    )


@case
def test_positive_and_finite(name, kind, axes, size):
    assert 0 < collective_seconds(LAID[name], kind, axes, size) < np.inf


@case
def test_grows_with_bytes_and_without_jumps(name, kind, axes, size):
    """Latency plus a rate, of the better of two ways: monotone, and never better in parts."""
    mesh = LAID[name]
    sizes = size * np.array([0, 0.5, 1, 2])
    start, half, whole, double = collective_seconds(mesh, kind, axes, sizes)
    assert start <= half <= whole <= double
    assert whole - half <= (half - start) * (1 + 1e-6) + 1e-15
    assert whole <= 2 * half + 1e-15


@case
def test_one_number_and_many_agree(name, kind, axes, size):
    one = collective_seconds(LAID[name], kind, axes, size)
    many = collective_seconds(LAID[name], kind, axes, [size, size])
    assert list(many) == [one, one]


@case
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(name, kind, axes, size):
    """Or faster, where several dimensions of a torus work at once; then a gather may be one."""
    seconds = {k: collective_seconds(LAID[name], k, axes, size) for k in MOVES}
    assert seconds["all-gather"] == seconds["reduce-scatter"]
    both = seconds["all-gather"] + seconds["reduce-scatter"]
    group = LAID[name].group(axes)
    if group.whole and len(group.of_kind("ring", "line")) > 1:
        assert both / 2 <= seconds["all-reduce"] <= both
    else:
        assert seconds["all-reduce"] == pytest.approx(both, rel=1e-12)


@case
def test_order_of_axes_does_not_matter(name, kind, axes, size):
    mesh = LAID[name]
    turned = collective_seconds(mesh, kind, axes[::-1], size)
    assert turned == collective_seconds(mesh, kind, axes, size)


@pytest.mark.parametrize("kind", [*MOVES, "slice"])
def test_one_device_and_no_axes_cost_nothing(kind):
    mesh = meshes.logical(meshes.resolve("tpu-v4:1x1x1"), {"x": 1})
    assert collective_seconds(mesh, kind, ("x",), 1e9) == 0
    assert collective_seconds(LAID["tpu-v3:4x4"], kind, (), 1e9) == 0


def test_slices_move_nothing():
    assert collective_seconds(LAID["tpu-v3:4x4"], "slice", ("x",), 1e9) == 0


def test_bad_requests_are_named():
    mesh = LAID["tpu-v3:4x4"]
    with pytest.raises(ValueError, match="unknown collective 'gather'"):
        collective_seconds(mesh, "gather", ("x",), 1)
    for size in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            collective_seconds(mesh, "all-gather", ("x",), size)
    with pytest.raises(meshes.MeshError, match="no axis 'z'"):
        collective_seconds(mesh, "all-gather", ("z",), 1)


# ---- by hand ----------------------------------------------------------------------------------

S = 1e9  # bytes: latencies are below a thousandth
V4 = 45e9  # bytes/s of a v4 link in one direction
V3 = 70e9


def gather(name: str, shape: dict[str, int], axes=("x",), kind: str = "all-gather") -> float:
    mesh = meshes.logical(meshes.resolve(name), shape)
    return collective_seconds(mesh, kind, axes, S) - collective_seconds(mesh, kind, axes, 0)


def test_a_ring_uses_both_directions_and_a_line_one():
    # v4 wraps only if all sizes are multiples of 4.
    ring = gather("tpu-v4:4x4x4", {"x": 4, "y": 16})
    line = gather("tpu-v4:4x2x2", {"x": 4, "y": 4})
    assert ring == pytest.approx(S * 3 / 4 / (2 * V4))
    assert line == pytest.approx(S * 3 / 4 / V4)


def test_a_gather_over_several_dimensions_is_one_ring():
    assert gather("tpu-v4:4x4x4", {"x": 16, "y": 4}) == pytest.approx(S * 15 / 16 / (2 * V4))
    # A square of four needs no wraparound to be a ring.
    assert gather("tpu-v4:4x2x2", {"x": 4, "y": 4}, ("y",)) == pytest.approx(S * 3 / 4 / (2 * V4))


def test_an_all_reduce_over_whole_dimensions_uses_all_their_links():
    over = {"x": 16, "y": 4}
    planes = gather("tpu-v4:4x4x4", over, kind="all-reduce")
    assert planes == pytest.approx(2 * S * 15 / 16 / (4 * V4))
    # Over a part of a dimension, or one core of every chip, it is a ring.
    layout = {"x": {"x": 4, "y": 2}, "y": {"y": 2, "z": 4}}
    mesh = meshes.logical(meshes.resolve("tpu-v4:4x4x4"), {"x": 8, "y": 8}, layout)
    start, end = collective_seconds(mesh, "all-reduce", ("y",), [0, S])
    assert end - start == pytest.approx(2 * S * 7 / 8 / (2 * V4))
    cores = gather("tpu-v3:4x4", {"x": 16, "y": 2}, kind="all-reduce")
    assert cores == pytest.approx(2 * S * 15 / 16 / (2 * V3 / 2))


def test_a_gather_over_a_whole_three_dimensional_torus_is_an_all_reduce():
    """A ring would use two of the six links; twice the bytes over all six take less time."""
    whole = {"x": 64}
    reduced = gather("tpu-v4:4x4x4", whole, kind="all-reduce")
    assert reduced == pytest.approx(2 * S * 63 / 64 / (6 * V4))
    assert gather("tpu-v4:4x4x4", whole) == reduced


def test_v3_wraps_only_at_32_and_its_two_cores_share_the_links():
    # Axes over whole dimensions; the cores of a chip belong to y's groups.
    shape = {"x": 32, "y": 64}
    assert gather("tpu-v3:32x32", shape, ("y",)) == pytest.approx(S * 63 / 64 / (2 * V3))
    # Both cores of a chip run an x group each over the same links: half the rate.
    assert gather("tpu-v3:32x32", shape, ("x",)) == pytest.approx(S * 31 / 32 / (2 * V3 / 2))
    small = {"x": 16, "y": 32}
    assert gather("tpu-v3:16x16", small, ("y",)) == pytest.approx(S * 31 / 32 / V3)
    assert gather("tpu-v3:16x16", small, ("x",)) == pytest.approx(S * 15 / 16 / (V3 / 2))


def test_groups_that_interleave_on_a_dimension_share_it():
    topology = meshes.resolve("tpu-v5e:16x1")  # a ring of 16 with 45e9 per link
    layout = {"x": {"x": 4}, "y": {"x": 4}}
    mesh = meshes.logical(topology, {"x": 4, "y": 4}, layout)
    outer = collective_seconds(mesh, "all-gather", ("x",), S)
    inner = collective_seconds(mesh, "all-gather", ("y",), S)
    # y: runs of four neighbours, no wraparound. x: every fourth, four groups on each link, and
    # round the whole ring.
    assert inner == pytest.approx(S * 3 / 4 / 45e9, rel=1e-3)
    assert outer == pytest.approx(S * 3 / 4 / (2 * 45e9 / 4), rel=1e-3)


def test_all_to_all_on_a_ring_is_a_quarter_of_an_all_gather():
    """Halves exchange S n / 4 bytes over two links (scaling-book, "sharding")."""
    n = 16
    exchange = gather("tpu-v5e:16x16", {"x": 16, "y": 16}, kind="all-to-all")
    assert exchange == pytest.approx(S * n / 4 / (2 * 45e9))
    # One device's operand here is the n-th part of the whole array that the book divides.
    whole = gather("tpu-v5e:16x16", {"x": 16, "y": 16}) * n / ((n - 1) / n)
    assert exchange == pytest.approx(whole / 4)


def test_a_shift_uses_one_link():
    shift = gather("tpu-v5e:16x16", {"x": 16, "y": 16}, kind="collective-permute")
    assert shift == pytest.approx(S / 45e9)


def test_v4_all_reduce_rate_is_the_documented_one():
    """Cloud TPU documentation: 1.1 PB/s for a pod of 4096, counting what all links carry."""
    seconds = gather("tpu-v4:16x16x16", {"x": 4096}, kind="all-reduce")
    assert 4096 * 2 * S / seconds == pytest.approx(1.1e15, rel=0.02)


# ---- GPUs -------------------------------------------------------------------------------------

# nccl-tests all-reduce on one node: GPUs → latency in s, bus bandwidth in bytes/s.
MEASURED = {2: (40e-6, 188e9), 4: (44e-6, 212e9), 8: (76e-6, 228e9)}


@pytest.mark.parametrize("gpus", MEASURED)
def test_all_reduce_inside_a_node_follows_the_measured_curve(gpus):
    mesh = meshes.logical(meshes.resolve(f"dgx-a100-80gb:1x{gpus}"), {"x": gpus})
    latency, rate = MEASURED[gpus]
    sizes = 2.0 ** np.arange(10, 35)
    measured = latency + 2 * (gpus - 1) / gpus * sizes / rate
    predicted = collective_seconds(mesh, "all-reduce", ("x",), sizes)
    assert np.mean(np.abs(predicted / measured - 1)) < 0.06


def bus_bandwidth(name: str, shape: dict[str, int], axes: tuple[str, ...]) -> float:
    mesh = meshes.logical(meshes.resolve(name), shape)
    n = mesh.size(axes)
    return 2 * (n - 1) / n * 1e10 / collective_seconds(mesh, "all-reduce", axes, 1e10)


def test_without_a_switch_it_matters_which_gpus_are_together():
    """8 V100: GPUs 0 to 3 have four links each among them, 0 2 4 6 a ring of single links."""
    near = gather("v100-8:1", {"x": 2, "y": 4}, ("y",))
    apart = gather("v100-8:1", {"x": 4, "y": 2}, ("x",))
    assert near == pytest.approx(S * 3 / 4 / 81e9)
    assert apart == pytest.approx(S * 3 / 4 / 40e9)
    switch = [gather("dgx-a100-80gb:1", {"x": 4, "y": 2}, ("x",)),
              gather("dgx-a100-80gb:1", {"x": 2, "y": 4}, ("y",))]  # fmt: skip
    assert switch[0] == switch[1]


def test_two_nodes_reach_the_bandwidth_of_their_ports():
    assert bus_bandwidth("dgx-a100-80gb:2", {"x": 16}, ("x",)) == pytest.approx(192e9, rel=0.06)


def test_a_group_of_one_gpu_per_node_has_one_port():
    shape = {"x": 2, "y": 8}
    one = bus_bandwidth("dgx-a100-80gb:2", shape, ("x",))
    assert one == pytest.approx(24e9, rel=0.01)
    assert bus_bandwidth("dgx-a100-80gb:2", shape, ("y",)) == pytest.approx(228e9, rel=0.01)
    two = bus_bandwidth("dgx-a100-80gb:2", {"x": 4, "y": 4}, ("x",))
    assert two == pytest.approx(2 * one, rel=0.02)


def test_all_to_all_between_nodes_is_bound_by_the_port():
    mesh = meshes.logical(meshes.resolve("dgx-a100-80gb:4"), {"x": 32})
    seconds = collective_seconds(mesh, "all-to-all", ("x",), S)
    assert seconds == pytest.approx(S * 24 / 32 / 24e9, rel=1e-2)
