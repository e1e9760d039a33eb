"""Where a plan puts what a generated program can name: tensors, copies that ops read, sums.

Read off a Result; how it is written is in `jax_program.py`. Where gradients lie is not named: JAX
shards an activation's gradient like the activation, and asking for something else, or leaving it
open, makes the compiler replicate whole batches or tables (seen on a 480B encoder, a 137B decoder).
How a product's gradient is made is named where the plan splits that product otherwise than the
product itself: a compiler would not (seen on GPT-3: eight times the bytes of reduce-scatters).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from costmodels.program import ITEM_BYTES
from planner.graph import expr as ex
from planner.graph.builder import contraction_sizes
from planner.graph.core import Loop, Op, Tensor
from planner.graph.recompute import AGAIN, SAVED
from planner.lowering.halo import local_op
from planner.lowering.slices import by_slices
from planner.plan import Plan
from planner.result import Result
from planner.sharding.spec import Spec

Use = tuple[str, str]  # (name of an op, tensor that it reads)


@dataclass(frozen=True)
class Copy:
    """A tensor as one op reads it. `bound`: the gradient of the copy lies like the copy."""

    spec: Spec
    bound: bool = False


@dataclass(frozen=True)
class Gradient:
    """How the gradient of one operand of a product is made: where the result's gradient and the
    other operand are read, and where the sums lie; None is left to the compiler."""

    cotangent: Spec | None = None
    other: Spec | None = None
    made: Spec | None = None
    home: Spec | None = None  # where they are reduced to at once


@dataclass(frozen=True)
class Placement:
    """`tensors`: where parameters, states, inputs and activations lie. `uses`: what an op reads
    instead, if its operand is resharded for it. `sums`: products that leave unreduced sums, and
    how these lie where they are made. `gradients`: of a product's operands. `together`: products
    whose two gradients are made one right after the other. `values`: tensors of which only the
    value lies as `tensors` says, not the gradient. `softmax`: whether the gradient of softmax is
    made of its result, as planned, by a function of the program's own. `sliced`: convolutions
    whose slices are made the samples of a batch."""

    tensors: Mapping[str, Spec]
    uses: Mapping[Use, Copy] = field(default_factory=dict)
    sums: Mapping[str, Spec] = field(default_factory=dict)
    gradients: Mapping[Use, Gradient] = field(default_factory=dict)
    together: Collection[str] = ()
    values: Collection[str] = ()
    softmax: bool = False
    sliced: Collection[str] = ()


def placement(result: Result) -> Placement:
    """The plan's placement. What is saved for the backward pass lies as it is saved."""
    specs = {**result.specs, **_as_saved(result)}
    uses: dict[Use, Copy] = {}
    sums: dict[str, Spec] = {}
    order = [name for name, _ in result.mesh.axes]
    tensors = result.graph.all_tensors()
    gpu = result.mesh.chip.family == "gpu"  # the TPU's compiler needs less telling
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
        gathered = made.axes and not made.partial and made != specs.get(op.outs[0])
        if contraction_sizes(op) is not None and made.partial:
            sums[op.outs[0]] = made.without_partial()
        elif gpu and gathered and _is_cast(op, tensors):
            sums[op.outs[0]] = made
    gradients = _gradients(result)
    together = _outside_loops(result) if gpu else {}
    for use, home in together.items():
        gradients[use] = replace(gradients.get(use, Gradient()), home=home)
    return Placement(
        specs, uses, sums, gradients, {op for op, _ in together}, _free_casts(result),
        softmax=gpu, sliced=_sliced(result),
    )  # fmt: skip


def _sliced(result: Result) -> set[str]:
    """Convolutions and poolings that a TPU does better slice by slice."""
    if result.mesh.chip.family != "tpu":
        return set()
    plan = result.plan
    return {
        op.name for op, _ in result.graph.walk()
        if op.phase == "forward" and op.name in plan.choices
        and by_slices(op, plan.choices[op.name], local_op(op, plan.choices[op.name], plan.sizes))
    }  # fmt: skip


