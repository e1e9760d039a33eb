"""Logical meshes: every device once, axes own whole dimensions where they can."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshes
from meshes.links import interpolate

TOPOLOGIES = (
    "tpu-v3:32x32", "tpu-v3:4x8", "tpu-v4:4x4x8", "tpu-v5e:16x16", "dgx-a100-80gb:16",
    "dgx-h100:4x4",
)  # fmt: skip


@st.composite
def laid(draw: st.DrawFn) -> meshes.LogicalMesh:
    """A mesh of up to three axes over one of the topologies (all sizes are powers of two)."""
    topology = meshes.resolve(draw(st.sampled_from(TOPOLOGIES)))
    left = topology.devices.bit_length() - 1
    sizes = []
    for _ in range(draw(st.integers(0, 2))):
        sizes.append(draw(st.integers(0, left)))
        left -= sizes[-1]
    shape = {f"a{i}": 2**n for i, n in enumerate([*sizes, left])}
    return meshes.logical(topology, shape)


@settings(max_examples=100, deadline=None)
@given(laid())
def test_every_device_is_there_once(mesh):
    order = mesh.device_order()
    assert order.shape == tuple(n for _, n in mesh.axes)
    assert sorted(order.ravel()) == list(range(mesh.devices))


@settings(max_examples=100, deadline=None)
@given(laid())
def test_parts_fill_every_dimension_and_every_axis(mesh):
    for name, size in mesh.axes:
        assert prod(p.size for p in mesh.parts if p.axis == name) == size
    for i, dim in enumerate(mesh.topology.links):
        assert prod(p.size for p in mesh.parts if p.dim == i) == dim.size


@settings(max_examples=60, deadline=None)
@given(laid(), st.data())
def test_a_group_holds_the_devices_that_differ_only_along_its_axes(mesh, data):
    axes = data.draw(st.lists(st.sampled_from(mesh.names), unique=True))
    group = mesh.group(axes)
    assert group.size == mesh.size(axes)
    where = [mesh.names.index(a) for a in axes]
    order = np.moveaxis(mesh.device_order(), where, range(len(where)))
    members = order.reshape(group.size, -1)[:, 0]
    spread = mesh.topology.coordinates()[members]
    varying = [len(set(column)) for column in spread.T]
    assert [n for n in varying if n > 1] == [level.size for level in group.levels]


def test_axes_take_whole_dimensions_and_the_cores_go_where_the_links_are():
    mesh = meshes.logical(meshes.resolve("tpu-v3:32x32"), {"x": 32, "y": 64})
    assert mesh.assignment() == "x = x (32); y = y (32) × core (2)"
    assert mesh.describe() == "1024 chips, 2048 devices, mesh x=32 × y=64"


def test_switched_machines_are_row_major():
    mesh = meshes.logical(meshes.resolve("dgx-a100-80gb:4"), {"data": 4, "model": 8})
    assert mesh.assignment() == "data = node (4); model = gpu (8)"
    assert (mesh.device_order() == np.arange(32).reshape(4, 8)).all()


def test_an_explicit_layout_is_kept():
    topology = meshes.resolve("tpu-v4:4x4x4")
    layout = {"a": {"x": 4, "y": 2}, "b": {"y": 2, "z": 4}}
    mesh = meshes.logical(topology, {"a": 8, "b": 8}, layout)
    assert mesh.assignment() == "a = x (4) × y (2 of 4, stride 2); b = y (2 of 4) × z (4)"


@pytest.mark.parametrize(
    ("shape", "layout", "code"),
    [
        ({}, None, "bad-shape"), ({"x": 5}, None, "bad-shape"),
        ({"x": 0, "y": 1}, None, "bad-shape"), ({"x": True, "y": 64}, None, "bad-shape"),
        ({"1x": 64}, None, "bad-axis"),
        ({"a": 8, "b": 8}, {"c": {}}, "bad-layout"), ({"a": 64}, {"a": {"w": 64}}, "bad-layout"),
        ({"a": 8, "b": 8}, {"a": {"x": 4}, "b": {"y": 4, "z": 4}}, "bad-layout"),
        ({"a": 4, "b": 16}, {"a": {"x": 4}, "b": {"x": 4, "z": 4}}, "bad-layout"),
    ],
)  # fmt: skip
def test_impossible_shapes_are_mesh_errors(shape, layout, code):
    with pytest.raises(meshes.MeshError) as caught:
        meshes.logical(meshes.resolve("tpu-v4:4x4x4"), shape, layout)
    assert caught.value.code == code


def test_a_wrong_count_suggests_shapes_that_fit():
    with pytest.raises(meshes.MeshError) as caught:
        meshes.logical(meshes.resolve("tpu-v3:32x32"), {"x": 32, "y": 32})
    assert "1024 devices" in caught.value.message
    for shape in caught.value.hint.removeprefix("try ").split(" or "):
        sizes = [int(part.split("=")[1]) for part in shape.split(",")]
        assert prod(sizes) == 2048


def test_sizes_that_divide_nothing_have_no_layout():
    topology = meshes.resolve("tpu-v5e:6x4")
    with pytest.raises(meshes.MeshError) as caught:
        meshes.logical(topology, {"x": 8, "y": 3}, {"x": {"x": 8}, "y": {"y": 3}})
    assert caught.value.code == "bad-layout"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_candidates_fit_and_end_with_one_axis(name):
    topology = meshes.resolve(name)
    shapes = meshes.candidate_shapes(topology)
    assert all(prod(s.values()) == topology.devices for s in shapes)
    assert len(shapes[-1]) == 1
    assert len({tuple(s.items()) for s in shapes}) == len(shapes)


def test_fingerprints_follow_what_prices_depend_on():
    assert meshes.resolve("tpu-v3:4x4").fingerprint == meshes.resolve("tpu-v3:4x4").fingerprint
    assert len({meshes.resolve(name).fingerprint for name in TOPOLOGIES}) == len(TOPOLOGIES)


@given(st.integers(2, 64))
def test_curves_are_interpolated_and_flat_outside(size):
    curve = ((2, 1.0, 10.0), (4, 3.0, 20.0), (8, 4.0, 40.0))
    latency, rate = interpolate(curve, size)
    assert 1 <= latency <= 4
    assert 10 <= rate <= 40
    assert interpolate(curve, 3) == (2.0, 15.0)
    assert interpolate(curve, 100) == (4.0, 40.0)


@pytest.mark.parametrize(
    ("name", "shape", "machine", "owned"),
    [
        ("tpu-v4:4x8x8", {"pipe": 8, "data": 8, "model": 4}, "tpu-v4:4x1x8",
         "data = z (8); model = x (4)"),
        ("tpu-v5e:4x8", {"pipe": 2, "data": 4, "model": 4}, "tpu-v5e:4x4",
         "data = x (4); model = y (4)"),
        ("dgx-a100-80gb:4x8", {"pipe": 2, "data": 2, "model": 8}, "dgx-a100-80gb:2x8", None),
    ],
)  # fmt: skip
def test_the_devices_at_one_place_are_a_smaller_machine(
    name: str, shape: dict[str, int], machine: str, owned: str | None
) -> None:
    mesh = meshes.logical(meshes.resolve(name), shape)
    inner = mesh.at_one_place("pipe")
    assert inner.topology.name == machine
    assert inner.axes == mesh.axes[1:]
    assert inner.devices == mesh.devices // shape["pipe"]
    assert inner.device_order().shape == tuple(size for _, size in inner.axes)
    if owned is not None:
        assert inner.assignment() == owned
    shortened = [b.kind for a, b in zip(mesh.topology.links, inner.topology.links, strict=True)
                 if a.size != b.size]  # fmt: skip
    assert "ring" not in shortened


def test_cores_of_a_chip_stay_together() -> None:
    mesh = meshes.logical(
        meshes.resolve("tpu-v3:4x4"), {"pipe": 2, "data": 16},
        {"pipe": {"core": 2}, "data": {"x": 4, "y": 4}},
    )  # fmt: skip
    with pytest.raises(meshes.MeshError, match="divides the cores of a chip"):
        mesh.at_one_place("pipe")
