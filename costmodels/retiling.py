"""What a TPU does after gathering narrow shards: it lays the array in tiles again.

Arrays lie in tiles of 8 × 128 numbers (see `tiling`). Shards whose width along the gathered
dimension is a multiple of 8 stand beside each other as they arrive; narrower ones leave every
tile partly empty, and XLA copies the whole array before a product reads it. A matrix that is
gathered along its last dimension is transposed on the way, which is slow: of GPT-3's 49152 × 12288
weights on 2048 cores of a v3, 6 columns on each, the copies took 12 of 55 seconds of a step.
Along other dimensions than the last, products mostly read what was gathered as it is. Scattering
copies nothing, and neither does what XLA carries out as a sum of slices among zeros: small gathers,
and those over all of a three-dimensional torus.

How often the array moves through memory is what libtpu 0.0.52 estimates on v2, v3 and v4, within a
fifth for most matrices (`benchmarks/tpu_gathers.py`); v5e and later need two to three times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodels.compute import stream_seconds
from costmodels.program import (
    Block,
    Buffer,
    Collective,
    Compute,
    Kernel,
    LoopStep,
    Program,
    Step,
)
from meshes import LogicalMesh

ROWS = 8  # of a tile: shards that fill them need no copy
TRANSPOSED, MOVED = 12.0, 3.0  # bytes moved per byte of a matrix, and of another array
DTYPE = "bf16"  # of what was measured; other types count as so many bytes of it
SMALL = 2**24  # bytes that are gathered by a sum


def moved_per_byte(rank: int, dim: int) -> float:
    """Bytes moved by the copy of an array of `rank` dimensions that was gathered along `dim`."""
    if rank < 2 or dim != rank - 1:
        return 0.0
    return TRANSPOSED if rank == 2 else MOVED


def is_copied(
    mesh: LogicalMesh, axes: Sequence[str], width: ArrayLike, size: ArrayLike
) -> Any:
    """Whether arrays of `size` bytes, gathered over `axes` in shards of this width, are copied."""
    if mesh.chip.family != "tpu" or summed_when_gathered(mesh, axes):
        return np.zeros(np.shape(size), dtype=bool)
    return (np.asarray(width) % ROWS != 0) & (np.asarray(size) > SMALL)


def summed_when_gathered(mesh: LogicalMesh, axes: Sequence[str]) -> bool:
    """Whether XLA gathers over these axes by adding up what is zero elsewhere, in place."""
    group = mesh.group(axes)
    return group.whole and len(group.of_kind("ring", "line")) == 3


def retiling_seconds(
    mesh: LogicalMesh, rank: int, dim: int, axes: Sequence[str], width: ArrayLike, size: ArrayLike
) -> Any:
    """Seconds of the copy that follows a gather along dimension `dim`; 0 if there is none."""
    copied = np.where(is_copied(mesh, axes, width, size), np.asarray(size, float), 0.0)
    return stream_seconds(mesh.chip, moved_per_byte(rank, dim) * copied, dtype=DTYPE)


def retile_gathered(program: Program, mesh: LogicalMesh) -> Program:
    """The program of a TPU with these copies, each beside what was gathered."""
    copying = _Copying(program, mesh)
    block = copying.block(program.block)
    return replace(program, block=block, buffers=copying.buffers)


class _Copying:
    def __init__(self, program: Program, mesh: LogicalMesh) -> None:
        self.buffers = dict(program.buffers)
        self.mesh = mesh
        self.fresh = max(self.buffers, default=0)

    def block(self, block: Block) -> Block:
        return tuple(
            replace(step, enter=self.step(step.enter), body=self.block(step.body))
            if isinstance(step, LoopStep) else self.step(step)
            for step in block
        )  # fmt: skip

    def step(self, step: Step) -> Step:
        found: list[Compute | Collective] = []
        for i in step.instructions:
            found += self.with_copy(i) if isinstance(i, Collective) and self.copied(i) else (i,)
        return replace(step, instructions=tuple(found))

    def copied(self, i: Collective) -> bool:
        if i.kind != "all-gather":
            return False
        shape = self.buffers[i.source].shape
        moved = moved_per_byte(len(shape), i.dim)
        return moved > 0 and bool(is_copied(self.mesh, i.axes, shape[i.dim], i.bytes))

    def with_copy(self, i: Collective) -> Sequence[Compute | Collective]:
        self.fresh += 1
        whole = self.buffers[i.result]
        gathered = Buffer(
            self.fresh, whole.shape, whole.dtype, "collective_buffers", f"{whole.tensor}.gathered"
        )
        self.buffers[self.fresh] = gathered
        moved = moved_per_byte(len(whole.shape), i.dim) * i.bytes
        kernel = Kernel(f"{i.tensor}.retile", "retile", DTYPE, moved, 0.0)
        copy = Compute(kernel, (self.fresh,), (i.result,), i.phase)
        return replace(i, result=self.fresh), copy
