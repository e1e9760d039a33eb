"""JSON as files hold it: stable order, one tensor or op per line, easy to diff.

Formatting and reading back with checked types; what is in a document is up to its module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from planner.errors import InputError

Document = TypeVar("Document", bound=BaseModel)
_WIDTH = 100


def pretty(value: Any) -> str:
    """Objects that fit a line stay on one; others get one member per line."""
    return _pretty(value, "") + "\n"


def _pretty(value: Any, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or len(indent) + len(flat) <= _WIDTH or not value:
        return flat
    deeper = indent + " "
    if isinstance(value, Mapping):
        members = [f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, deeper)}"
                   for k, v in value.items()]  # fmt: skip
        opening, closing = "{", "}"
    else:
        members = [_pretty(v, deeper) for v in value]
        opening, closing = "[", "]"
    inner = f",\n{deeper}".join(members)
    return f"{opening}\n{deeper}{inner}\n{indent}{closing}"


def finite(number: float) -> float | None:
    """JSON has no infinity: what is not known is null."""
    return number if abs(number) < float("inf") else None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None


def read_json(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{file}: nested too deeply") from None


def checked(kind: type[Document], value: Any, file: str) -> Document:
    """`value` as a document of the given kind; InputError says where it differs."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {where or 'document'}: {first['msg']}") from None
