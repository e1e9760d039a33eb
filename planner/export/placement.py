"""Where a plan puts what a generated program can name: tensors, and copies that ops read.

Read off a Result; how it is written is in `jax_program.py`. Gradients are not named: JAX shards
an activation's gradient like the activation, and asking for something else between two ops that
agree makes the compiler replicate whole batches on the way (seen on a 480B encoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.graph.builder import contraction_sizes
from planner.result import Result
from planner.sharding.spec import Spec

Use = tuple[str, int]  # (name of an op, position of an operand)


@dataclass(frozen=True)
class Placement:
    """`tensors`: where parameters, states, inputs and activations lie. `uses`: what an op reads
    instead, if its operand is resharded for it."""

    tensors: Mapping[str, Spec]
    uses: Mapping[Use, Spec] = field(default_factory=dict)


def placement(result: Result) -> Placement:
    """The plan's placement. Copies are named for products only: what element-wise ops read, the
    compiler decides well by itself."""
    return Placement(result.specs, _uses(result))


def _uses(result: Result) -> dict[Use, Spec]:
    found: dict[Use, Spec] = {}
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.name)
        if op.phase != "forward" or choice is None or contraction_sizes(op) is None:
            continue
        for i, name in enumerate(op.ins):
            spec = choice.operand(op.rule, i)
            if not spec.partial and spec != result.specs.get(name):
                found[op.name, i] = spec
    return found
