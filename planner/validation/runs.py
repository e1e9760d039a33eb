"""A run that somebody made and measured: what was run, and what came out.

Only data. Where runs come from is in `suitefile` and `vtrain`, what is predicted for them in
`predict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.validation.layouts import Layout

PUBLISHED: Literal["published"] = "published"
PLANNED = "planned"  # how files call the layout that the planner chooses


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
    """`model`: the content of a model file, its mesh with shape included; of a model of the zoo
    only its name. `layout`: None for one that the planner chooses, PUBLISHED for the annotation
    that the zoo has of its source. `group`: runs that
    differ only in how they are parallelised, among which a planner chooses.
    `overlap`: collectives that the software of the run carried out beside computing, if not those
    that the catalogue says of the chip. `combined_sums`: gradients were summed over the devices in
    one collective, at the end, and lay whole until then.
    `network_bytes_per_s`: of one device between nodes, if not as in the catalogue."""

    id: str
    name: str
    source: str
    model: Mapping[str, Any] | str
    layout: Layout | Literal["published"] | None
    measured: Measured
    eager: bool = False
    group: str = ""
    network_bytes_per_s: float | None = None
    overlap: frozenset[str] | None = None
    combined_sums: bool = False
    notes: str = ""


@dataclass(frozen=True)
class Suite:
    """Runs with a name; `sources` by the short names that the file uses."""

    name: str
    runs: tuple[Run, ...]
    summary: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
