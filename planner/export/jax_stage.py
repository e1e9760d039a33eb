"""A pipeline stage's training step as a JAX program for the devices of that stage alone.

It is the program of an accumulated step (`jax_program.py`), but what other stages send is an input,
that of one microbatch, and what is sent to them a result. No compiler sees the pipeline in it:
such programs are compiled to be compared, and exported to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from costmodels.schedule import BACKWARD, FORWARD
from planner.export.jax_ops import ExportError
from planner.export.jax_sources import filled
from planner.graph.core import Graph, Tensor
from planner.graph.derive import Boundary, given_gradient, received_cotangent, sent_parts
from planner.graph.saving import saved_in
from planner.model import Model
from planner.pipelining.pieces import cut
from planner.pipelining.stages import received_stacks, sent_stacks
from planner.result import PlannedStage
from planner.sharding.spec import Spec

ZEROS = "microbatch"  # an input that no model has


@dataclass(frozen=True)
class Sides:
    """What a stage has in common with others. `inputs` and `results`: tensors and where they lie,
    of one microbatch if they cross for each. `returned`: received tensor → the result that is its
    cotangent. `shared`: parameter → the result that is its gradient here. `saved`: by the bodies of
    its loops for the backward pass."""

    boundary: Boundary
    inputs: Mapping[str, tuple[Tensor, Spec]]
    results: Mapping[str, tuple[Tensor, Spec]]
    returned: Mapping[str, str]
    shared: Mapping[str, str]
    saved: frozenset[str]

    @classmethod
    def of(cls, stage: PlannedStage) -> Sides:
        piece, step, edge = stage.piece, stage.step, stage.piece.boundary

        def one(stack: str, name: str) -> tuple[Tensor, Spec]:
            t, spec = step.tensors[stack], stage.specs[stack]
            shape, dims = t.shape[1:], t.dims[1:]
            lies = Spec(spec.dims[len(spec.dims) - len(shape) :])
            return Tensor(name, shape, t.dtype, dims, t.role), lies

        received, sent = received_stacks(piece), sent_stacks(step, piece)
        inputs = {piece.received[k]: s for k, s in received[FORWARD].items()}
        inputs |= {received_cotangent(piece.sent[k]): s for k, s in received[BACKWARD].items()}
        returned = {piece.received[k]: s for k, s in sent[BACKWARD].items()}
        crossing = [*sent[FORWARD].values(), *returned.values()]
        first = 1 if edge.loss else 0
        sums = zip(edge.shared, step.outputs[first : first + len(edge.shared)], strict=True)
        given = {f"{p}.given": (step.tensors[s], stage.specs[s]) for p, s in sums}
        taken = [given_gradient(p, giver) for p, givers in edge.shared.items() for giver in givers]
        results = {s: one(s, s) for s in crossing} | given
        if edge.loss:
            results[piece.graph.outputs[0]] = step.tensors[step.outputs[0]], Spec(())
        return cls(
            edge,
            {name: one(s, name) for name, s in inputs.items()}
            | {name: (step.tensors[name], stage.specs[name]) for name in taken},
            results, returned, dict(zip(edge.shared, given, strict=True)), saved_in(step),
        )  # fmt: skip


def stage_model(model: Model, starts: tuple[int, ...], number: int, stage: PlannedStage) -> Model:
    """Stage `number` as a model: its piece as it is written, whose step adds up microbatches.

    The plan's piece has elementwise ops fused; raises ExportError if something else crosses then.
    """
    piece, planned = cut(model.graph, starts)[number], stage.piece
    if (piece.received.keys(), piece.sent.keys()) != (planned.received.keys(), planned.sent.keys()):
        raise ExportError(
            f"{model.name}: what stage {number} and its neighbours exchange is fused into other "
            "ops in the plan, and cannot be named in a program of the stage"
        )
    training = model.training
    settings = replace(training, accumulation_steps=training.parts, pipeline_microbatches=1)
    return replace(
        model, name=f"{model.name}, stage {number} of {len(starts)}", graph=piece.graph,
        workload=settings, pipeline=None, members={},
    )  # fmt: skip


def stage_outputs(graph: Graph, edge: Boundary) -> tuple[list[str], list[str]]:
    """What a stage's function returns: with a gradient, and without."""
    made = [*(graph.outputs[:1] if edge.loss else ()), *edge.sent]
    through = {*edge.differentiable, *(graph.outputs[:1] if edge.loss else ())}
    return [n for n in made if n in through], [n for n in made if n not in through]


