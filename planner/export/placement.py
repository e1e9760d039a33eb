"""Where a plan puts what a generated program can name: tensors, copies that ops read, sums.

Read off a Result; how it is written is in `jax_program.py`. Gradients are not named: JAX shards
an activation's gradient like the activation, and asking for something else, or leaving it open,
makes the compiler replicate whole batches or tables (seen on a 480B encoder, a 137B decoder).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from planner.graph.builder import contraction_sizes
from planner.graph.core import Op
from planner.graph.derive import SAVED
from planner.result import Result
from planner.sharding.spec import Spec

Use = tuple[str, str]  # (name of an op, tensor that it reads)


@dataclass(frozen=True)
class Copy:
    """A tensor as one op reads it. `bound`: the gradient of the copy lies like the copy."""

    spec: Spec
    bound: bool = False


@dataclass(frozen=True)
class Placement:
    """`tensors`: where parameters, states, inputs and activations lie. `uses`: what an op reads
    instead, if its operand is resharded for it. `sums`: products that leave unreduced sums, and
    how these lie where they are made."""

    tensors: Mapping[str, Spec]
    uses: Mapping[Use, Copy] = field(default_factory=dict)
    sums: Mapping[str, Spec] = field(default_factory=dict)


def placement(result: Result) -> Placement:
    """The plan's placement. What is saved for the backward pass lies as it is saved."""
    specs = {**result.specs, **_as_saved(result)}
    uses: dict[Use, Copy] = {}
    sums: dict[str, Spec] = {}
    order = [name for name, _ in result.mesh.axes]
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.name)
        if op.phase != "forward" or choice is None:
            continue
        operands = _operands(op, result)
        if op.attrs.get("onehot"):  # compilers have better ways than gathering the table
            operands.pop(op.ins[0], None)
        for name, spec in operands.items():
            home = specs.get(name)
            if home is not None and not spec.partial and spec != home:
                uses[op.name, name] = Copy(spec, _bound(home, spec))
        made = choice.result(op.rule, 0, order)
        if contraction_sizes(op) is not None and made.partial:
            sums[op.outs[0]] = made.without_partial()
    return Placement(specs, uses, sums)


def _as_saved(result: Result) -> dict[str, Spec]:
    """Tensor → how each slice of its stack lies, where one is saved."""
    found = {}
    for stack, spec in result.specs.items():
        name = stack.removesuffix(SAVED)
        if name != stack and (lies := result.specs.get(name)) is not None:
            found[name] = Spec(spec.dims[len(spec.dims) - len(lies.dims) :])
    return found


def only(result: Result, names: Collection[str]) -> Placement:
    """Where the arguments lie, and of the activations only the named ones: all else is the
    compiler's."""
    graph = result.model.graph
    activations = {
        name for name, tensor in graph.all_tensors().items()
        if name not in graph.inputs and tensor.role != "parameter"
    }  # fmt: skip
    left_out = activations.difference(names)
    return Placement({name: s for name, s in result.specs.items() if name not in left_out})


def _operands(op: Op, result: Result) -> dict[str, Spec]:
    """Tensor → how the op reads it; without those that it reads in several ways."""
    choice = result.plan.choices[op.name]
    found: dict[str, set[Spec]] = {}
    for i, name in enumerate(op.ins):
        found.setdefault(name, set()).add(choice.operand(op.rule, i))
    return {name: specs.pop() for name, specs in found.items() if len(specs) == 1}


def _bound(home: Spec, copy: Spec) -> bool:
    """Whether the gradient of a copy has to be told where it lies.

    Where an axis is gathered, the gradient is a sum over it, and the compiler reduces it best to
    where the tensor lies. It must be told where nothing is gathered, or else it makes the product
    read another copy, and where a dimension stays split by another axis: then it gathers all of it.
    """
    if set(home.axes) <= set(copy.axes):
        return True
    both = zip(home.dims, copy.dims, strict=True)
    return any(rest and len(rest) < len(axes) and set(rest) < set(axes) for axes, rest in both)
