"""What a Program executes: collectives, equal ones added up; what of its products is guesswork."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from costmodels.compute import efficiency
from costmodels.pipeline import PipelineProgram
from costmodels.pricing import prices
from costmodels.program import MOVES, Collective, Compute, Program
from meshes import LogicalMesh


@dataclass(frozen=True)
class CollectiveRow:
    """`count` executions per device and step of one collective: `bytes` of full payload on a
    device (see program.Collective), `seconds` of one execution on an idle network."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    seconds: float
    count: int
    tensor: str

    @property
    def total_s(self) -> float:
        return self.seconds * self.count

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.count


def collectives(program: Program | PipelineProgram, mesh: LogicalMesh) -> list[CollectiveRow]:
    """Rows that differ in kind, axes, bytes or tensor; trip counts of loops are multiplied in."""
    table = prices(mesh)
    counts: dict[tuple[str, tuple[str, ...], int, float, str], int] = {}
    for i, times in program.instructions():
        if isinstance(i, Collective) and i.kind in MOVES:
            key = (i.kind, i.axes, i.bytes, table.seconds(i), i.tensor)
            counts[key] = counts.get(key, 0) + times
    rows = [
        CollectiveRow(kind, axes, size, seconds, count, tensor)
        for (kind, axes, size, seconds, tensor), count in counts.items()
    ]
    return sorted(rows, key=lambda r: (-r.total_s, r.tensor, r.kind, r.axes, r.bytes))


def totals(rows: Iterable[CollectiveRow]) -> dict[str, tuple[int, float]]:
    """Per kind: bytes and seconds of all executions of a step."""
    found: dict[str, tuple[int, float]] = {}
    for row in rows:
        size, seconds = found.get(row.kind, (0, 0.0))
        found[row.kind] = (size + row.total_bytes, seconds + row.total_s)
    return dict(sorted(found.items()))


def beyond_fit(program: Program | PipelineProgram, mesh: LogicalMesh) -> float:
    """The share of all computing time that is in products with a side smaller or larger than
    those that the chip's efficiencies were fitted to; 0 where nobody says which these were."""
    table, sizes = prices(mesh), efficiency(mesh.chip.efficiency).sizes
    if sizes is None:
        return 0.0
    every = outside = 0.0
    for i, times in program.instructions():
        if isinstance(i, Compute):
            seconds = times * table.seconds(i)
            every += seconds
            sides = i.kernel.matmul[1:] if i.kernel.matmul else sizes
            outside += seconds if min(sides) < sizes[0] or max(sides) > sizes[1] else 0
    return outside / every if every else 0.0
