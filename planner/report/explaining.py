"""`plan explain`: what one tensor or op of a plan costs, and why the step takes so long.

Reads the lowered program of a result; nothing is searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from costmodels.pricing import instruction_seconds
from costmodels.program import Compute
from costmodels.summary import CollectiveRow, collectives
from planner.errors import InputError, nearest
from planner.graph.core import Op
from planner.graph.recompute import AGAIN
from planner.report import amounts
from planner.report.tables import table
from planner.request import Planned
from planner.result import Result

TOP = 15


def explain(planned: Planned, name: str | None) -> RenderableType:
    """The costliest ops and moves; with a name, all about that tensor or op."""
    result = planned.result
    if name is None:
        return Group(Text(result.mesh.describe()), _costliest(result), Text(), _moves(
            collectives(result.program, result.mesh)[:TOP]))  # fmt: skip
    tensors, ops = result.graph.all_tensors(), {op.name: op for op, _ in result.graph.walk()}
    name, layers = _in_loop(result, name)
    if name not in tensors and name not in ops:
        near = nearest(name, {**tensors, **ops})
        hint = f"did you mean {' or '.join(near)}?" if near else "`plan explain PLAN` lists ops"
        raise InputError(f"the plan has no tensor or op {name!r}", hint)
    return Group(*_about(result, name, ops), *layers)


def _in_loop(result: Result, name: str) -> tuple[str, list[Text]]:
    """The tensor that stands for it where layers are written out, and a word about that."""
    for stack, names in result.model.members.items():
        if name in names:
            return stack, [Text(f"{names[0]} … {names[-1]} are planned as one, called {stack}")]
    return name, []


def _about(result: Result, name: str, ops: dict[str, Op]) -> Iterator[RenderableType]:
    tensor, spec = result.graph.all_tensors().get(name), result.specs.get(name)
    yield Text(result.mesh.describe())
    if tensor is not None:
        shape = ", ".join(f"{d} {n}" for d, n in zip(tensor.dims, tensor.shape, strict=True))
        yield Text(f"{name}: {tensor.role}, {tensor.dtype} [{shape}], lies as {spec or 'nowhere'}")
        yield from _relations(name, ops.values())
    if name in ops:
        yield _op(result, ops[name])
    moves = [t for t in collectives(result.program, result.mesh) if _belongs(t.tensor, name)]
    if moves:
        yield Text()
        yield _moves(moves)
    else:
        yield Text("nothing of it is communicated")


def _belongs(tensor: str, name: str) -> bool:
    """The tensor itself, its recomputed twin, its cotangents and its cast copies."""
    return tensor == name or tensor == name + AGAIN or tensor.startswith(f"{name}.")


def _relations(name: str, ops: Iterable[Op]) -> Iterator[Text]:
    ops = list(ops)
    for title, found in (
        ("made by", [op for op in ops if name in op.outs]),
        ("read by", [op for op in ops if name in op.ins]),
    ):
        if found:
            yield Text(f"{title} {', '.join(f'{op.name} ({op.phase})' for op in found)}")


def _op(result: Result, op: Op) -> Text:
    choice = result.plan.choices[op.origin or op.name]
    seconds, times = _op_seconds(result).get(op.name, (0.0, 0))
    return Text(
        f"op {op.name} ({op.kind}, {op.phase}): split {choice.describe(op.rule)}; "
        f"{times} × {amounts.seconds(seconds)}"
    )


def _op_seconds(result: Result) -> dict[str, tuple[float, int]]:
    """(seconds of one execution, executions) of every local computation."""
    return {
        instruction.kernel.name: (instruction_seconds(result.mesh, instruction), times)
        for instruction, times in result.program.instructions()
        if isinstance(instruction, Compute)
    }


def _costliest(result: Result) -> Table:
    costs = sorted(_op_seconds(result).items(), key=lambda kv: (-kv[1][0] * kv[1][1], kv[0]))
    found = table("costliest ops", "times", "each", "total", right=("times", "each", "total"))
    for name, (seconds, times) in costs[:TOP]:
        found.add_row(
            Text(name), str(times), amounts.seconds(seconds), amounts.seconds(seconds * times)
        )
    return found


def _moves(moves: Iterable[CollectiveRow]) -> Table:
    found = table("collectives", "axes", "payload", "times", "each", "total", "tensor",
                  right=("payload", "times", "each", "total"))  # fmt: skip
    for t in moves:
        found.add_row(
            t.kind, "+".join(t.axes), amounts.size(t.bytes), str(t.count),
            amounts.seconds(t.seconds), amounts.seconds(t.total_s), Text(t.tensor),
        )  # fmt: skip
    return found
