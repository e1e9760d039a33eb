"""What a backend's compiler makes of a lowered program: the order of the passes that say so.

Only the order belongs here; each pass, and where it was seen, is a module of its own.
"""

from __future__ import annotations

from costmodels.early import sums_at_once
from costmodels.gathered import copy_gathered
from costmodels.narrowing import narrow_stacks
from costmodels.program import Program
from costmodels.retiling import retile_gathered
from costmodels.tiling import tile_arguments, tile_convolutions
from meshes import LogicalMesh


def as_compiled(program: Program, mesh: LogicalMesh) -> Program:
    """The program as the compiler for the mesh's chips leaves it."""
    if mesh.chip.family == "tpu":
        copied = retile_gathered(copy_gathered(program, mesh), mesh)
        return tile_arguments(tile_convolutions(copied))
    if mesh.chip.family == "gpu":
        return sums_at_once(program)
    return program


def in_parts_as_compiled(program: Program, mesh: LogicalMesh) -> Program:
    """A pipeline's stage, whose two halves and update are compiled apart. New parameters are
    gathered in the update alone, where hardly anything else lives: no copy of them lasts. What
    convolutions make does not pass from one program to another."""
    if mesh.chip.family == "tpu":
        return tile_arguments(retile_gathered(narrow_stacks(program), mesh))
    return program