def _as_saved(result: Result) -> dict[str, Spec]:
    """Tensor → how each slice of its stack lies, where one is saved. What enters a body, which no
    op makes, lies as it comes."""
    found = {}
    made = {o for op, _ in result.graph.walk() for o in op.outs}
    for stack, spec in result.specs.items():
        name = stack.removesuffix(SAVED)
        if name != stack and name in made and (lies := result.specs.get(name)) is not None:
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
    tensors = {name: s for name, s in result.specs.items() if name not in left_out}
    return Placement(tensors, sliced=_sliced(result))


def _gradients(result: Result) -> dict[Use, Gradient]:
    """Of products whose gradients the plan splits otherwise than the products, and leaves as sums
    that are still to be reduced: of weights. Told so for activations, as where GLaM combines what
    its experts made, XLA's TPU compiler gathers more than when it is left alone."""
    plan, order = result.plan, [name for name, _ in result.mesh.axes]
    products = [
        op for op, _ in result.graph.walk()
        if len(op.ins) == 2 and op.name in plan.choices and contraction_sizes(op) is not None
    ]  # fmt: skip
    back = [op for op in products if op.phase == "backward"]
    found = {}
    for op in products:
        if op.phase != "forward":
            continue
        for name, other in (op.ins, op.ins[::-1]):
            makers = [b for b in back if _makes_gradient(b, name, other)]
            if len(makers) != 1 or _split(makers[0], plan) == _split(op, plan):
                continue
            rule, choice = makers[0].rule, plan.choices[makers[0].name]
            made = choice.result(rule, 0, order)
            if made.partial:
                at = [x.removesuffix(AGAIN) for x in makers[0].ins].index(other)
                found[op.name, name] = Gradient(
                    choice.operand(rule, 1 - at), choice.operand(rule, at), made.without_partial()
                )
    return found


def _makes_gradient(op: Op, name: str, other: str) -> bool:
    """Whether a product of the backward pass makes the gradient of `name` out of `other`."""
    named = re.fullmatch(rf"{re.escape(name)}\.grad(_\d+)?", op.outs[0])
    return named is not None and other in (x.removesuffix(AGAIN) for x in op.ins)


def _split(op: Op, plan: Plan) -> dict[str, Sequence[str]]:
    """Dimension → axes that split it."""
    both = zip(op.rule.factors, plan.choices[op.name].split, strict=True)
    return {factor.name: axes for factor, axes in both if axes}


def _outside_loops(result: Result) -> dict[Use, Spec]:
    """Products outside of loops by a parameter, or one that is cast, and where it lies.

    XLA's GPU compiler puts off such gradients until the loops of the backward pass are done, and
    keeps what they are made of, the gradient of all logits, as long.
    """
    nodes = [n for n in result.model.graph.nodes if isinstance(n, Op)]
    tensors = result.model.graph.tensors
    cast = {n.outs[0]: n.ins[0] for n in nodes if len(n.ins) == 1}
    found = {}
    for op in nodes:
        for name in op.ins if contraction_sizes(op) is not None else ():
            source = cast.get(name, name)
            home = result.specs.get(source)
            same = tensors[source].dims == tensors[name].dims
            if tensors[source].role == "parameter" and home is not None and same:
                found[op.name, name] = home
    return found


def _is_cast(op: Op, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an op only narrows a tensor. Told so, a compiler narrows it before it is gathered."""
    if len(op.ins) != 1 or op.attrs.get("exprs") != (ex.x(0),):
        return False
    before, after = (tensors[n].dtype for n in (op.ins[0], op.outs[0]))
    return ITEM_BYTES[after] < ITEM_BYTES[before]


def _free_casts(result: Result) -> set[str]:
    """Casts of parameters whose gradients lie otherwise: the plan reduces these to where the
    parameter's gradient lies, in one go, and not by way of the cast."""
    tensors, specs = result.model.graph.all_tensors(), result.specs
    slices = {
        s.inner for n in result.model.graph.nodes if isinstance(n, Loop) for s in n.reads
        if tensors[s.outer].role == "parameter"
    }  # fmt: skip
    found = set()
    for op, _ in result.model.graph.walk():
        if len(op.ins) != 1 or op.ins[0] not in slices:
            continue
        made, reduced = (specs.get(f"{name}.grad") for name in (op.outs[0], op.ins[0]))
        if made is None or reduced is None:
            continue
        if specs.get(op.outs[0]) not in (reduced, made.without_partial()):
            found.add(op.outs[0])
    return found


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
