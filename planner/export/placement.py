"""Where a plan puts what a generated program can name: tensors, copies that ops read, sums.

Read off a Result; how it is written is in `jax_program.py`. Where gradients lie is named only where
it has to be: JAX shards an activation's gradient like the activation, and leaving it open makes the
compiler replicate whole batches or tables (seen on a 480B encoder, a 137B decoder). Named are the
gradients that would be gathered to lie like their activation, and how a product's gradient is made
where the plan splits that product otherwise than the product itself: a compiler would not (seen on
GPT-3: eight times the bytes of reduce-scatters).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from costmodels.program import ITEM_BYTES
from planner.export.cotangents import Gradients
from planner.graph.builder import contraction_sizes
from planner.graph.core import Loop, Op, Tensor
from planner.graph.derive import ACCUMULATE, added_up
from planner.graph.recompute import AGAIN, SAVED
from planner.lowering.halo import local_op
from planner.lowering.slices import by_slices
from planner.plan import Plan
from planner.result import Result
from planner.sharding.choices import bound_to
from planner.sharding.formulate import mesh_resharder
from planner.sharding.reshard import FREE, Move
from planner.sharding.spec import Spec

Use = tuple[str, str]  # (name of an op or a loop, tensor that it reads or carries)


@dataclass(frozen=True)
class Copy:
    """A tensor as one op reads it. `bound`: the gradient of the copy lies like the copy, or as
    `gradient` says. `way`: places that it passes, one collective after the other; so does its
    gradient, if it lies like the copy."""

    spec: Spec
    bound: bool = False
    way: Sequence[Spec] = ()
    gradient: Spec | None = None

    @property
    def turned(self) -> bool:
        """Whether an axis splits another dimension of its gradient."""
        return self.gradient is not None and _moves(self.spec, self.gradient)


@dataclass(frozen=True)
class Gradient:
    """How the gradient of one operand of a product, or of a table, is made: the places that the
    result's gradient and the other operand pass, the last of them where they are read, and where
    the sums lie; what is empty is left to the compiler. `way`: places that the sums pass to who
    reads them."""

    cotangent: Sequence[Spec] = ()
    other: Sequence[Spec] = ()
    made: Spec | None = None
    way: Sequence[Spec] = ()
    home: Spec | None = None  # where they are reduced to at once


@dataclass(frozen=True)
class Update:
    """Places that a parameter and its gradient pass on their way to the update, the last of them
    where it is made, and those that the new parameter passes from there on. Empty: as it lies."""

    parameter: Sequence[Spec]
    gradient: Sequence[Spec]
    new: Sequence[Spec]


@dataclass(frozen=True)
class Placement:
    """`tensors`: where parameters, states, inputs and activations lie. `uses`: what an op reads
    instead, if its operand is resharded for it. `sums`: products that leave unreduced sums or are
    exchanged, and what is narrowed before it is gathered: how these lie where they are made.
    `gradients`: of a product's operands. `together`: products whose two gradients are made one
    right after the other. `first`: products of which the gradient of one operand is made before
    that of the other. `apart`: tensors whose gradients do not lie as they do, and the places that
    these pass to where they lie; none where that is left open.
    `barrier`: whether softmax's gradient is made of its result behind one.
    `sliced`: convolutions whose slices are made the samples of a batch. `rounds`: parameters of a
    circular pipeline as its ticks read them, and where their gradients add up (None is open).
    `updates`: parameters that lie several collectives away when they are updated, or whose
    gradients lie elsewhere. `held`: parameters that all microbatches read elsewhere, and the places
    that they pass before the first, the last of them where they are read."""

    tensors: Mapping[str, Spec]
    uses: Mapping[Use, Copy] = field(default_factory=dict)
    sums: Mapping[str, Spec] = field(default_factory=dict)
    gradients: Mapping[Use, Gradient] = field(default_factory=dict)
    together: Collection[str] = ()
    first: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, Sequence[Spec]] = field(default_factory=dict)
    barrier: bool = False
    sliced: Collection[str] = ()
    rounds: Mapping[str, tuple[Spec, Spec | None]] = field(default_factory=dict)
    updates: Mapping[str, Update] = field(default_factory=dict)
    held: Mapping[str, Sequence[Spec]] = field(default_factory=dict)


def placement(result: Result) -> Placement:
    """The plan's placement. What is saved for the backward pass lies as it is saved."""
    ways = _Ways(result)
    copies = _copies_for_parts(result)
    held = _held(result, ways, copies)
    homes = {name: result.specs[name] for name in held}
    read = {name: places[-1] for name, places in held.items()}
    read |= {copies[name]: spec for name, spec in read.items() if name in copies}
    made_at = Gradients(result)
    found = _inside(replace(result, specs={**result.specs, **read}), ways, made_at)
    updates = _updates(result, ways, made_at)
    return replace(found, tensors={**found.tensors, **homes}, held=held, updates=updates)


