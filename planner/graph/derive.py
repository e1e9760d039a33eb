"""From a forward graph to a whole training step: backward pass, rematerialisation, update.

Reverse-mode differentiation over nodes and loops. A loop's backward loop runs reversed over
the saved stacks. What is saved and what is computed again is in `recompute.py`, gradients of single
ops are in `vjp.py`, update rules in `optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.graph import expr as ex
from planner.graph.builder import Builder, Operand
from planner.graph.core import Carry, Graph, Loop, Node, Op, Stack, Tensor
from planner.graph.fuse import fuse_graph, fuse_nodes
from planner.graph.optimizers import update
from planner.graph.recompute import OPEN, Saved, rename_node
from planner.graph.vjp import VJPS, add_up, labels_of
from planner.model import AUTO, Model, Training


@dataclass(frozen=True)
class Boundary:
    """What a piece of a model shares with other pieces, by the names it has in the piece.

    `received` tensors are among the piece's inputs, `sent` ones are made or received by it. Of
    those in `differentiable` cotangents come back, or are sent back. `shared` parameters are
    read by other pieces too, by those numbered.
    """

    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    differentiable: frozenset[str] = frozenset()
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    loss: bool = True


ACCUMULATE = "accumulate"  # the loop over parts of the batch
ADDED = ".acc"  # behind a name: what they add up so far


def added_up(step: Graph, tensor: str) -> str:
    """What parts of the batch add up for a tensor's gradient, as each finds it."""
    return f"{step.cotangents.get(tensor, f'{tensor}.grad')}{ADDED}"


def all_parts(tensor: str) -> str:
    """The stack of a tensor over the parts of the batch."""
    return f"{tensor}.all"


def received_cotangent(tensor: str) -> str:
    """A piece's input that holds the cotangent of a tensor it has sent."""
    return f"{tensor}.cotangent"


def sent_parts(tensor: str) -> str:
    """The stack of a tensor (or cotangent) that a piece sends."""
    return f"{tensor}.sent"


def given_gradient(parameter: str, giver: int) -> str:
    """The gradient that another piece, number `giver`, has for a shared parameter."""
    return f"{parameter}.grad.of{giver}"


def step_of(model: Model, keep: Collection[str] = (), lean: bool = False) -> Graph:
    """What a step runs. That of inference is the model's graph itself."""
    if model.inference is not None:
        return fuse_graph(model.graph, keep)
    return training_step(model, keep, lean)


def training_step(model: Model, keep: Collection[str] = (), lean: bool = False) -> Graph:
    """The step's graph: inputs → loss, new parameters and states (aliased to the old ones).

    Tensors in `keep`, and their cotangents, are never fused away. `lean`: the backward pass in an
    order of less memory, which may hide less communication. Gradients of weights come before those
    of what they multiply, and nothing is recomputed before it is read.
    """
    forward = fuse_graph(model.graph, keep)
    return piece_step(forward, model.training, keep, None, lean)


def piece_step(
    forward: Graph, settings: Training, keep: Collection[str], boundary: Boundary | None,
    lean: bool = False,
) -> Graph:  # fmt: skip
    """The step of a fused forward graph: a whole model's, or that of a piece with a `boundary`.

    A piece always has the loop over parts of the batch; there it reads what it receives and
    writes what it sends, a slice each time.
    """
    outer = _fresh_builder(settings)
    steps = settings.parts
    looped = steps > 1 or boundary is not None
    if not looped:
        scope = outer
        for name in forward.inputs:
            _declare_input(scope, forward.tensors[name])
    else:
        scope = outer.repeat(ACCUMULATE, steps)
        scope.prefix = ""  # tensors keep the names of the model
        for name in forward.inputs:
            _declare_accumulated_input(outer, scope, forward.tensors[name], steps)
    edge = boundary or Boundary()
    cotangents: dict[str, str] = {}
    loss, gradients, sent = _differentiate(
        scope, forward, settings, frozenset(keep), cotangents, edge, lean
    )
    whole = {*keep, *(cotangents[t] for t in keep if t in cotangents)}
    if looped:
        writes = [_declare_sent(outer, scope.lookup(name), steps) for name in sent]
        loss, gradients = _close_accumulation(
            outer, scope, loss, gradients, settings, whole, writes
        )
    outer.phase = "update"
    given = [gradients[p] for p in edge.shared]
    for name, others in edge.shared.items():
        gradients[name] = _with_given(outer, name, gradients[name], others)
    aliases: dict[str, str] = {}
    for name, gradient in gradients.items():
        aliases.update(update(outer, settings, name, gradient))
    outputs = (*((loss,) if loss else ()), *given, *aliases)
    outer.nodes = list(fuse_nodes(outer.nodes, outer.tensors, keep={*outputs, *whole}))
    used = _referenced(outer.nodes)
    tensors = {n: t for n, t in outer.tensors.items() if n in used or n in outer.inputs}
    return Graph(tensors, tuple(outer.nodes), tuple(outer.inputs), outputs, aliases, cotangents)


