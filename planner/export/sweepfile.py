"""The rows of a sweep in a file, from which it is resumed: read and written, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from planner.errors import InputError
from planner.export import files
from planner.export.jsontext import checked, finite, pretty, read_json, read_text
from planner.export.stamp import signature
from planner.sweeping import Row

FORMAT = "shardplan-sweep"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mesh: str
    chip: str
    devices: int
    outcome: str
    shape: dict[str, int] | None
    step_time_s: float | None
    tokens_per_s: float
    mfu: float
    peak_bytes: int | None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal["shardplan-sweep"]
    schema_version: Literal[1]
    generator: str
    rows: dict[str, _Row]


def load(path: Path) -> dict[str, Row]:
    """Rows by key; none where there is no file yet."""
    if not path.exists():
        return {}
    value = read_json(read_text(path), str(path))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} holds no sweep", "name another file for --resume")
    document = checked(_Document, value, str(path))
    return {
        key: Row(**{**row.model_dump(), "step_time_s": _infinite(row.step_time_s)})
        for key, row in document.rows.items()
    }


def save(path: Path, rows: Mapping[str, Row]) -> None:
    """Replaces the file whole, so that it is complete at any time."""
    document = {
        "format": FORMAT, "schema_version": 1, "generator": signature(),
        "rows": {key: as_dict(row) for key, row in sorted(rows.items())},
    }  # fmt: skip
    files.write_file(path, pretty(document))


def keeper(path: Path, known: Mapping[str, Row]) -> Callable[[str, Row], None]:
    """What adds one row to those in the file."""
    rows = dict(known)

    def keep(key: str, row: Row) -> None:
        rows[key] = row
        save(path, rows)

    return keep


def as_dict(row: Row) -> dict[str, Any]:
    return {
        "mesh": row.mesh, "chip": row.chip, "devices": row.devices, "outcome": row.outcome,
        "shape": None if row.shape is None else dict(row.shape),
        "step_time_s": finite(row.step_time_s), "tokens_per_s": row.tokens_per_s,
        "mfu": row.mfu, "peak_bytes": row.peak_bytes,
    }  # fmt: skip


def _infinite(number: float | None) -> float:
    return float("inf") if number is None else number
