"""A fit finds the table that made the sample, and is no worse than where it started."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

import meshes
from costmodels.calibrate import Sample, calibrate, mean_error, predicted, search
from costmodels.compute import efficiency, from_data, to_data

CHIPS = {name: meshes.resolve(name).chip for name in ("dgx-a100-80gb:1", "tpu-v4:2x2x1")}


def kernels(seed: int, count: int) -> list[Sample]:
    choose = random.Random(seed)
    sizes = [2**i for i in range(8, 14)]
    products = [
        Sample("bf16", 1.0, (1, choose.choice(sizes), choose.choice(sizes), choose.choice(sizes)))
        for _ in range(count)
    ]
    return products + [Sample("bf16", 1.0, bytes=10 ** choose.uniform(6, 9)) for _ in range(count)]


@pytest.mark.parametrize("name", CHIPS)
def test_a_fit_finds_the_table_behind_its_sample(name: str) -> None:
    chip = CHIPS[name]
    start = efficiency(chip.efficiency)
    shares = tuple((width, 0.75 * share) for width, share in start.stream)
    truth = replace(start, compute=0.8 * start.compute, overhead_s=8e-6, stream=shares)
    sample = kernels(1, 40)
    times = predicted(truth, chip, sample)
    measured = [replace(s, seconds=float(t)) for s, t in zip(sample, times, strict=True)]
    found = calibrate(chip, measured)
    assert mean_error(start, chip, measured) > 0.1
    assert found.error < 0.02
    assert found.cross_validated is not None
    assert found.cross_validated < 0.03
    sides = [side for s in sample if s.matmul for side in s.matmul[1:]]
    assert found.table.sizes == (min(sides), max(sides))
    unseen = kernels(2, 20)
    expected = predicted(truth, chip, unseen)
    assert predicted(found.table, chip, unseen) == pytest.approx(expected, rel=0.1)


def test_nothing_runs_faster_than_the_datasheet() -> None:
    chip = CHIPS["dgx-a100-80gb:1"]
    sample = [replace(s, seconds=1e-9) for s in kernels(3, 10)]
    table = calibrate(chip, sample).table
    assert table.compute <= 1
    assert table.memory <= 1
    assert all(share <= 1 for _, share in table.stream)


def test_few_kernels_are_not_cross_validated() -> None:
    found = calibrate(CHIPS["dgx-a100-80gb:1"], kernels(4, 2))
    assert found.cross_validated is None


def test_the_search_finds_a_minimum() -> None:
    found = search([1.0, 1.0], lambda v: (v[0] - 3) ** 2 + (v[1] - 0.2) ** 2)
    assert found == pytest.approx([3, 0.2], rel=0.01)


@pytest.mark.parametrize("name", ["a100", "h100", "v100", "tpu-v3", "tpu-v5e"])
def test_tables_survive_being_written(name: str) -> None:
    table = efficiency(name)
    assert from_data(to_data(table)) == table


@pytest.mark.parametrize("text", ["{", '{"compute": 1}', '{"compute": "x"}'])
def test_a_table_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no table of a chip"):
        efficiency(text)
