"""Shapes that the search leaves out price like one that it keeps."""

from __future__ import annotations

from itertools import chain, combinations
from math import prod

import pytest

import meshes
from costmodels.collectives import collective_seconds

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
SIZE = 1 << 20
TOPOLOGIES = ["tpu-v3:4x4", "tpu-v4:2x4x4", "dgx-a100-80gb:4x8", "tpu-v5e:4x8", "dgx-h100:3x4"]


def ordered_shapes(devices: int, rank: int) -> list[tuple[int, ...]]:
    if rank == 1:
        return [(devices,)]
    sizes = [n for n in range(2, devices) if devices % n == 0]
    return [(n, *rest) for n in sizes for rest in ordered_shapes(devices // n, rank - 1)]


def prices(mesh: meshes.LogicalMesh, order: tuple[str, ...]) -> list[float]:
    """Of every collective over every set of axes, which are taken in `order`."""
    subsets = chain.from_iterable(combinations(order, n) for n in range(1, len(order) + 1))
    return [collective_seconds(mesh, kind, s, SIZE) for s in subsets for kind in KINDS]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_shape_prices_like_a_candidate(name: str) -> None:
    topology = meshes.resolve(name)
    kept = [
        (tuple(size for _, size in mesh.axes), prices(mesh, mesh.names))
        for mesh in meshes.every_mesh(topology)
    ]
    for rank in (1, 2, 3):
        for sizes in ordered_shapes(topology.devices, rank):
            mesh = meshes.logical(topology, dict(zip("abc", sizes, strict=False)))
            wanted = prices(mesh, mesh.names)
            assert any(
                own == sizes and found == pytest.approx(wanted) for own, found in kept
            ), sizes


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_candidates_differ_and_use_all_devices(name: str) -> None:
    topology = meshes.resolve(name)
    found = meshes.every_mesh(topology)
    assert all(prod(size for _, size in mesh.axes) == topology.devices for mesh in found)
    priced = [tuple(prices(m, m.names)) for m in found]
    assert len(set(priced)) == len(found)


def test_natural_shapes_come_first() -> None:
    topology = meshes.resolve("tpu-v3:4x4")
    assert dict(meshes.every_mesh(topology)[0].axes) == meshes.candidate_shapes(topology)[0]


def test_one_device_has_one_mesh() -> None:
    assert [m.axes for m in meshes.every_mesh(meshes.resolve("dgx-h100:1x1"))] == [
        (("data", 1),)
    ]
