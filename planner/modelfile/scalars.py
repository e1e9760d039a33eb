"""What the scalars of a model file mean: YAML 1.2 core, plus numbers with units.

Unlike YAML 1.1, `1e9` is a number and `no` is text; `512k` is 512000, `16GiB` counts bytes.
"""

from __future__ import annotations

import math
import re
from typing import Any

from meshes.yamltree import Listing, Node, Scalar

UNITS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_NUMBER = re.compile(r"([-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?) ?([A-Za-z]*)")
_OTHER_BASE = re.compile("0x[0-9a-fA-F]{1,16}|0o[0-7]{1,21}")
_NOTHING = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "True", "TRUE")
_FALSE = ("false", "False", "FALSE")
_EXACT = 2**53  # whole numbers up to here are exact as floats


def value_of(scalar: Scalar) -> str | int | float | bool | None:
    """Text, number, truth value or nothing; quotes make it text."""
    text = scalar.value
    if not scalar.plain:
        return text
    if text in _NOTHING:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    number = number_of(text)
    return text if number is None else number


def number_of(text: str) -> int | float | None:
    """The finite number that `text` spells (whole ones as int), or None."""
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    match = _NUMBER.fullmatch(text)
    if not match or match[2] not in UNITS:
        return None
    value = float(match[1].replace("_", "")) * UNITS[match[2]]
    if not math.isfinite(value):
        return None
    digits = match[1].replace("_", "").lstrip("+")
    if abs(value) > _EXACT and digits.lstrip("-").isdigit():
        return int(digits) * UNITS[match[2]]
    return int(value) if value.is_integer() else value


def plain_data(node: Node) -> Any:
    """The tree as dicts, lists and scalars, without places."""
    if isinstance(node, Scalar):
        return value_of(node)
    if isinstance(node, Listing):
        return [plain_data(item) for item in node.items]
    return {key.value: plain_data(value) for key, value in node.entries}
