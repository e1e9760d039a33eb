"""The head to head with XLA's auto-sharding: what its table says of rows, times by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from planner.verify.hlo_reading import Executed

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
from auto_sharding import HEAD, Pair, Side, ring_seconds, table


@pytest.mark.parametrize(
    ("kind", "axes", "sent"),
    [
        ("all-gather", ("x",), 3 / 4),
        ("reduce-scatter", ("x", "y"), 7 / 8),
        ("all-reduce", ("y",), 1.0),
        ("all-to-all", ("x",), 1.0),
        ("collective-permute", ("x",), 1.0),
        ("all-reduce", ("x/2",), 1.0),  # pairs along x
    ],
)
def test_what_a_ring_sends(kind: str, axes: tuple[str, ...], sent: float) -> None:
    """By hand, for 1000 bytes five times, at 50 B/s in each direction."""
    found = ring_seconds([Executed(kind, axes, 1000, 5, "c")], {"x": 4, "y": 2}, 50.0)
    assert found == pytest.approx(5 * 1000 * sent / 100)


def test_a_row_shows_both_sides_and_what_failed() -> None:
    ours = Side("compiled", 1.25, 2**30, 0.25, 0.0125, 3.0)
    text = table([Pair("m", "tpu-v3:2x2 x=8", ours, Side("exhausted", 9.0, 2**34, seconds=12.0))])
    assert text.startswith(HEAD)
    first, second = text[len(HEAD) :].splitlines()
    expected = "| m | tpu-v3:2x2 x=8 | shardplan | 1.2 s | 1.00 GiB | 250 ms | 12.5 ms | 262 ms |"
    assert first == expected
    assert "| XLA | 9.0 s | does not fit (16.00 GiB) | – |" in second
