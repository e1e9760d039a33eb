"""Every number of the catalogue says where it comes from, and every name resolves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
import yaml

import meshes
from meshes.catalogue import ALIASES
from meshes.document import MARKS
from meshes.quantity import quantity

ENTRIES = [name for name, _ in meshes.names()]
DATASHEET = {  # entry: bf16/f16 FLOP/s, memory bytes and memory bytes/s of a chip
    "tpu-v3": (123e12, 32 << 30, 900e9), "tpu-v4": (275e12, 32 << 30, 1200e9),
    "tpu-v5e": (197e12, 16 << 30, 819e9), "tpu-v5p": (459e12, 95 << 30, 2765e9),
    "tpu-v6e": (918e12, 32 << 30, 1638e9), "dgx-a100-80gb": (312e12, 80 << 30, 2039e9),
    "dgx-a100-40gb": (312e12, 40 << 30, 1555e9), "dgx-h100": (989e12, 80 << 30, 3350e9),
}  # fmt: skip


def numbers(node: object, path: str = "") -> Iterator[tuple[str, object, dict[str, object]]]:
    """(path, value, provenance) of every physical constant."""
    if isinstance(node, dict):
        if "value" in node:
            yield path, node["value"], node
            return
        if "mark" in node:  # a row of a curve: several values, one provenance
            for key in ("latency_s", "bytes_per_s"):
                yield f"{path}.{key}", node[key], node
            return
        for key, value in node.items():
            yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif is_number(node):
        yield path, node, {}


def is_number(value: object) -> bool:
    try:
        quantity(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ENTRIES)
def test_every_number_has_a_mark_and_a_known_source(name):
    text = meshes.catalogue_text(name)
    data = yaml.safe_load(text)
    sources = data.pop("sources")
    assert data.pop("schema_version") == 1
    assert data.pop("name") == name
    found = list(numbers(data))
    assert len(found) > 15
    for path, value, provenance in found:
        assert provenance.get("mark") in MARKS, path
        assert provenance.get("source") in sources, path
        assert value is not None, path
    for source in sources:
        assert len(re.findall(rf"source: {source}\b|\({source}\)", text)) > 0, source


@pytest.mark.parametrize("name", ENTRIES)
def test_every_example_resolves_and_lays_out(name):
    example = yaml.safe_load(meshes.catalogue_text(name))["example"]
    topology = meshes.resolve(example)
    assert topology.devices == topology.chips * topology.chip.devices_per_chip
    for shape in meshes.candidate_shapes(topology)[:3]:
        mesh = meshes.logical(topology, shape)
        assert mesh.describe().startswith(f"{topology.chips} chips, {topology.devices} devices")


@pytest.mark.parametrize("name", ENTRIES)
def test_every_chip_has_an_efficiency_table(name):
    example = yaml.safe_load(meshes.catalogue_text(name))["example"]
    table = files("costmodels") / "data" / f"{meshes.resolve(example).chip.efficiency}.yaml"
    assert table.is_file()


@pytest.mark.parametrize("name", DATASHEET)
def test_datasheet_values_are_per_device(name):
    example = yaml.safe_load(meshes.catalogue_text(name))["example"]
    chip = meshes.resolve(example).chip
    dtype = "bf16"
    values = (chip.peak_flops(dtype), chip.hbm_bytes, chip.hbm_bytes_per_s)
    whole = tuple(v * chip.devices_per_chip for v in values)
    assert whole == pytest.approx(DATASHEET[name])
    assert chip.usable_bytes <= chip.hbm_bytes


def test_a_v3_core_may_use_15_5_gib():
    assert meshes.resolve("tpu-v3:4x4").chip.usable_bytes == 15.5 * 2**30


def test_a_missing_type_runs_at_the_rate_of_the_next_wider():
    v100 = meshes.resolve("v100-8:1").chip
    assert v100.peak_flops("bf16") == v100.peak_flops("f32")
    v4 = meshes.resolve("tpu-v4:2x2x1").chip
    assert v4.peak_flops("float8_e4m3fn") == v4.peak_flops("bfloat16")
    with pytest.raises(ValueError, match="complex64"):
        v4.peak_flops("complex64")


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_names(alias):
    assert meshes.catalogue_text(alias) == meshes.catalogue_text(ALIASES[alias])


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        ("tpu-v33:4x4", "unknown-chip", "tpu-v3"), ("v5p:2x2x1", "unknown-chip", "tpu-v5p"),
        ("dgx-a100-80g:1", "unknown-chip", "dgx-a100-80gb"), ("tpu-v3", "bad-name", "tpu-v3:32x32"),
        ("tpu-v3:4by4", "bad-name", "tpu-v3:32x32"), ("tpu-v3:4", "bad-size", "tpu-v3:32x32"),
        ("tpu-v3:0x4", "bad-size", ""), ("tpu-v3:-4x4", "bad-size", ""),
        ("tpu-v3:64x64", "too-large", "mesh file"), ("tpu-v3:33x1", "too-large", ""),
        ("dgx-a100-80gb:2x9", "too-large", ""), ("dgx-a100-80gb:2x2x2", "bad-size", ""),
        ("", "unknown-chip", "tpu-v3"), (":", "unknown-chip", "tpu-v3"),
    ],
)  # fmt: skip
def test_bad_names_say_what_to_write_instead(name, code, hint):
    with pytest.raises(meshes.MeshError) as caught:
        meshes.resolve(name)
    assert caught.value.code == code
    assert hint in caught.value.hint
