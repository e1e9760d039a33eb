"""Seconds of one instruction on an idle device or network: the cost model's front door.

The optimiser and the simulator both price through here, so they agree on every piece. Equal
kernels and equal moves are priced once per mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from costmodels.collectives import collective_seconds
from costmodels.compute import matmul_seconds, stream_seconds
from costmodels.program import MOVES, Collective, Compute, Instruction, Kernel
from meshes import Chip, LogicalMesh

_Matmul = tuple[int, int, int, int]


def kernel_seconds(chip: Chip, kernel: Kernel) -> float:
    """Time of one local computation: a matmul, or a memory-bound pass over its arrays."""
    if kernel.matmul is not None:
        batch, m, n, k = kernel.matmul
        work, read = kernel.vector_flops, kernel.fused_bytes
        return float(
            matmul_seconds(chip, batch, m, n, k, kernel.dtype, vector_flops=work, more_bytes=read)
        )
    if kernel.bytes == 0:
        return 0.0
    return float(stream_seconds(chip, kernel.bytes, kernel.vector_flops, kernel.dtype))


def many_kernel_seconds(chip: Chip, kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    """`kernel_seconds` of each, priced together: what a search over many choices calls."""
    seconds = np.zeros(len(kernels))
    alike: dict[tuple[bool, str], list[int]] = {}
    for i, kernel in enumerate(kernels):
        if kernel.matmul is not None or kernel.bytes:
            alike.setdefault((kernel.matmul is not None, kernel.dtype), []).append(i)
    for (product, dtype), rows in alike.items():
        if product:
            batch, m, n, k = np.array([kernels[i].matmul for i in rows], dtype=float).T
            read = np.array([kernels[i].fused_bytes for i in rows])
            work = np.array([kernels[i].vector_flops for i in rows])
            seconds[rows] = matmul_seconds(
                chip, batch, m, n, k, dtype, vector_flops=work, more_bytes=read
            )
            continue
        moved = np.array([kernels[i].bytes for i in rows])
        work = np.array([kernels[i].vector_flops for i in rows])
        seconds[rows] = stream_seconds(chip, moved, work, dtype)
    return seconds


def move_seconds(
    mesh: LogicalMesh, kind: str, axes: tuple[str, ...], payload_bytes: float
) -> float:
    """Time of one collective of `payload_bytes` (see Collective) over `axes`."""
    if kind not in (*MOVES, "shift"):
        return 0.0  # local slices and masks fuse into their readers
    return float(collective_seconds(mesh, kind, axes, payload_bytes))


def instruction_seconds(mesh: LogicalMesh, instruction: Instruction) -> float:
    """Time of one execution of `instruction`; remembered per mesh."""
    return prices(mesh).seconds(instruction)


def is_network(instruction: Instruction) -> bool:
    return isinstance(instruction, Collective) and instruction.kind in MOVES


@dataclass
class Prices:
    """What has been priced on one mesh so far, by all that a price depends on."""

    mesh: LogicalMesh
    _kernels: dict[tuple[_Matmul | None, str, float, float, float], float] = field(
        default_factory=dict
    )
    _moves: dict[tuple[str, tuple[str, ...], int], float] = field(default_factory=dict)

    def seconds(self, instruction: Instruction) -> float:
        if isinstance(instruction, Compute):
            return self.kernel(instruction.kernel)
        return self.move(instruction.pattern, instruction.axes, instruction.bytes)

    def move(self, kind: str, axes: tuple[str, ...], payload_bytes: int) -> float:
        key = (kind, axes, payload_bytes)
        found = self._moves.get(key)
        if found is None:
            found = self._moves[key] = move_seconds(self.mesh, *key)
        return found

    def kernel(self, kernel: Kernel) -> float:
        work = kernel.vector_flops, kernel.fused_bytes
        key = (kernel.matmul, kernel.dtype, kernel.bytes, *work)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = kernel_seconds(self.mesh.chip, kernel)
        return found


@lru_cache(maxsize=64)  # meshes of one search; each table holds a few thousand numbers
def prices(mesh: LogicalMesh) -> Prices:
    """The price table of a mesh; equal meshes share one."""
    return Prices(mesh)
