"""A run that somebody made and measured: what was run, and what came out.

Only data. Where runs come from is in `suitefile` and `vtrain`, what is predicted for them in
`predict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.validation.layouts import Layout


@dataclass(frozen=True)
class Measured:
    """Figures of a run; None where it has none. Utilizations are fractions.

    `out_of_memory`: the run did not fit. `peak_bytes`: of one device.
    """

    step_time_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    peak_bytes: float | None = None
    out_of_memory: bool = False


@dataclass(frozen=True)
class Run:
    """`model`: the content of a model file, its mesh with shape included. `group`: runs that
    differ only in how they are parallelised, among which a planner chooses.
    `network_bytes_per_s`: of one device between nodes, if not as in the catalogue."""

    id: str
    name: str
    source: str
    model: Mapping[str, Any]
    layout: Layout
    measured: Measured
    eager: bool = False
    group: str = ""
    network_bytes_per_s: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class Suite:
    """Runs with a name. `what`: the figure that errors are of, step_time, mfu or hfu."""

    name: str
    runs: tuple[Run, ...]
    summary: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
