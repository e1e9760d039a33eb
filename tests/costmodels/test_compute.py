"""Kernel times: laws, padding, and the fit quality that the tables state of themselves."""

from __future__ import annotations

import re
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshes
from costmodels.compute import efficiency, matmul_seconds, stream_seconds

CHIPS = {
    chip.name: chip
    for chip in (
        meshes.resolve(name).chip
        for name in (
            "tpu-v2:4x4", "tpu-v3:4x4", "tpu-v4:2x2x1", "tpu-v5e:2x2", "tpu-v5p:2x2x1",
            "tpu-v6e:2x2", "tpu-v7:2x2x1", "dgx-a100-40gb:1", "dgx-a100-80gb:1", "dgx-h100:1",
            "v100-8:1",
        )
    )
}  # fmt: skip
SIZES = st.integers(1, 20_000)
TPUS = sorted(name for name, chip in CHIPS.items() if chip.family == "tpu")

# Estimated cycles of the TPU compiler (libtpu 0.0.52) for 8192 x 8192 x 8192 in bf16, and for
# one v3 product of a decoder layer, [8192, 8192] x [8192, 4096].
CYCLES = [
    ("tpu-v3", 8192, 8192, 8192, 17_315_966), ("tpu-v4", 8192, 8192, 8192, 4_523_672),
    ("tpu-v3", 8192, 4096, 8192, 8_906_540),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CHIPS)), st.integers(1, 64), SIZES, SIZES, SIZES)
def test_a_matmul_is_never_faster_than_peak_or_memory(name, b, m, n, k):
    chip = CHIPS[name]
    seconds = matmul_seconds(chip, b, m, n, k)
    moved = 2 * b * (m * k + k * n + m * n)
    assert seconds >= 2 * b * m * n * k / chip.peak_flops("bf16")
    assert seconds >= moved / chip.hbm_bytes_per_s


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CHIPS)), SIZES, SIZES, SIZES, st.integers(0, 2), st.integers(2, 4))
def test_a_larger_matmul_takes_no_less(name, m, n, k, which, factor):
    sizes, larger = [m, n, k], [m, n, k]
    larger[which] *= factor
    chip = CHIPS[name]
    assert matmul_seconds(chip, 1, *larger) >= matmul_seconds(chip, 1, *sizes) * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_no_work_takes_no_time_and_negative_work_is_refused(name):
    chip = CHIPS[name]
    assert matmul_seconds(chip, 1, 0, 8, 8) == stream_seconds(chip, 0, 0) == 0
    with pytest.raises(ValueError, match="negative"):
        matmul_seconds(chip, 1, -1, 8, 8)
    with pytest.raises(ValueError, match="negative"):
        stream_seconds(chip, -1)
    with pytest.raises(ValueError, match="dtype"):
        matmul_seconds(chip, 1, 8, 8, 8, "complex64")


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_one_size_and_many_agree(name):
    many = matmul_seconds(CHIPS[name], 1, [256, 4096], 512, 1024)
    assert list(many) == [matmul_seconds(CHIPS[name], 1, m, 512, 1024) for m in (256, 4096)]


@pytest.mark.parametrize("name", TPUS)
def test_systolic_arrays_compute_whole_tiles(name):
    """One column more than a tile costs as much as filling the next one."""
    tile = CHIPS[name].matrix_unit.tile[1]
    m, n, k = 4096, 64 * tile, 8192  # the longer side is held, the shorter streams past it
    seconds = [matmul_seconds(CHIPS[name], 1, m, n + c, k) for c in (0, 1, tile)]
    assert seconds[0] < seconds[1]
    assert seconds[1] == pytest.approx(seconds[2], rel=0.005)
    assert seconds[1] - seconds[0] > 0.5 * seconds[0] / 64


def test_gpus_compute_whole_waves():
    """12 x 9 tiles of 256 x 128 fill 108 multiprocessors once; one more row of tiles does not."""
    chip = CHIPS["dgx-a100-80gb"]
    full = matmul_seconds(chip, 1, 12 * 256, 9 * 128, 8192)
    more = matmul_seconds(chip, 1, 13 * 256, 9 * 128, 8192)
    assert more / full > 1.03 * 13 / 12


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CHIPS)), st.floats(1, 1e12), st.floats(0, 1e12))
def test_streams_grow_with_bytes_and_arithmetic(name, moved, work):
    chip = CHIPS[name]
    seconds = stream_seconds(chip, moved, work)
    assert seconds >= max(moved / chip.hbm_bytes_per_s, work / chip.vector_flops)
    assert stream_seconds(chip, 2 * moved, work) >= seconds
    assert stream_seconds(chip, moved, 2 * work) >= seconds


@pytest.mark.parametrize(("name", "m", "n", "k", "cycles"), CYCLES)
def test_large_matmuls_take_what_the_compiler_estimates(name, m, n, k, cycles):
    chip = CHIPS[name]
    assert matmul_seconds(chip, 1, m, n, k) == pytest.approx(cycles / chip.clock_hz, rel=0.05)


def test_the_best_measured_matmul_of_a_gpu_is_reached_and_not_passed():
    """stas00/ml-engineering, maximum achievable matmul FLOPS: 271.2 (A100), 794.5 (H100)."""
    for name, best in (("dgx-a100-80gb", 271.2e12), ("dgx-h100", 794.5e12)):
        sizes = np.array([4096, 6144, 8192, 10240, 16384])
        rates = 2.0 * sizes**3 / matmul_seconds(CHIPS[name], 1, sizes, sizes, sizes)
        assert rates.max() == pytest.approx(best, rel=0.04)


@pytest.mark.parametrize("name", [name for name in TPUS if name != "tpu-v7"])
def test_every_fitted_table_states_a_quality_worth_having(name):
    text = (files("costmodels") / "data" / f"{CHIPS[name].efficiency}.yaml").read_text()
    assert "estimated cycles of libtpu" in text
    found = re.search(r"mean ([\d.]+), median ([\d.]+)", text)
    assert found, "no fit_error"
    assert float(found[1]) < 0.15
    assert float(found[2]) < 0.07


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_efficiencies_are_fractions(name):
    table = efficiency(CHIPS[name].efficiency)
    fractions = [table.compute, table.memory, *(e for _, e in table.stream)]
    assert all(0 < x <= 1 for x in [*fractions, *(e for *_, e in table.tiles)])


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="no fitted efficiency table 'tpu-v99'"):
        efficiency("tpu-v99")
