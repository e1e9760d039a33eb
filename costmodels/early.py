"""Sums over the parts of a batch where their summands are made, not at the end of a part.

On GPUs the exported program makes the gradients of a product outside loops together and reduces
them at once (see planner.export.placement). Left to the end, the unembedding of Llama 3 70B keeps
2 GiB of unreduced gradients while all layers go backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from costmodels.program import LoopStep, Program, Step


def sums_at_once(program: Program) -> Program:
    """The same program; in loops around other loops, what only makes the next value of a carried
    one stands right behind what it reads."""
    block = (_reordered(s) if isinstance(s, LoopStep) else s for s in program.block)
    return replace(program, block=tuple(block))


def _reordered(loop: LoopStep) -> LoopStep:
    if not any(isinstance(s, LoopStep) for s in loop.body):
        return loop
    exits = {k.exit for k in loop.carries}
    readers = Counter(b for step in loop.body for b in set(_read(step)))
    placed: list[Step | LoopStep] = []
    sums: list[Step] = []
    for step in loop.body:
        if isinstance(step, Step) and _only_sums(step, exits, readers):
            sums.append(step)
        else:
            placed.append(step)
    for step in sums:
        wanted = set(_read(step))
        made = [i for i, s in enumerate(placed) if not wanted.isdisjoint(_made(s))]
        placed.insert(max(made, default=len(placed) - 1) + 1, step)
    return replace(loop, body=tuple(placed))


def _only_sums(step: Step, exits: set[int], readers: Counter[int]) -> bool:
    """Whether a step makes next values of carried ones, and nothing that another step reads."""
    own, made = set(_read(step)), set(_made(step))
    alone = all(readers[b] == (b in own) for b in made)
    return alone and not made.isdisjoint(exits)


def _read(step: Step | LoopStep) -> Iterable[int]:
    if isinstance(step, Step):
        return [b for i in step.instructions for b in i.ins]
    inside: Sequence[Step | LoopStep] = (step.enter, *step.body)
    return [
        *(k.init for k in step.carries), *(s.outer for s in step.reads),
        *(b for s in inside for b in _read(s)),
    ]  # fmt: skip


def _made(step: Step | LoopStep) -> Iterable[int]:
    if isinstance(step, Step):
        return [b for i in step.instructions for b in i.outs]
    return [
        *_made(step.enter), *(k.result for k in step.carries), *(s.outer for s in step.writes),
    ]  # fmt: skip
