"""What a TPU's compiler keeps twice: parameters whose new values are gathered.

Where each device updates a part of a parameter and the parts are then gathered, XLA's TPU compiler
does not gather into the donated buffer: it copies the old parameter when the step begins, reads
the copy until the update, and gathers beside it. Seen with libtpu 0.0.52 on v3 and v5e for every
parameter that lies on more devices than its optimizer states, stacked or not; those that are
updated where they lie are written in place. So are those that are gathered by a sum (on v4, over
all of a torus).
"""

from __future__ import annotations

from dataclasses import replace

from costmodels.program import Buffer, Collective, Program
from costmodels.retiling import summed_when_gathered
from meshes import LogicalMesh


def copy_gathered(program: Program, mesh: LogicalMesh) -> Program:
    """The program with the copies of such parameters."""
    buffers = dict(program.buffers)
    inputs = set(program.inputs.values())
    copies = []
    for i, _ in program.instructions():
        if not isinstance(i, Collective) or i.kind != "all-gather":
            continue
        if summed_when_gathered(mesh, i.axes):
            continue
        old = program.buffers[i.result].alias
        if old in inputs and program.buffers[old].category == "parameters":
            whole, number = program.buffers[old], max(buffers) + 1
            name = f"{whole.tensor}.copy"
            buffers[number] = Buffer(number, whole.shape, whole.dtype, "temporaries", name)
            copies.append(number)
    return replace(program, buffers=buffers, copies=tuple(copies))