def _held(
    result: Result, ways: _Ways, copies: Mapping[str, str]
) -> dict[str, Sequence[Spec]]:  # fmt: skip
    """Told nothing, XLA gathers such a parameter in every microbatch. `copies`: what is read of
    parameters instead."""
    found: dict[str, Sequence[Spec]] = {}
    copied = {copy: name for name, copy in copies.items()}
    for loop in (loop for loop in result.graph.loops() if loop.name == ACCUMULATE):
        for copy, name in ((n, copied.get(n, n)) for n in loop.shared):
            home, read = result.specs[name], result.plan.homes.get(f"{copy}@{loop.name}")
            if ways.tensors[name].role == "parameter" and read not in (None, home):
                found[name] = (*ways.between(copy, home, read), read)
    return found


def _copies_for_parts(result: Result) -> dict[str, str]:
    """Parameter → what is made of it before the loop over microbatches, which reads that."""
    before = (n for n in result.graph.nodes if isinstance(n, Op) and n.phase == "forward")
    parameters = {t.name for t in result.graph.parameters()}
    return {op.ins[0]: op.outs[0] for op in before if len(op.ins) == 1 and op.ins[0] in parameters}


def _inside(result: Result, ways: _Ways, made_at: Gradients) -> Placement:
    """Within one microbatch."""
    specs = {**result.specs, **_as_saved(result)}
    uses = {**_entries(result, specs, ways), **_tables(result, specs, made_at)}
    sums: dict[str, Spec] = {}
    order = [name for name, _ in result.mesh.axes]
    tensors = result.graph.all_tensors()
    gpu = _on_gpu(result)  # the TPU's compiler needs less telling
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.name)
        if op.phase != "forward" or choice is None or op.attrs.get("onehot") == "choose":
            continue
        operands = _operands(op, result)
        for name, spec in operands.items():
            home = specs.get(name)
            if home is None or spec.partial or spec == home:
                continue
            if gpu and op.attrs.get("onehot") and name == op.ins[0] and not _keeps(home, spec):
                continue  # GPUs' compiler has not been asked what it does when told
            bound = _bound(home, spec)
            made = made_at.of_use(op, name) if bound else None
            uses[op.name, name] = Copy(
                spec, bound or _into_stages(op), ways.to_reader(name, home, spec),
                None if made == spec else made,
            )  # fmt: skip
        made = choice.result(op.rule, 0, order)
        product, lies = contraction_sizes(op) is not None, specs.get(op.outs[0], made)
        looked_up = op.attrs.get("onehot") == "take" and not gpu
        exchanged = (product or looked_up) and _moves(made, lies)
        gathered = made.axes and not made.partial and made != lies
        if product and made.partial:
            sums[op.outs[0]] = made.without_partial()
        elif exchanged or (gpu and gathered and _narrows(op, tensors)):
            sums[op.outs[0]] = made
    weights = _weights(result, tensors)
    gradients = _gradients(result, made_at, ways, weights)
    if not gpu:
        gradients |= _lookups(result, made_at)
    at_once = _outside_loops(result) if gpu else {}
    for use, home in at_once.items():
        gradients[use] = replace(gradients.get(use, Gradient()), home=home)
    together = {op for op, _ in at_once}
    tpu = result.mesh.chip.family == "tpu"
    first = dict(_sums_of_weights(result, made_at, weights)) if tpu else {}
    apart = {
        **dict.fromkeys(_free_casts(result), ()),
        **_apart(result, specs, made_at, tensors, weights, ways),
    }  # fmt: skip
    return Placement(
        specs, uses, sums, gradients, together, first, apart, barrier=gpu,
        sliced=_sliced(result), rounds=_rounds(result),
    )  # fmt: skip


