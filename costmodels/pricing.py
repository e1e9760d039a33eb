"""Seconds of one instruction on an idle device or network: the cost model's front door.

The optimiser and the simulator both price through here, so they agree on every piece.
"""

from __future__ import annotations

from costmodels.collectives import collective_seconds
from costmodels.compute import matmul_seconds, stream_seconds
from costmodels.program import MOVES, Collective, Compute, Instruction, Kernel
from meshes import Chip, LogicalMesh


def kernel_seconds(chip: Chip, kernel: Kernel) -> float:
    """Time of one local computation: a matmul, or a memory-bound pass over its arrays."""
    if kernel.matmul is not None:
        batch, m, n, k = kernel.matmul
        return float(matmul_seconds(chip, batch, m, n, k, kernel.dtype))
    if kernel.bytes == 0:
        return 0.0
    return float(stream_seconds(chip, kernel.bytes, kernel.vector_flops))


def move_seconds(mesh: LogicalMesh, kind: str, axes: tuple[str, ...], payload_bytes: float) -> float:
    """Time of one collective of `payload_bytes` (see Collective) over `axes`."""
    if kind not in MOVES:
        return 0.0  # local slices and masks fuse into their readers
    return float(collective_seconds(mesh, kind, axes, payload_bytes))


def instruction_seconds(mesh: LogicalMesh, instruction: Instruction) -> float:
    if isinstance(instruction, Compute):
        return kernel_seconds(mesh.chip, instruction.kernel)
    return move_seconds(mesh, instruction.kind, instruction.axes, instruction.bytes)


def is_network(instruction: Instruction) -> bool:
    return isinstance(instruction, Collective) and instruction.kind in MOVES