def _declare_sent(outer: Builder, tensor: Tensor, steps: int) -> Stack:
    name = sent_parts(tensor.name)
    outer.declare(
        replace(
            tensor, name=name, shape=(steps, *tensor.shape), dims=("micro", *tensor.dims),
            role="residual",
        )
    )  # fmt: skip
    return Stack(name, tensor.name)


def _with_given(outer: Builder, parameter: str, own: str, others: Sequence[int]) -> str:
    """A shared parameter's gradient: the piece's own and what the other pieces give."""
    like = outer.lookup(own)
    parts = [own]
    for giver in others:
        other = replace(like, name=given_gradient(parameter, giver), role="gradient")
        outer.inputs.append(outer.declare(other))
        parts.append(other.name)
    return add_up(outer, f"{parameter}.grad.total", parts)


def _fresh_builder(settings: Training) -> Builder:
    return Builder(settings.compute, settings.params)


def _declare_input(b: Builder, tensor: Tensor) -> None:
    b._names.add(tensor.name)
    b.inputs.append(tensor.name)
    b.declare(tensor)


def _declare_accumulated_input(outer: Builder, scope: Builder, t: Tensor, steps: int) -> None:
    """Parameters are shared by all microbatches; data inputs are stacked, one slice each."""
    if t.role == "parameter":
        _declare_input(outer, t)
        scope.shared[t.name] = None
        return
    stacked = replace(t, name=all_parts(t.name), shape=(steps, *t.shape), dims=("micro", *t.dims))
    _declare_input(outer, stacked)
    scope.declare(t)
    scope.reads.append(Stack(stacked.name, t.name))


def _close_accumulation(
    outer: Builder, scope: Builder, loss: str, gradients: Mapping[str, str], settings: Training,
    keep: Collection[str], writes: Sequence[Stack],
) -> tuple[str, dict[str, str]]:  # fmt: skip
    """Gradients (and the loss) become carried sums over the microbatches, then means."""
    carries = []
    steps, fused = settings.parts, settings.fused_accumulation
    for name in (*([loss] if loss else ()), *gradients.values()):
        # Partial sums may add up too: the reduction over devices comes after the last part.
        dtype = "f32" if name == loss else settings.gradients
        tensor = replace(scope.lookup(name), role="gradient", dtype=dtype)
        zero = outer.map(
            f"{name}.zero", [], tensor.dims, ex.c(0), dtype=dtype,
            sizes=dict(zip(tensor.dims, tensor.shape, strict=True)), attrs={"written": True},
            roles=["gradient"],
        )  # fmt: skip
        entry = scope.declare(replace(tensor, name=scope.unique(f"{name}{ADDED}")))
        value = ex.add(ex.x(0), ex.div(ex.x(1), ex.c(steps)))
        exit_ = scope.map(
            f"{name}.sum", [(entry, tensor.dims), (name, tensor.dims)], tensor.dims, value,
            dtype=dtype, attrs={"in_products": True} if fused and name != loss else None,
        )  # fmt: skip
        carries.append((zero, entry, exit_))
    carried = {n for _, entry, exit_ in carries for n in (entry, exit_)}
    left = {w.inner for w in writes}
    nodes = fuse_nodes(scope.nodes, scope.tensors, keep=carried | left | {*keep})
    scope.nodes = list(nodes)
    scope.prefix = f"{ACCUMULATE}."
    scope.writes = list(writes)
    results = list(scope.end_repeat(carries))
    loop = outer.nodes[-1]
    if isinstance(loop, Loop):
        outer.nodes[-1] = replace(loop, of_parts=True)
    for name in results:
        outer.declare(replace(outer.lookup(name), role="gradient"))
    mean = results.pop(0) if loss else ""
    return mean, dict(zip(gradients, results, strict=True))


