"""Which collectives a step executes: equal ones added up, the costliest first.

Reads a Program; prices through the cost model's front door.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodels.pricing import instruction_seconds
from costmodels.program import MOVES, Collective, Program
from meshes import LogicalMesh


@dataclass(frozen=True)
class Traffic:
    """`count` executions per device and step of one collective: `bytes` of payload on a device,
    `seconds` on an idle network."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    seconds: float
    count: int
    tensor: str

    @property
    def total_s(self) -> float:
        return self.seconds * self.count


def traffic(program: Program, mesh: LogicalMesh) -> list[Traffic]:
    counts: dict[tuple[str, tuple[str, ...], int, str], int] = {}
    seconds: dict[tuple[str, tuple[str, ...], int, str], float] = {}
    for instruction, times in program.instructions():
        if not isinstance(instruction, Collective) or instruction.kind not in MOVES:
            continue
        key = (instruction.kind, instruction.axes, instruction.bytes, instruction.tensor)
        counts[key] = counts.get(key, 0) + times
        seconds[key] = instruction_seconds(mesh, instruction)
    found = [
        Traffic(kind, axes, size, seconds[kind, axes, size, tensor], n, tensor)
        for (kind, axes, size, tensor), n in counts.items()
    ]
    return sorted(found, key=lambda t: (-t.total_s, t.tensor, t.kind, t.axes, t.bytes))
