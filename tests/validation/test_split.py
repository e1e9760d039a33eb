"""The split is fixed: known ids stay where they were when it was committed."""

from __future__ import annotations

import pytest

from planner.validation.split import EVEN, ODD, half, may_fit

# First hex digits of `printf %s ID | sha256sum`.
KNOWN = {
    "megatron-sc21-1.7b": EVEN,
    "megatron-sc21-39.1b": ODD,
    "korthikanti-22b-full": ODD,
    "korthikanti-22b-seqsel": EVEN,
    "palm-540b": ODD,
    "mlperf11-bert480b-result5": EVEN,
}


@pytest.mark.parametrize("run_id", KNOWN)
def test_runs_stay_in_their_half(run_id: str) -> None:
    assert half(run_id) == KNOWN[run_id]


def test_only_even_runs_outside_seeds_may_be_fitted() -> None:
    assert may_fit("megatron", "megatron-sc21-1.7b")
    assert not may_fit("megatron", "megatron-sc21-39.1b")
    assert not may_fit("seeds", "megatron-sc21-1.7b")