def _referenced(nodes: Iterable[Node]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        found.update(node.ins)
        found.update(node.outs)
    return found


def _differentiate(
    b: Builder, forward: Graph, settings: Training, keep: frozenset[str],
    cotangents: dict[str, str], edge: Boundary, lean: bool,
) -> tuple[str, dict[str, str], list[str]]:  # fmt: skip
    """Emits forward and backward nodes into `b`; returns the loss ("" if it is elsewhere),
    parameter gradients, and what is sent to other pieces."""
    for name, tensor in forward.tensors.items():
        if name not in forward.inputs:
            b._names.add(name)
            b.declare(tensor)
    for body in _bodies(forward.nodes):
        b_root = b if b.parent is None else b.parent
        b_root._names.update(body.tensors)
    loss = forward.outputs[0] if edge.loss else ""
    parameters = [n for n in forward.inputs if forward.tensors[n].role == "parameter"]
    back = [n for n in edge.received if n in edge.differentiable]
    targets = [*parameters, *back]
    remat = settings.remat
    policy = frozenset(remat) if not isinstance(remat, str) else "full" if remat == AUTO else remat
    backward = Backward(
        policy, b, forward.nodes, dict.fromkeys(targets), keep, cotangents, lean,
        forward.of_parameters(),
    )
    b.phase = "backward"
    b.nodes = []
    if loss:
        backward.add(loss, b.map("loss.one", [], (), ex.c(1), dtype="f32"))
    for name in edge.sent:
        if name in edge.differentiable:
            backward.add(name, _receive_cotangent(b, name, settings.parts))
    backward.run()
    gradients = {n: backward.take(n) for n in targets}
    back_nodes = b.nodes
    b.nodes = [backward.augmented.get(node.name, node) for node in forward.nodes]
    whole = {loss, *(g for g in gradients.values() if g), *backward.kept()}
    b.nodes += fuse_nodes(back_nodes, b.tensors, keep=whole)
    sent = [*edge.sent, *(_own(b, gradients[n] or _zeros(b, n), "") for n in back)]
    return loss, {n: g for n in parameters if (g := gradients[n]) is not None}, sent


def _receive_cotangent(b: Builder, tensor: str, steps: int) -> str:
    """The cotangent of a tensor that was sent, as the loop over parts gets it."""
    like = replace(b.lookup(tensor), name=received_cotangent(tensor), role="input")
    outer = b if b.parent is None else b.parent
    _declare_accumulated_input(outer, b, like, steps)
    return like.name


def _bodies(nodes: Iterable[Node]) -> Iterable[Graph]:
    for node in nodes:
        if isinstance(node, Loop):
            yield node.body
            yield from _bodies(node.body.nodes)


@dataclass
class Backward:
    """Reverse pass over the nodes of one scope, emitting into builder `b`."""

    policy: str | frozenset[str]  # a set names what is saved
    b: Builder
    nodes: Sequence[Node]
    roots: dict[str, None]  # tensors of this scope whose gradients somebody wants
    keep: frozenset[str] = frozenset()  # tensors whose cotangents must stay tensors
    cotangents: dict[str, str] = field(default_factory=dict)  # shared by all scopes
    lean: bool = False
    weights: Collection[str] = ()  # parameters, and what is made of them alone
    parts: dict[str, list[str]] = field(default_factory=dict)
    augmented: dict[str, Loop] = field(default_factory=dict)
    differentiable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.differentiable = differentiable(self.nodes, self.roots, self.b.lookup)

    def add(self, tensor: str, cotangent: str) -> None:
        self.parts.setdefault(tensor, []).append(cotangent)

    def take(self, tensor: str) -> str | None:
        """The summed cotangent of `tensor`, or None if nothing depends on it."""
        parts = self.parts.pop(tensor, [])
        if not parts:
            return None
        self.cotangents[tensor] = add_up(self.b, f"{tensor}.grad", parts)
        return self.cotangents[tensor]

    def kept(self) -> set[str]:
        """Cotangents of the tensors to keep."""
        return {self.cotangents[t] for t in self.keep if t in self.cotangents}

    def run(self) -> None:
        for node in reversed(self.nodes):
            found = {o: self.take(o) for o in node.outs if o in self.differentiable}
            cotangents = {o: g for o, g in found.items() if g is not None}
            if not cotangents:
                continue
            if isinstance(node, Loop):
                LoopBackward(self, node, cotangents).run()
                continue
            wanted = [j for j, name in enumerate(node.ins) if name in self.differentiable]
            if self.lean:
                wanted.sort(key=lambda j: node.ins[j] not in self.weights)
            for j, name in VJPS[node.kind](self.b, node, cotangents, wanted).items():
                if j in wanted:
                    self.add(node.ins[j], name)


def differentiable(
    nodes: Sequence[Node], roots: Iterable[str], lookup: Callable[[str], Tensor]
) -> set[str]:
    """The tensors of one scope through which gradients of `roots` pass."""
    found = {root for root in roots if lookup(root).floating}
    for node in nodes:
        if found & set(node.ins) and not _stopped(node):
            found.update(o for o in node.outs if lookup(o).floating)
    return found


def _stopped(node: Node) -> bool:
    return isinstance(node, Op) and bool(node.attrs.get("stop"))


@dataclass
class LoopBackward:
    """The backward loop of one loop, and the loop itself with the stacks it must now save."""

    outer: Backward
    loop: Loop
    cotangents: Mapping[str, str]
    sources: dict[str, str] = field(default_factory=dict)  # result → whose cotangent it is

    def run(self) -> None:
        loop, outer = self.loop, self.outer
        body = loop.body
        scope = outer.b.repeat(loop.name.rpartition(".")[2] + ".bwd", loop.times)
        scope.prefix = ""
        for tensor in body.tensors.values():
            scope.declare(tensor)
        wanted_reads = [s for s in loop.reads if s.outer in outer.differentiable]
        wanted_shared = [s for s in loop.shared if s in outer.differentiable]
        roots = [k.entry for k in loop.carries] + [s.inner for s in wanted_reads] + wanted_shared
        within = "full" if outer.policy == OPEN else outer.policy
        inner = Backward(
            within, scope, body.nodes, dict.fromkeys(roots), outer.keep, outer.cotangents,
            outer.lean, outer.weights,
        )  # fmt: skip
        carries = self._seed(scope, inner)
        given = [self._written(scope, inner, s) for s in loop.writes if s.outer in self.cotangents]
        inner.run()
        self._close(scope, inner, carries, wanted_reads, wanted_shared, given)

    def _written(self, scope: Builder, inner: Backward, stack: Stack) -> Stack:
        """The cotangent of a stack that the loop has written enters slice by slice."""
        cotangent = self.cotangents[stack.outer]
        name = scope.unique(f"{stack.inner}.grad.slice")
        like = self.outer.b.lookup(cotangent)
        written = scope.lookup(stack.inner)
        scope.declare(replace(written, name=name, dtype=like.dtype, role="activation"))
        inner.add(stack.inner, name)
        return Stack(cotangent, name)

    def _seed(self, scope: Builder, inner: Backward) -> dict[str, tuple[Carry, str]]:
        """Cotangents of the carries enter the body: entry name → (carry, inner entry)."""
        entries = {}
        for carry in self.loop.carries:
            result = self.outer.b.lookup(self.cotangents.get(carry.result, carry.result))
            if not result.floating:
                continue
            name = scope.unique(f"{carry.exit}.grad.in")
            dims = scope.lookup(carry.exit).dims
            scope.declare(replace(result, name=name, dims=dims, role="activation"))
            inner.add(carry.exit, name)
            entries[carry.entry] = (carry, name)
        return entries

    def _close(
        self,
        scope: Builder,
        inner: Backward,
        carries: Mapping[str, tuple[Carry, str]],
        wanted_reads: Sequence[Stack],
        wanted_shared: Sequence[str],
        given: Sequence[Stack],
    ) -> None:
        outer = self.outer
        loop_carries: list[Carry] = []
        for entry, (forward, name) in carries.items():
            after, before = self.cotangents.get(forward.result), inner.take(entry)
            if not (after or before or forward.exit in inner.differentiable):
                continue  # a stabiliser: nothing depends on it
            init = after or _zeros(outer.b, forward.result)
            exit_ = _own(scope, before or _zeros(scope, entry), name)
            loop_carries.append(self._carry(init, name, exit_, f"{entry}.grad.out", forward.init))
        for shared in wanted_shared:
            gradient = inner.take(shared)
            if gradient is not None:
                loop_carries.append(self._accumulate(scope, shared, gradient))
        writes = []
        for stack in wanted_reads:
            gradient = inner.take(stack.inner)
            if gradient is not None:
                writes.append(self._write(scope, stack, _own(scope, gradient, "")))
        keep = {k.exit for k in loop_carries} | {w.inner for w in writes} | inner.kept()
        nodes = list(fuse_nodes(scope.nodes, scope.tensors, keep=keep))
        saved = Saved(self.loop, outer.policy, inner.augmented, outer.b, scope)
        recomputed, rename, reads, passed = saved.resolve(nodes)
        reads += given
        nodes = [rename_node(n, rename) for n in nodes]
        nodes = as_needed(recomputed, nodes) if outer.lean else recomputed + nodes
        originals = {new: old for old, new in rename.items()} | saved.open
        tensors = _tensors_of(nodes, scope, originals, reads, loop_carries)
        self._emit(nodes, tensors, loop_carries, reads, writes, passed)
        outer.augmented[self.loop.name] = saved.forward()

    def _emit(
        self,
        nodes: Sequence[Node],
        tensors: Mapping[str, Tensor],
        carries: Sequence[Carry],
        reads: Sequence[Stack],
        writes: Sequence[Stack],
        shared: Sequence[str],
    ) -> None:
        b = self.outer.b
        body = Graph(tensors, tuple(nodes))
        b.nodes.append(
            Loop(
                f"{self.loop.name}.bwd", self.loop.times, body, tuple(carries), tuple(reads),
                tuple(writes), tuple(shared), reverse=not self.loop.reverse, phase="backward",
            )
        )
        for name in shared:
            b.lookup(name)
        for result in (*(c.result for c in carries), *(w.outer for w in writes)):
            self.outer.add(self.sources[result], result)

    def _carry(self, init: str, entry: str, exit_: str, result: str, forward: str) -> Carry:
        """A carry whose outer result is the cotangent of the outer tensor `forward`."""
        b = self.outer.b
        full = b.unique(result)
        b.declare(replace(b.lookup(init), name=full))
        self.sources[full] = forward
        return Carry(init, entry, exit_, full)

    def _accumulate(self, scope: Builder, shared: str, gradient: str) -> Carry:
        """A tensor read whole by every iteration: its gradients are summed in a carry."""
        b = self.outer.b
        tensor = scope.lookup(gradient)
        summed = self.loop.of_parts
        if summed:
            tensor = replace(tensor, dtype="f32", role="gradient")
        init = _zeros(b, gradient, tensor, summed)
        entry = scope.declare(replace(tensor, name=scope.unique(f"{gradient}{ADDED}")))
        labels = tensor.dims
        added, value, attrs = _placed(scope, gradient) or ([(gradient, labels)], ex.x(1), {})
        total = scope.map(
            f"{gradient}.sum", [(entry, labels), *added], labels, ex.add(ex.x(0), value),
            dtype=tensor.dtype, attrs=attrs,
        )  # fmt: skip
        return self._carry(init, entry, total, f"{shared}.grad.out", shared)

    def _write(self, scope: Builder, stack: Stack, gradient: str) -> Stack:
        b = self.outer.b
        outer = b.lookup(stack.outer)
        name = b.unique(f"{stack.outer}.grad")
        self.sources[name] = stack.outer
        b.declare(
            Tensor(name, outer.shape, scope.lookup(gradient).dtype, outer.dims, "gradient")
        )
        return Stack(name, gradient)


def as_needed(early: Sequence[Node], nodes: Sequence[Node]) -> list[Node]:
    """`nodes` with those of `early` among them, each just before the first that depends on it;
    what none of them needs comes last."""
    maker = {o: n for n in early for o in n.outs}
    found: list[Node] = []
    placed: set[str] = set()

    def place(node: Node) -> None:
        """After what it depends on: `early` is in an order that works."""
        needed: dict[str, Node] = {}
        waiting = [node]
        while waiting:
            for name in waiting.pop().ins:
                made_by = maker.get(name)
                if made_by is not None and made_by.name not in placed | needed.keys():
                    needed[made_by.name] = made_by
                    waiting.append(made_by)
        found.extend(n for n in early if n.name in needed)
        placed.update(needed)
        found.append(node)

    for node in nodes:
        place(node)
    found.extend(n for n in early if n.name not in placed)
    return found


def _own(scope: Builder, name: str, entry: str) -> str:
    """A tensor that leaves the loop must be made in it and not be another carry's entry."""
    made = {o for node in scope.nodes for o in node.outs}
    if name in made:
        return name
    return scope.cast(name, scope.lookup(name).dtype, f"{name}.out")


def _placed(
    scope: Builder, gradient: str
) -> tuple[list[Operand], ex.Expr, dict[str, str]] | None:
    """What is to be added to a sum where `gradient` has zeros all around it: nothing of their size
    is made, the sum changes in place."""
    op = next((n for n in reversed(scope.nodes) if gradient in n.outs), None)
    if not isinstance(op, Op) or op.attrs.get("onehot") != "place":
        return None
    scope.nodes.remove(op)
    operands: list[Operand] = [
        (t, labels_of(op, d)) for t, d in zip(op.ins, op.rule.ins, strict=True)
    ]
    moved = {i: ex.x(i + 1) for i in range(len(operands))}
    value = ex.substitute(op.attrs["exprs"][0], moved)
    return operands, value, {"onehot": "add", "along": op.attrs["along"]}


def _zeros(b: Builder, like: str, tensor: Tensor | None = None, summed: bool = False) -> str:
    """`summed`: what gradients are added to, which is memory to be written."""
    t = tensor or b.lookup(like)
    sizes = dict(zip(t.dims, t.shape, strict=True))
    return b.map(
        f"{like}.zeros", [], t.dims, ex.c(0), dtype=t.dtype, sizes=sizes,
        attrs={"written": True} if summed else None, roles=["gradient"] if summed else None,
    )  # fmt: skip


def _tensors_of(
    nodes: Sequence[Node],
    scope: Builder,
    originals: Mapping[str, str],
    reads: Sequence[Stack],
    carries: Sequence[Carry],
) -> dict[str, Tensor]:
    """The tensors that the backward body itself holds; `originals` of those that are renamed."""
    names = {o for n in nodes for o in n.outs}
    names |= {s.inner for s in reads} | {k.entry for k in carries}
    found = {}
    for name in sorted(names):
        t = scope.lookup(originals.get(name, name))
        found[name] = replace(t, name=name)
    return found
