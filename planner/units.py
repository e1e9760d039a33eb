"""Amounts as people write them on a command line: 16GiB, 5%, 8s, 500ms.

Text to SI numbers only; each function raises ValueError with what it expected.
"""

from __future__ import annotations

import math
import re

from meshes.quantity import quantity

_SECONDS = {
    "": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*([0-9.eE+-]+)\s*([a-z]*)\s*")


def size_bytes(text: str) -> int:
    """`16GiB`, `15.5GiB`, `16e9` → bytes."""
    unit = text.strip().lstrip("0123456789.eE+-_ ")
    if unit and not unit.endswith("B"):
        raise ValueError(f"{text!r}: expected bytes, such as 16GiB or 16e9")
    amount = quantity(text)
    if amount < 1:
        raise ValueError(f"{text!r}: expected a positive number of bytes, such as 16GiB")
    return int(amount)


def count(text: str) -> float:
    """`300e9`, `300B`, `1.5T` → a number."""
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text.strip()[-1:], 1.0)
    digits = text.strip()[:-1] if factor != 1.0 else text.strip()
    try:
        value = float(digits) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{text!r}: expected a number such as 300e9, 300B or 1.5T")
    return value


def fraction(text: str) -> float:
    """`5%` or `0.05` → 0.05."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise ValueError(f"{text!r}: expected a fraction such as 5% or 0.05") from None
    value = value / 100 if percent else value
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{text!r}: expected a fraction of at least 0, such as 5%")
    return value


def seconds(text: str) -> float:
    """`8s`, `8`, `500ms`, `2min` → seconds."""
    match = _AMOUNT.fullmatch(text)
    unit = match.group(2) if match else ""
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if unit not in _SECONDS or not (math.isfinite(value) and value > 0):
        units = ", ".join(u for u in _SECONDS if u)
        raise ValueError(f"{text!r}: expected a time such as 8s or 500ms (units: {units})")
    return value * _SECONDS[unit]
