"""Amounts as a report shows them: bytes in GiB, seconds, shares, counts. Numbers to text only."""

from __future__ import annotations

GIB = 2**30


def size(amount_bytes: float) -> str:
    """`2.31 GiB`; small amounts in MiB, KiB or B."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if amount_bytes >= factor / 10:
            return f"{amount_bytes / factor:.2f} {unit}"
    return f"{amount_bytes:.0f} B"


def seconds(amount_s: float) -> str:
    """Three digits in the natural unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if amount_s >= factor:
            return f"{_digits(amount_s / factor)} {unit}"
    return "0 s" if amount_s == 0 else f"{_digits(amount_s / 1e-9)} ns"


def share(fraction: float) -> str:
    return f"{fraction:.1%}"


def count(number: float) -> str:
    """`137.5 B` for 137.5e9."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return f"{number:.0f}"


def _digits(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"
