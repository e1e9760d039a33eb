"""What a TPU's compiler keeps twice: parameters whose new values are gathered.

Where each device updates a part of a parameter and the parts are then gathered, XLA's TPU compiler
does not gather into the donated buffer: it copies the old parameter when the step begins, reads
the copy until the update, and gathers beside it. Seen with libtpu 0.0.52 on v3 and v5e for every
parameter that lies on more devices than its optimizer states, stacked or not; those that are
updated where they lie are written in place.
"""

from __future__ import annotations

from dataclasses import replace

from costmodels.program import Buffer, Collective, Program


def copy_gathered(program: Program) -> Program:
    """The program with the copies of such parameters."""
    buffers = dict(program.buffers)
    inputs = set(program.inputs.values())
    copies = []
    for i, _ in program.instructions():
        if not isinstance(i, Collective) or i.kind != "all-gather":
            continue
        old = program.buffers[i.result].alias
        if old in inputs and program.buffers[old].category == "parameters":
            whole, number = program.buffers[old], max(buffers) + 1
            name = f"{whole.tensor}.copy"
            buffers[number] = Buffer(number, whole.shape, whole.dtype, "temporaries", name)
            copies.append(number)
    return replace(program, buffers=buffers, copies=tuple(copies))
