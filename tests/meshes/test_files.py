"""Mesh files: what they change, and errors with their place and a hint."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshes
from meshes.quantity import quantity
from meshes.resolve import from_text

WHOLE = """
    name: two-boxes
    chip:
      family: gpu
      device_kind: Box
      devices_per_chip: 1
      peak_flops: {bf16: 100e12, f32: 50e12}
      hbm_bytes: 40GiB
      usable_bytes: 38GiB
      hbm_bytes_per_s: 1TB/s
      vector_flops: 10TFLOPS
      clock_hz: 1.4GHz
      launch_s: 2us
      matrix_unit: {kind: sm, tile: [256, 128, 32], units: 100}
      efficiency: a100
      overlap: [all-gather]
    start_s: 5us
    dims:
      - {name: host, size: 2, kind: network, bytes_per_s: 100Gb/s, latency_s: 10us}
      - {name: gpu, size: 4, kind: switch, bytes_per_s: 200GB/s, latency_s: 1us}
"""


def read(text: str) -> meshes.Topology:
    return from_text(dedent(text), "box.yaml")


def test_a_machine_in_full():
    topology = read(WHOLE)
    assert (topology.name, topology.devices, topology.dims) == ("two-boxes", 8, (2, 4))
    host, gpu = topology.links
    assert host.bytes_per_s == 12.5e9
    assert gpu.curve == ((2, 1e-6, 200e9),)
    assert topology.chip.overlap == {"all-gather"}
    assert topology.chip.clock_hz == 1.4e9


def test_a_file_on_top_of_an_entry_changes_only_what_it_names():
    base = meshes.resolve("tpu-v3:32x32")
    changed = read("""
        base: tpu-v3:32x32
        chip: {usable_bytes: 30GiB}
        dims:
          y: {bytes_per_s: 35e9, kind: line}
    """)
    assert changed.chip.usable_bytes == 15 * 2**30
    assert changed.chip.peaks == base.chip.peaks
    assert changed.links[0] == base.links[0]
    assert (changed.links[1].bytes_per_s, changed.links[1].kind) == (35e9, "line")
    assert changed.fingerprint != base.fingerprint


def test_the_curve_of_groups_apart_may_be_given():
    changed = read("""
        base: dgx-a100-80gb:2
        dims: {gpu: {curve_apart: {2: {latency_s: 1us, bytes_per_s: 10e9}}}}
    """).links[1]
    assert changed.apart == ((2, 1e-6, 10e9),)
    assert changed.curve == meshes.resolve("dgx-a100-80gb:2").links[1].curve


def test_a_faster_switch_scales_its_whole_curve():
    changed = read("""
        base: dgx-a100-80gb:2
        dims: {gpu: {bytes_per_s: 390e9}}
    """).links[1]
    base = meshes.resolve("dgx-a100-80gb:2").links[1]
    assert [n for n, _, _ in changed.curve] == [n for n, _, _ in base.curve]
    for (_, a, new), (_, b, old) in zip(changed.curve, base.curve, strict=True):
        assert a == b
        assert new == pytest.approx(2 * old)


def broken(old: str, new: str) -> str:
    assert old in WHOLE
    return WHOLE.replace(old, new)


# text, code, (line, column), a word of the message, a word of the hint
BROKEN = [
    (broken("family: gpu", "familly: gpu"), "unknown-key", (3, 3), "familly", "family"),
    (broken("hbm_bytes: 40GiB", "hbm_bytes: 40GiBs"), "bad-value", (7, 14), "40GiBs", ""),
    (broken("hbm_bytes: 40GiB", "hbm_bytes: -1"), "bad-value", (7, 14), "-1", ""),
    (broken("kind: network", "kind: netwrk"), "bad-value", (18, 33), "netwrk", "network"),
    (broken("size: 4", "size: 0"), "bad-value", (19, 23), "size", ""),
    (broken("size: 4", "size: 2.5"), "bad-value", (19, 23), "whole number", ""),
    (broken("overlap: [all-gather]", "overlap: [gather]"), "bad-value", (15, 12), "gather",
     "all-gather"),
    (broken("overlap: [all-gather]", "overlap: all-gather"), "wrong-type", (15, 12), "list", ""),
    (broken("{bf16: 100e12, f32: 50e12}", "{bf16: 100e12}"), "bad-value", (3, 3), "f32", ""),
    (broken("name: gpu", "name: host"), "bad-value", (18, 3), "differ", ""),
    (broken("efficiency: a100", "launch_s: 1us"), "duplicate-key", (14, 3), "launch_s", "keep one"),
    (broken("chip:", "chip: ["), "yaml-syntax", None, "YAML", ""),
    ("base: tpu-v9:4x4", "bad-value", (1, 7), "tpu-v9", "tpu-v"),
    ("base: tpu-v4:4x4x4\ndims: {w: {size: 2}}", "unknown-key", (2, 8), "'w'", "x, y, z"),
    ("base: dgx-h100:2\ndims: {gpu: {kind: ring}}", "bad-value", (2, 20), "switch", "full"),
    ("base: tpu-v4:4x4x4\nschema_version: 2", "bad-value", (2, 17), "schema_version", ""),
    ("- a\n- b", "wrong-type", (1, 1), "mapping", ""),
    ("", "empty", (1, 1), "empty", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "place", "message", "hint"), BROKEN)
def test_errors_name_their_place(text, code, place, message, hint):
    with pytest.raises(meshes.MeshError) as caught:
        from_text(dedent(text).lstrip("\n"), "box.yaml")
    error = caught.value
    assert error.code == code
    assert message in error.message
    assert hint in error.hint
    assert error.file == "box.yaml"
    if place is not None:
        assert (error.line, error.column) == place
    assert str(error).startswith(f"box.yaml:{error.line}:{error.column}: ")


def test_usable_bytes_within_memory():
    with pytest.raises(meshes.MeshError, match="exceeds hbm_bytes"):
        read(broken("usable_bytes: 38GiB", "usable_bytes: 41GiB"))


def test_order_from_the_outside_in():
    lines = dedent(WHOLE).splitlines()
    with pytest.raises(meshes.MeshError, match="outermost to the innermost"):
        from_text("\n".join([*lines[:-2], lines[-1], lines[-2]]), "box.yaml")


def test_files_that_are_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(meshes.MeshError) as caught:
        meshes.resolve(str(tmp_path / "none.yaml"))
    assert caught.value.code == "no-file"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    with pytest.raises(meshes.MeshError, match="UTF-8"):
        meshes.resolve(str(binary))


@given(st.text(max_size=200))
def test_any_other_text_is_a_mesh_error(text):
    with pytest.raises(meshes.MeshError):  # and nothing else; no random text is a machine
        from_text(text, "any.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("16GiB", 2**34), ("900e9", 9e11), ("200Gb/s", 25e9), ("1.5 TB/s", 1.5e12), ("10us", 1e-5),
     ("1_000", 1000.0), (7, 7.0), ("940MHz", 9.4e8)],
)  # fmt: skip
def test_quantities(text, value):
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "GiB", "1GIB", "1 2", "-1", "nan", "inf", True, "1e999"])
def test_no_quantities(text):
    with pytest.raises(ValueError, match="expected a number"):
        quantity(text)