def _updates(result: Result, ways: _Ways, made_at: Gradients) -> dict[str, Update]:
    """Told nothing, XLA moves a gradient once for every moment of an optimizer."""
    found = {}
    order = [name for name, _ in result.mesh.axes]
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.name)
        new = op.outs[0]
        parameter = result.graph.aliases.get(new, "")
        gradient = _updated_with(op, parameter, ways.tensors)
        if op.phase != "update" or choice is None or gradient is None:
            continue
        home, lies = (result.specs.get(name) for name in (parameter, gradient))
        if home is None or parameter not in result.model.graph.inputs:
            continue
        here, there = (choice.operand(op.rule, op.ins.index(n)) for n in (parameter, gradient))
        made = choice.result(op.rule, 0, order)
        before, after = ways.between(parameter, home, here), ways.between(new, made, home)
        apart = bool(before or after)
        path = ways.along(gradient, (made_at.made(gradient), lies, there))
        given = [move.result for move in path] if any(m.kind not in FREE for m in path) else ()
        if apart or given:
            found[parameter] = Update(
                (*before, here) if apart else (), given, (made, *after) if apart else ()
            )
    return found


def _updated_with(op: Op, parameter: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The gradient that an update reads beside the parameter; factored moments are smaller."""
    if parameter not in op.ins:
        return None
    shape = tensors[parameter].shape
    others = (n for n in op.ins if tensors[n].role not in ("parameter", "state"))
    return next((n for n in others if tensors[n].shape == shape), None)


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


class _Ways:
    """By which collectives the plan goes from one place of a tensor to another."""

    def __init__(self, result: Result) -> None:
        self.tensors = result.graph.all_tensors()
        self.resharder = mesh_resharder(result.mesh, result.model.uneven)

    def path(self, name: str, source: Spec, target: Spec) -> Sequence[Move]:
        t = self.tensors[name]
        return self.resharder.path(source, target, t.shape, ITEM_BYTES[t.dtype]) or ()

    def along(self, name: str, places: Sequence[Spec | None]) -> Sequence[Move]:
        """From the first of the places that is known to the last; none if that leaves sums."""
        known = [p for p in places if p is not None]
        if known and known[0].partial:
            known = known[1:]
        if any(p.partial for p in known):
            return ()
        return [m for a, b in pairwise(known) for m in self.path(name, a, b)]

    def between(self, name: str, source: Spec, target: Spec) -> Sequence[Spec]:
        """The places between, where several collectives follow each other. Compilers do not find
        those: XLA's gathers all of the tensor on every device, and its gradient."""
        return _stops(self.path(name, source, target))

    def to_reader(self, name: str, source: Spec, target: Spec) -> Sequence[Spec]:
        """The same, and what is left of a copy that is cut before it is gathered: XLA gathers it
        first, 500 MiB of LaMDA's table where 8 are read."""
        path = self.path(name, source, target)
        if path and path[0].kind == "slice":
            return tuple(move.result for move in path[:-1])
        return self.between(name, source, target)


def _entries(result: Result, specs: Mapping[str, Spec], ways: _Ways) -> dict[Use, Copy]:
    """What loops carry, where it does not lie like that before. Told nothing, XLA may move it in
    every turn."""
    found: dict[Use, Copy] = {}
    for loop in result.graph.loops():
        for carry in loop.carries if loop.phase == "forward" else ():
            source, target = specs.get(carry.init), specs.get(carry.entry)
            if source is None or target is None or source.partial or target.partial:
                continue
            if source != target:
                way = ways.between(carry.init, source, target)
                found[loop.name, carry.init] = Copy(target, True, way)
    return found


def _tables(result: Result, specs: Mapping[str, Spec], made_at: Gradients) -> dict[Use, Copy]:
    """Tables that are looked up as they lie, and whose gradients are sums over devices. Told
    nothing, XLA exchanges the rows' gradients by batch for columns, and adds to a part."""
    found = {}
    for op, _ in result.graph.walk():
        if op.phase != "forward" or op.attrs.get("onehot") != "take":
            continue
        table, indices = op.ins[:2]
        home, added = specs.get(table), made_at.unreduced(table, indices)
        if added and home and home == _operands(op, result).get(table):
            found[op.name, table] = Copy(home, True, (), None if added == home else added)
    return found


def _lookups(result: Result, made_at: Gradients) -> dict[Use, Gradient]:
    """Tables whose gradients are made of indices that lie otherwise than where rows are looked up.
    XLA would move the rows' gradients to where the indices lie."""
    found = {}
    for op, _ in result.graph.walk():
        if op.phase != "forward" or op.attrs.get("onehot") != "take":
            continue
        table, indices = op.ins[:2]
        read, made = made_at.made_of(table, indices)
        if read is not None and read != _operands(op, result).get(indices):
            found[op.name, table] = Gradient((), (read,), made)
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
    return Placement(tensors, barrier=_on_gpu(result), sliced=_sliced(result))


def _on_gpu(result: Result) -> bool:
    return result.mesh.chip.family == "gpu"


def _gradients(
    result: Result, made_at: Gradients, ways: _Ways, weights: Collection[str]
) -> dict[Use, Gradient]:  # fmt: skip
    """Of products whose gradients the plan makes otherwise than a compiler would, told nothing:
    split otherwise than the products, of what is exchanged first, or reduced another way."""
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
            if len(makers) != 1:
                continue
            maker = makers[0]
            choice = plan.choices[maker.name]
            at = [x.removesuffix(AGAIN) for x in maker.ins].index(other)
            cotangent, again = maker.ins[1 - at], maker.ins[at]
            pulled, read = (choice.operand(maker.rule, k) for k in (1 - at, at))
            made = choice.result(maker.rule, 0, order)
            path = _path_to_reader(maker.outs[0], made, result, ways)
            way = _turns(path)
            home, lies = (result.specs.get(n) for n in (name, op.outs[0]))
            reasons = (
                way, _split(maker, plan) != _split(op, plan),
                home is not None and _moves(made, home),
                # XLA would not exchange one operand, but gather both: 3 GiB of a GShard's 7.
                made.partial and lies is not None and _moves(lies, pulled),
                name not in weights and _onto_split(made, path), _cut_when_whole(path),
            )  # fmt: skip
            if any(reasons):
                found[op.name, name] = Gradient(
                    (*_from_maker(cotangent, pulled, result, made_at, ways), pulled),
                    (
                        *_through(again, other, read, result, ways),
                        *_between(again, read, result, ways), read,
                    ),
                    made.without_partial(), way,
                )  # fmt: skip
    return found


def _apart(
    result: Result, specs: Mapping[str, Spec], made_at: Gradients, tensors: Mapping[str, Tensor],
    weights: Collection[str], ways: _Ways,
) -> dict[str, Sequence[Spec]]:  # fmt: skip
    """Tensors whose gradients the plan has elsewhere: parameters in loops and their casts, and
    activations whose gradients are made with axes that they lack. Bound to lie like the tensor,
    these would be gathered. And rows that are looked up, whose gradients are read elsewhere."""
    found: dict[str, Sequence[Spec]] = {}
    for name, spec in specs.items():
        made = made_at.of(name) if name in tensors else None
        if made is None or made == spec:
            continue
        # Told a place, XLA reduces every term to it, and not their sum.
        if name in weights or not (_keeps(made, spec) or made_at.sums(name) > 1):
            found[name] = (made,)
    looked_up = (op for op, _ in result.model.graph.walk() if op.attrs.get("onehot") == "take")
    for op in looked_up:
        gradient, read = made_at.read_by(op.ins[0], op.ins[1])
        if read is not None and read != specs.get(op.outs[0]):
            found[op.outs[0]] = (*_between(gradient, read, result, ways), read)
    return found


def _moves(made: Spec, home: Spec) -> bool:
    """Whether an axis splits another dimension there than here."""
    return any(
        set(axes) & set(there)
        for i, axes in enumerate(made.dims) for j, there in enumerate(home.dims) if i != j
    )  # fmt: skip


def _cut_when_whole(path: Sequence[Move]) -> bool:
    """Whether sums are reduced whole, and then cut for who reads them."""
    return {"all-reduce", "slice"} <= {move.kind for move in path}


def _onto_split(made: Spec, path: Sequence[Move]) -> bool:
    """Whether sums are scattered along a dimension that is split where they are made."""
    return any(move.kind == "reduce-scatter" and made.dims[move.dim] for move in path)


def _between(name: str, read: Spec, result: Result, ways: _Ways) -> Sequence[Spec]:
    """Places that a tensor passes between where it lies and where it is read."""
    lies = result.specs.get(name, read)
    return () if lies.partial or read.partial else ways.between(name, lies, read)


def _from_maker(
    name: str, read: Spec, result: Result, made_at: Gradients, ways: _Ways
) -> Sequence[Spec]:  # fmt: skip
    """Places that a gradient passes from where it is made to where it is read, by several
    collectives: also those on the way to where it lies."""
    return _stops(ways.along(name, (made_at.made(name), result.specs.get(name), read)))


def _stops(path: Sequence[Move]) -> Sequence[Spec]:
    """The places between, if a path takes several collectives."""
    several = sum(move.kind not in FREE for move in path) > 1
    return tuple(move.result for move in path[:-1]) if several else ()


def _through(
    again: str, name: str, read: Spec, result: Result, ways: _Ways
) -> Sequence[Spec]:  # fmt: skip
    """Where `name` lies when it is recomputed, if it has been gathered in part by then: the
    compiler would gather it a second time from where it came from."""
    lies = result.specs.get(again)
    if again == name or lies is None or lies in (read, result.specs.get(name)):
        return ()
    rest = {move.kind for move in ways.path(again, lies, read)}
    return (lies,) if rest == {"all-gather"} else ()


def _turns(path: Sequence[Move]) -> Sequence[Spec]:
    """The places between, where several axes move to other dimensions one after the other, of
    which compilers make gathers of the whole tensor, and where what is scattered is gathered or
    moves on: they would reduce it whole."""
    kinds = [move.kind for move in path]
    scattered = "reduce-scatter" in kinds and not {"all-gather", "all-to-all"}.isdisjoint(kinds)
    several = kinds.count("all-to-all") > 1 or scattered
    return [m.result for m in path[:-1] if not m.result.partial] if several else ()


def _path_to_reader(name: str, made: Spec, result: Result, ways: _Ways) -> Sequence[Move]:
    """What the plan does with a tensor until its readers have it, if all read it alike."""
    readers = [o for o, _ in result.graph.walk() if name in o.ins]
    if not all(o.name in result.plan.choices for o in readers):
        return ()
    read = {_operands(o, result).get(name) for o in readers}
    target = read.pop() if len(read) == 1 else None
    return () if target is None else ways.path(name, made, target)


def _makes_gradient(op: Op, name: str, other: str) -> bool:
    """Whether a product of the backward pass makes the gradient of `name` out of `other`."""
    named = re.fullmatch(rf"{re.escape(name)}\.grad(_\d+)?", op.outs[0])
    return named is not None and other in (x.removesuffix(AGAIN) for x in op.ins)


def _split(op: Op, plan: Plan) -> dict[str, Sequence[str]]:
    """Dimension → axes that split it."""
    both = zip(op.rule.factors, plan.choices[op.name].split, strict=True)
    return {factor.name: axes for factor, axes in both if axes}


def _sums_of_weights(
    result: Result, made_at: Gradients, weights: Collection[str]
) -> Iterator[Use]:
    """Products by weights whose gradients are sums over devices.

    XLA's TPU compiler decomposes those into rings and puts them off to the end of a layer, or until
    the loops of the backward pass are done, and keeps what they are made of as long: GPT-3 with two
    layers took 6289 MiB on a v5e, 4177 where they are made before the other gradient. That one is
    left alone: sums of several products are added up before they are reduced.
    """
    for op, _ in result.model.graph.walk():
        for name in op.ins if contraction_sizes(op) is not None else ():
            if name in weights and made_at.sums(name):
                yield op.name, name


def _weights(result: Result, tensors: Mapping[str, Tensor]) -> set[str]:
    """Parameters, whole and as loops see them, and what is cast or reshaped of them."""
    found = {name for name, t in tensors.items() if t.role == "parameter"}
    for op, _ in result.model.graph.walk():
        if len(op.ins) == 1 and op.ins[0] in found:
            found.add(op.outs[0])
    return found


def _outside_loops(result: Result) -> dict[Use, Spec]:
    """Products outside of loops by a parameter, or one that is cast, and where its gradient goes:
    where microbatches add it up, or where the parameter lies.

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
            home = result.specs.get(added_up(result.graph, source)) or result.specs.get(source)
            same = tensors[source].dims == tensors[name].dims
            if tensors[source].role == "parameter" and home is not None and same:
                found[op.name, name] = home.without_partial()
    return found


def _narrows(op: Op, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an op ends by narrowing what it has computed: a cast, or anything that is wider in
    between. Told where that is, a compiler narrows it before it is gathered."""
    out = tensors[op.outs[0]].dtype
    wide = (tensors[n].dtype for n in op.ins if tensors[n].floating)
    return op.kind == "map" and any(ITEM_BYTES[d] > ITEM_BYTES[out] for d in wide)


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
    if _keeps(home, copy):
        return True
    both = zip(home.dims, copy.dims, strict=True)
    return any(rest and len(rest) < len(axes) and set(rest) < set(axes) for axes, rest in both)


def _rounds(result: Result) -> dict[str, tuple[Spec, Spec | None]]:
    found = {}
    for op, _ in result.graph.walk():
        if op.attrs.get("onehot") == "choose" and op.phase == "forward":
            summed = result.specs.get(f"{op.ins[0]}.grad.out")
            whole = summed is None or summed.partial
            read = result.plan.choices[op.name].operand(op.rule, 0)
            found[op.ins[0]] = read, None if whole else summed
    return found


def _into_stages(op: Op) -> bool:
    """Whether a pipeline takes its inputs. Their gradients go back the same way: compilers gather
    those of all microbatches."""
    staged = {(i,) for i, f in enumerate(op.rule.factors) if bound_to(f.name)}
    return bool(staged) and len(op.ins) == 1 and staged.isdisjoint(op.rule.ins[0])


def _keeps(home: Spec, copy: Spec) -> bool:
    """Whether no axis is gathered."""
    return set(home.axes) <= set(copy.axes)
