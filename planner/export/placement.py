"""Where a plan puts what a generated program can name: tensors, copies that ops read, cotangents.

Read off a Result; how it is written is in `jax_program.py`.
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
    instead, if its operand is resharded for it. `cotangents`: where the gradient of an
    activation lies, if not like the activation."""

    tensors: Mapping[str, Spec]
    uses: Mapping[Use, Spec] = field(default_factory=dict)
    cotangents: Mapping[str, Spec] = field(default_factory=dict)


def placement(result: Result) -> Placement:
    """The plan's placement. Copies are named for products only: what element-wise ops read, the
    compiler decides well by itself."""
    return Placement(result.specs, _uses(result), _cotangents(result))


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


def _cotangents(result: Result) -> dict[str, Spec]:
    found = {}
    for tensor, cotangent in result.graph.cotangents.items():
        spec = result.specs.get(cotangent)
        if spec is not None and not spec.partial and spec != result.specs.get(tensor):
            found[tensor] = spec
    return found
