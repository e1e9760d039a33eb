"""From the lowered step of a piece to a stage program: what crosses is taken out of the loop.

The step of a piece reads what it receives, and writes what it sends, as stacks over microbatches.
No device ever holds these stacks: microbatches come and go one at a time, as buffers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from costmodels.pipeline import StageProgram
from costmodels.program import LoopStep, Program, StackBuffers
from costmodels.schedule import BACKWARD, FORWARD
from planner.graph.core import Graph, Loop
from planner.graph.derive import (
    ACCUMULATE,
    all_parts,
    given_gradient,
    received_cotangent,
    sent_parts,
)
from planner.pipelining.pieces import Piece


def stage_program(program: Program, step: Graph, piece: Piece) -> StageProgram:
    """`program` is the lowered `step` of `piece`."""
    at = next(i for i, s in enumerate(program.block) if s.name == ACCUMULATE)
    loop = program.block[at]
    own = microbatch_loop(step)
    if not isinstance(loop, LoopStep):
        raise ValueError("the step of a piece has a loop over microbatches")
    received, sent = received_stacks(piece), sent_stacks(step, piece)
    outer = {program.buffers[s.outer].tensor: s for s in (*loop.reads, *loop.writes)}
    crossing = {name for names in (*received.values(), *sent.values()) for name in names.values()}
    block = list(program.block)
    block[at] = replace(
        loop, reads=_without(loop.reads, crossing, program),
        writes=_without(loop.writes, crossing, program),
    )  # fmt: skip
    arriving = {outer[n].inner for names in received.values() for n in names.values()}
    buffers = {
        b: replace(buffer, alias=None, category="activations") if b in arriving else buffer
        for b, buffer in program.buffers.items()
    }
    given, taken = _exchanged(program, step, piece)
    plain = Program(
        program.axes, buffers, tuple(block),
        {n: b for n, b in program.inputs.items() if n not in crossing and b not in taken.values()},
        {n: b for n, b in program.outputs.items() if b not in given.values()},
    )  # fmt: skip
    return StageProgram(
        plain, at, _forward_parts(own),
        {phase: _inner(names, outer) for phase, names in received.items()},
        {phase: _inner(names, outer) for phase, names in sent.items()},
        given, taken,
    )  # fmt: skip


def microbatch_loop(step: Graph) -> Loop:
    """The loop over microbatches of a piece's step."""
    found = next(n for n in step.nodes if n.name == ACCUMULATE)
    if not isinstance(found, Loop):
        raise ValueError("the step of a piece has a loop over microbatches")
    return found


def received_stacks(piece: Piece) -> dict[str, dict[str, str]]:
    """The stacks of what each half receives, by key."""
    behind = {
        key: all_parts(received_cotangent(local))
        for key, local in piece.sent.items()
        if local in piece.boundary.differentiable
    }
    return {
        FORWARD: {key: all_parts(local) for key, local in piece.received.items()},
        BACKWARD: behind,
    }


def sent_stacks(step: Graph, piece: Piece) -> dict[str, dict[str, str]]:
    """The stacks of what is sent after each half, by key."""
    writes = [w.outer for w in microbatch_loop(step).writes]
    ahead = {key: sent_parts(local) for key, local in piece.sent.items()}
    back = [key for key, local in piece.received.items() if local in piece.boundary.differentiable]
    behind = dict(zip(back, writes[len(ahead) :], strict=True))
    return {FORWARD: ahead, BACKWARD: behind}


def _forward_parts(loop: Loop) -> int:
    """Program parts of the forward half; a lowered loop is two of them."""
    parts = 0
    for node in loop.body.nodes:
        if node.phase != "forward":
            break
        parts += 2 if isinstance(node, Loop) else 1
    return parts


def _without(
    stacks: tuple[StackBuffers, ...], crossing: set[str], program: Program
) -> tuple[StackBuffers, ...]:
    return tuple(s for s in stacks if program.buffers[s.outer].tensor not in crossing)


def _inner(names: Mapping[str, str], outer: Mapping[str, StackBuffers]) -> dict[str, int]:
    return {key: outer[name].inner for key, name in names.items()}


def _exchanged(
    program: Program, step: Graph, piece: Piece
) -> tuple[dict[str, int], dict[tuple[str, int], int]]:
    """Gradients of shared parameters: the outputs given to other stages, the inputs taken."""
    shared = piece.boundary.shared
    first = 1 if piece.boundary.loss else 0
    outputs = step.outputs[first : first + len(shared)]
    given = {p: program.outputs[name] for p, name in zip(shared, outputs, strict=True)}
    taken = {
        (p, giver): program.inputs[given_gradient(p, giver)]
        for p, givers in shared.items()
        for giver in givers
    }
    return given, taken