def split_rows(sides: Sides, split: Mapping[str, int]) -> dict[str, int]:
    """`Groups.split` by the names that arguments and results of a stage's program have."""
    found = dict(split)
    for name in sides.boundary.sent:
        found[sent_parts(name)] = split[name]
        if name in sides.boundary.differentiable:
            found[received_cotangent(name)] = split[name]
    return found | {result: split[name] for name, result in sides.returned.items()}


def step_source(sides: Sides, loss: str, values: Mapping[str, str]) -> list[str]:
    """Names that cross, and the step (`values`: see `jax_sources`)."""
    edge = sides.boundary
    behind = {
        name: received_cotangent(name) for name in edge.sent if name in edge.differentiable
    }
    sent = {name: sent_parts(name) for name in edge.sent}
    shared = {
        name: (result, tuple(given_gradient(name, giver) for giver in edge.shared[name]))
        for name, result in sides.shared.items()
    }
    names = [
        "# Zeros, one for each microbatch; what XLA does not know.",
        f"ZEROS = '{ZEROS}'",
        "# What crosses: received -> its cotangent, a result; sent -> result, and its cotangent.",
        f"RECEIVED, RETURNED = {edge.received}, {dict(sides.returned)}",
        f"SENT, BEHIND = {sent}, {behind}",
        "# Parameters that other stages have too -> result, and their gradients.",
        f"SHARED = {shared}",
        f"LOSS = {(loss,) if edge.loss else ()}",
    ]
    return [*(line.replace("'", '"') for line in names), "", "", *filled(_STEP, values)]


_STEP = '''
def train_step(params, states, batch, mesh=None):
    """One optimizer step over $steps microbatches: -> (results, new params, new states)."""
    taken = {name for _, names in SHARED.values() for name in names}
    given = {n: x for n, x in batch.items() if n not in taken}
$held
    def microbatches(batch):
        crossing = {name: batch[name] for name in (*RECEIVED, *BEHIND.values())}
        data = {n: x for n, x in batch.items() if n not in {*crossing, ZEROS}}

        def microbatch(carry, part):
            (losses, sums), _ = carry
            zero, own = part
            # As if every microbatch brought its own: else XLA works on what is received only once.
            come = {n: jnp.where(zero == 0, x, jnp.zeros_like(x)) for n, x in crossing.items()}
            ins = {name: come[name] for name in RETURNED}
            made, back, rest = jax.vjp(
                lambda p, r: loss_fn(p, {**own, **come, **r}, mesh), $read, ins, has_aux=True
            )
            grads, returned = back(
                {n: come[BEHIND[n]] if n in BEHIND else jnp.ones_like(x) for n, x in made.items()}
            )
            found = {SENT[n]: x for n, x in (made | rest).items() if n in SENT}
            found |= {RETURNED[n]: g for n, g in returned.items()}
            found = {n: annotate(x, $sent[2], mesh) for n, x in found.items()}
            total = jax.tree.map(
                lambda t, r: t + r.astype(t.dtype) / $steps,
                (losses, sums), ({n: made[n] for n in LOSS}, grads),
            )
            return (total, found), None

        losses = {n: jnp.zeros((), jnp.float32) for n in LOSS}
        sums = {
            n: annotate(jnp.zeros(p.shape, $gradients), $sums, mesh) for n, p in params.items()
        }
        room = {
            n: annotate(jnp.zeros(*$sent[:2]), $sent[2], mesh)
            for n in (*SENT.values(), *RETURNED.values())
        }
        (total, found), _ = lax.scan(microbatch, ((losses, sums), room), (batch[ZEROS], data))
        return *total, found

    losses, grads, found = $summed
$joined    for name, (own, others) in SHARED.items():
        found[own] = grads[name]
        grads[name] = sum((batch[other] for other in others), grads[name])
    new = {name: $update for name, p in params.items()}
    losses |= found
    return losses, {n: p for n, (p, _) in new.items()}, {n: s for n, (_, s) in new.items()}
'''

# Of groups of devices (see `unreduced`).
JOINED = """    found = {n: annotate(_joined(x, n), RESULTS[n][2], mesh) for n, x in found.items()}
"""
CROSSING = '''
def _sent(name):
    """Shape, dtype and sharding of one group's part of a result."""
    shape, dtype, where = RESULTS[name]
    dim = SPLIT[name]
    return (*shape[:dim], shape[dim] // GROUPS, *shape[dim + 1 :]), dtype, _within(where)


def _joined(x, name):
    """[groups, ..., n, ...] -> [..., groups n, ...]"""
    dim = SPLIT[name]
    return jnp.moveaxis(x, 0, dim).reshape(*x.shape[1 : dim + 1], -1, *x.shape[dim + 2 :])
'''
