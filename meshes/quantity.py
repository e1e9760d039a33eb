"""Numbers as people write them in mesh files: `900e9`, `16GiB`, `70GB/s`, `1us`."""

from __future__ import annotations

import re

_UNITS = {
    "": 1.0,
    "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
    "Gb": 1e9 / 8, "Tb": 1e12 / 8,
    "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9,
    "Hz": 1.0, "MHz": 1e6, "GHz": 1e9,
    "GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOPS": 1e15,
}  # fmt: skip

_PATTERN = re.compile(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ]*)(?:/s)?")


def quantity(value: object) -> float:
    """Value in SI units (bytes, seconds, FLOP/s, Hz); ValueError if it is no finite number >= 0."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r}")
    number = float(value) if isinstance(value, int | float) else _parse(str(value).strip())
    if not 0 <= number < float("inf"):
        raise ValueError(f"expected a number that is not negative, got {value!r}")
    return number


def _parse(text: str) -> float:
    match = _PATTERN.fullmatch(text)
    if not match or match[2] not in _UNITS:
        units = ", ".join(u for u in _UNITS if u)
        raise ValueError(f"expected a number such as 16GiB or 900e9, got {text!r} (units: {units})")
    return float(match[1].replace("_", "")) * _UNITS[match[2]]
