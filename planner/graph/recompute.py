"""What a loop body saves for its backward body, and what that computes again.

What the remat policy does not save is recomputed in the backward body by copies of the forward
ops (`origin` names the op they repeat). Differentiation is in `derive.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.graph import expr as ex
from planner.graph.builder import Builder, contraction_sizes
from planner.graph.core import Carry, Graph, Loop, Node, Op, Stack, Tensor
from planner.model import RECOMPUTES_ALL

AGAIN = "~"  # suffix of a recomputed tensor
SAVED = ".saved"  # ends the names of stacks of values that a loop saves for its backward pass
OPEN = "open"  # policy of a graph that keeps both: what is saved is for a solver to choose
KEPT, REDONE = "~kept", "~redone"  # suffixes of the two values between which it chooses
CHOOSES = "chooses"  # attribute of the op that stands for the choice


@dataclass
class Saved:
    """Decides which forward tensors of a loop body are stacked for the backward body."""

    loop: Loop
    policy: str | frozenset[str]
    augmented: Mapping[str, Loop]  # inner loops with the stacks that their backward loops read
    outer: Builder
    scope: Builder
    writes: list[Stack] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)  # kept and redone values → the original

    def resolve(
        self, nodes: Sequence[Node]
    ) -> tuple[list[Node], dict[str, str], list[Stack], list[str]]:
        """(recomputed nodes, renamings, stacks read, outer tensors shared) of the body."""
        body = self.loop.body
        producers = {o: n for n in body.nodes for o in self._augmented(n).outs}
        entries = {k.entry for k in self.loop.carries}
        slices = {s.inner: s for s in self.loop.reads}
        cheap = self._parameter_only(slices)
        made = {o for n in nodes for o in n.outs}
        pending = [i for n in nodes for i in n.ins if i not in made]
        if self.policy == "checkpoint":  # even what the backward pass does not need
            pending += [k.exit for k in self.loop.carries]
        needed: set[str] = set()
        reads: dict[str, Stack] = {}
        rename: dict[str, str] = {}
        shared: dict[str, None] = {}
        again: dict[str, Node] = {}
        while pending:
            name = pending.pop()
            if name in needed:
                continue
            needed.add(name)
            if name in slices:
                rename[name] = name + AGAIN
                reads[name] = Stack(slices[name].outer, name + AGAIN)
            elif name in entries or self._saves(name, producers.get(name), cheap):
                rename[name] = name + AGAIN
                reads[name] = Stack(self._stack(name), name + AGAIN)
            elif name in producers:
                maker = producers[name]
                again[maker.name] = maker
                pending.extend(self._augmented(maker).ins)
                if self.policy == OPEN and isinstance(maker, Op) and name not in cheap:
                    reads[name] = Stack(self._stack(name), name + KEPT)
            elif name not in self.scope.tensors or name in self.loop.shared:
                shared[name] = None
        ordered = [n for n in body.nodes if n.name in again]
        for node in ordered:
            rename.update({o: o + AGAIN for o in self._augmented(node).outs})
        copies: list[Node] = []
        for node in ordered:
            copy = _recompute(self._augmented(node), rename)
            chosen = [o for o in node.outs if reads.get(o) == Stack(o + SAVED, o + KEPT)]
            copies.append(self._redone(copy, chosen) if chosen else copy)
            copies += [self._choice(name) for name in chosen]
        return copies, rename, list(reads.values()), list(shared)

    def _redone(self, copy: Node, chosen: Sequence[str]) -> Node:
        """`copy` under names that leave those of the values to the ops that choose."""
        outs = {name + AGAIN: name + REDONE for name in chosen}
        self.open.update({name + REDONE: name for name in chosen})
        return rename_node(copy, outs)

    def _choice(self, name: str) -> Op:
        """Stands for `name` in the backward body: either what was kept or what is computed again.
        Its expression is a sum only because partial sums pass through one."""
        t = self.scope.lookup(name)
        self.open[name + KEPT] = name
        for suffix in (KEPT, REDONE):
            self.scope.declare(replace(t, name=name + suffix))
        made = self.scope.map(
            name + AGAIN, [(name + KEPT, t.dims), (name + REDONE, t.dims)], t.dims,
            ex.add(ex.x(0), ex.x(1)), dtype=t.dtype, attrs={CHOOSES: True},
        )  # fmt: skip
        op = self.scope.nodes.pop()
        assert isinstance(op, Op)
        assert made == name + AGAIN
        return replace(op, phase="recompute")

    def _augmented(self, node: Node) -> Node:
        """An inner loop with the stacks that its own backward loop reads; ops as they are."""
        return self.augmented.get(node.name, node)

    def forward(self) -> Loop:
        """The loop with all stacks saved; inner loops hand theirs on, to be stacked again."""
        body = self.loop.body
        inner = {s.inner for s in self.writes} - set(body.tensors)
        if inner:
            tensors = {**body.tensors, **{n: self.scope.lookup(n) for n in inner}}
            nodes = tuple(self._augmented(n) for n in body.nodes)
            body = replace(body, tensors=tensors, nodes=nodes)
        return replace(self.loop, body=body, writes=(*self.loop.writes, *self.writes))

    def _parameter_only(self, slices: Mapping[str, Stack]) -> set[str]:
        """Tensors computed from parameters alone: recomputing them costs no activations."""
        found = set(slices) | set(self.loop.shared)
        found = {n for n in found if self.scope.lookup(n).role == "parameter"}
        for node in self.loop.body.nodes:
            if node.ins and all(i in found for i in node.ins):
                found.update(node.outs)
            found.update(o for o in node.outs if self.scope.lookup(o).role == "parameter")
        return found

    def _saves(self, name: str, producer: Node | None, cheap: set[str]) -> bool:
        if producer is None:
            return False
        policy = self.policy
        if not isinstance(policy, str):
            return name in policy
        if set(producer.outs) <= cheap:
            return False
        if policy == "none":
            return True
        if self.loop.of_parts:
            return True  # parts of the batch recompute layer by layer
        if isinstance(producer, Loop):
            # What an inner loop saves or results in is not redone.
            return policy not in RECOMPUTES_ALL
        if policy == "dots":
            return contraction_sizes(producer) is not None and any(i in cheap for i in producer.ins)
        if policy == "attention":
            return not _attention_core(producer)
        return False

    def _stack(self, name: str) -> str:
        """The stacked outer copy of a body tensor, declared on first use."""
        t = self.scope.lookup(name)
        stack = name + SAVED
        if stack not in self.outer.tensors:
            shape = (self.loop.times, *t.shape)
            dim = "repeats" if "layers" in t.dims else "layers"
            self.outer.declare(Tensor(stack, shape, t.dtype, (dim, *t.dims), "residual"))
            self.writes.append(Stack(stack, name))
        return stack


def _attention_core(op: Op) -> bool:
    """Scores, softmax pieces and probabilities: what has both query and key positions."""
    names = {f.name for f in op.rule.factors}
    return {"S", "T"} <= names and not (
        contraction_sizes(op) is not None and "T" not in op.attrs.get("kept", ("T",))
    )


def _recompute(node: Node, rename: Mapping[str, str], depth: int = 1) -> Node:
    """A copy of `node`, which lies `depth` - 1 loops inside what is recomputed."""
    copy = rename_node(node, rename)
    if isinstance(copy, Op):
        return replace(copy, phase="recompute", origin=node.name)
    return _recompute_loop(replace(copy, name=node.name + AGAIN * depth), depth + 1)


def _recompute_loop(loop: Loop, depth: int) -> Loop:
    """Every name inside a recomputed inner loop gets a suffix of its own: the inner loop's
    backward body holds copies with a shorter one."""
    own = {n: n + AGAIN * depth for n in loop.body.tensors}
    nodes = tuple(_recompute(n, own, depth) for n in loop.body.nodes)
    tensors = {own[n]: replace(t, name=own[n]) for n, t in loop.body.tensors.items()}
    return replace(
        loop, body=Graph(tensors, nodes), phase="recompute",
        carries=tuple(Carry(k.init, own[k.entry], own[k.exit], k.result) for k in loop.carries),
        reads=tuple(Stack(s.outer, own[s.inner]) for s in loop.reads),
        writes=tuple(Stack(s.outer, own[s.inner]) for s in loop.writes),
    )  # fmt: skip


def rename_node(node: Node, names: Mapping[str, str]) -> Node:
    """`node` with its tensor names (and so its own name) replaced."""

    def new(name: str) -> str:
        return names.get(name, name)

    if isinstance(node, Op):
        outs = tuple(new(o) for o in node.outs)
        name = outs[0] if node.outs[0] in names else node.name
        return replace(node, name=name, ins=tuple(new(i) for i in node.ins), outs=outs)
    passed = {s: names[s] for s in node.shared if s in names}  # the body reads it by this name
    nodes = tuple(rename_node(n, passed) for n in node.body.nodes) if passed else node.body.nodes
    return replace(
        node,
        body=replace(node.body, nodes=nodes),
        name=node.name + (AGAIN if any(o in names for o in node.outs) else ""),
        carries=tuple(
            Carry(new(k.init), k.entry, k.exit, new(k.result)) for k in node.carries
        ),
        reads=tuple(Stack(new(s.outer), s.inner) for s in node.reads),
        writes=tuple(Stack(new(s.outer), s.inner) for s in node.writes),
        shared=tuple(new(s) for s in node.shared),
    )
