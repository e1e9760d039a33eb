"""docs/inference.md: predictions of Llama 3 70B against bounds by hand, row by row.

The bounds are computed from the sizes in the model's paper and the machines' datasheets, not from
the graph or the catalogue.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planner.request import Planned, Request, plan
from planner.source import find

DOCS = Path(__file__).parents[2] / "docs" / "inference.md"
CELL = r" *`?([^|`]*)`? *\|"
ROWS = re.findall(rf"^\|{CELL}{CELL} (decode|prefill) \|{CELL * 5}$", DOCS.read_text(), re.M)

LAYERS, WIDTH, HEADS, KEY_HEADS, HEAD, FEED, WORDS = 80, 8192, 64, 8, 128, 28672, 128256
CONTEXT, ITEM_BYTES = 8192, 2
IN_A_LAYER = 2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KEY_HEADS * HEAD + 3 * WIDTH * FEED
# devices, bytes/s, FLOP/s: NVIDIA's A100 datasheet; Jouppi et al. 2023 for TPU v4
MACHINES = {"dgx-a100-80gb:1": (8, 2.039e12, 312e12), "tpu-v4:2x2x4": (16, 1.2e12, 275e12)}
MOST = 4.0  # times the bound: what is left out is latency, padding, unfused softmax
CACHE_BYTES = 2 * LAYERS * KEY_HEADS * HEAD * ITEM_BYTES  # per token


def bound_s(machine: str, phase: str, batch: int) -> float:
    devices, bytes_per_s, flops = MACHINES[machine]
    if phase == "decode":
        weights = (LAYERS * IN_A_LAYER + WIDTH * WORDS) * ITEM_BYTES
        return (weights + batch * CONTEXT * CACHE_BYTES) / (devices * bytes_per_s)
    products = 2 * LAYERS * IN_A_LAYER * CONTEXT + 2 * WIDTH * WORDS
    attention = 4 * CONTEXT**2 * HEADS * HEAD * LAYERS
    return batch * (products + attention) / (devices * flops)


def planned(machine: str, shape: str, phase: str, batch: int) -> Planned:
    sets = (f"inference.phase={phase}", f"inference.batch={batch}", f"inference.context={CONTEXT}")
    return plan(Request(find("llama3-70b", sets), machine, shape))


def test_the_table_is_found() -> None:
    assert len(ROWS) == 6
    assert {row[0] for row in ROWS} == set(MACHINES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:4]))
def test_predictions_keep_to_the_bounds_by_hand(row: tuple[str, ...]) -> None:
    machine, shape, phase, count, bound_text, predicted, ratio, rate = (c.strip() for c in row)
    batch = int(count)
    bound = bound_s(machine, phase, batch)
    assert float(bound_text.removesuffix(" ms")) == pytest.approx(bound * 1e3, rel=2e-3)
    result = planned(machine, shape, phase, batch).result
    seconds = result.timing.step_time_s
    assert bound <= seconds <= MOST * bound
    assert float(predicted.removesuffix(" ms")) == pytest.approx(seconds * 1e3, rel=1e-2)
    assert float(ratio) == pytest.approx(seconds / bound, abs=0.06)
    assert float(rate) == pytest.approx(result.tokens_per_s, rel=1e-2)
    assert result.fits
    utilization = result.mfu if phase == "prefill" else result.bandwidth_utilization
    assert utilization == pytest.approx(bound / seconds, rel=2e-2)


def test_the_cache_is_counted_once() -> None:
    """Donated, it is one buffer per device, split as far as the plan splits it."""
    result = planned("dgx-a100-80gb:1", "x=8", "decode", 64).result
    whole = 64 * CONTEXT * CACHE_BYTES
    assert result.cache_bytes == result.memory.parts["kv_cache"] == whole // 8
    assert result.memory.parts["gradients"] == result.memory.parts["optimizer"] == 0
