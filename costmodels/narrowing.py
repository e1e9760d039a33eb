"""What a TPU's compiler moves out of a pipeline stage's loops: the narrowing of stacked parameters.

A body that begins with casting its slice of a stack from f32 to bf16 becomes, in XLA's TPU
compiler, one cast of the whole stack before the loop and a body that slices the result. The work
is the same; the narrow stack takes memory from the first loop that reads it to the end of the
last. Seen with libtpu 0.0.52 on v3 and v4 (LaMDA 137B: 128 MiB of 1.21 GiB); the GPU's compiler
narrows slice by slice. A step that is one program has these casts in its graph
(planner.graph.ahead); the halves of a stage are compiled apart, and each makes its own.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from costmodels.program import ITEM_BYTES, Block, Buffer, Compute, LoopStep, Program, Step


def narrow_stacks(program: Program) -> Program:
    """The program with the narrow stacks beside its loops."""
    narrowing = _Narrowing(program)
    block = narrowing.block(program.block)
    return replace(program, block=block, buffers=narrowing.buffers)


class _Narrowing:
    def __init__(self, program: Program) -> None:
        self.buffers = dict(program.buffers)
        self.narrow: dict[tuple[int, str], int] = {}  # (stack, type) → its narrow copy

    def block(self, block: Block) -> Block:
        return tuple(self.loop(step) if isinstance(step, LoopStep) else step for step in block)

    def loop(self, loop: LoopStep) -> LoopStep:
        stacks = {s.inner: s.outer for s in loop.reads}
        found = []
        for step in loop.body:
            if isinstance(step, Step):
                casts = (i for i in step.instructions if isinstance(i, Compute))
                found += [self.copy(stacks[c.ins[0]], c) for c in casts if self.narrows(c, stacks)]
        return replace(loop, body=self.block(loop.body), narrowed=tuple(dict.fromkeys(found)))

    def narrows(self, step: Compute, stacks: dict[int, int]) -> bool:
        """Whether a step only casts a slice of a parameter's stack to a narrower type."""
        if len(step.ins) != 1 or len(step.outs) != 1 or step.ins[0] not in stacks:
            return False
        slice_, made = self.buffers[step.ins[0]], self.buffers[step.outs[0]]
        return (
            self.buffers[stacks[slice_.id]].category == "parameters"
            and prod(made.shape) == prod(slice_.shape)
            and ITEM_BYTES[made.dtype] < ITEM_BYTES[slice_.dtype]
        )

    def copy(self, stack: int, cast: Compute) -> int:
        """The narrow copy of a stack; all loops share it."""
        dtype = self.buffers[cast.outs[0]].dtype
        key = (stack, dtype)
        if key not in self.narrow:
            number = self.narrow[key] = max(self.buffers) + 1
            whole = self.buffers[stack]
            name = f"{whole.tensor}.{dtype}"
            self.buffers[number] = Buffer(number, whole.shape, dtype, "temporaries", name)
        return self.narrow[key]
