"""The SPMD partitioner: Graph + Plan → the Program of one device.

Walks the flow of the graph in schedule order; every conversion becomes the collectives of its
resharding path, every op its local kernel. The result is what the three readings look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from costmodels.program import (
    ITEM_BYTES,
    Block,
    Buffer,
    CarryBuffers,
    Collective,
    Compute,
    Instruction,
    LoopStep,
    Program,
    StackBuffers,
    Step,
)
from planner.graph.core import Graph, Loop, Node, Op, Stack
from planner.lowering.halo import Halo, halos
from planner.lowering.inside import OPERAND
from planner.lowering.lower_op import lower_op
from planner.plan import Plan
from planner.sharding.flow import Conversion, Flow, Place
from planner.sharding.reshard import FREE, Resharder, payload_elements
from planner.sharding.spec import Spec


def lower(flow: Flow, plan: Plan, resharder: Resharder) -> Program:
    """The per-device program of `plan`; ValueError if a conversion is impossible."""
    return _Lowering(flow, plan, resharder).program()


@dataclass
class _Lowering:
    flow: Flow
    plan: Plan
    resharder: Resharder
    buffers: dict[int, Buffer] = field(default_factory=dict)
    at_home: dict[tuple[int, int], int] = field(default_factory=dict)  # (home, lead) → buffer
    values: dict[str, int] = field(default_factory=dict)  # raw op results
    # what the body of the innermost open loop hands on: (kind, tensor, home) → buffer
    leaving: dict[tuple[str, str, int], int] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)  # accumulated gradient → the carried one

    def __post_init__(self) -> None:
        self.sizes = self.plan.sizes
        self.order = [a for a, _ in self.plan.axes]
        self.homes = [self.plan.homes[home.tensor] for home in self.flow.homes]
        self.tensors = self.flow.graph.all_tensors()
        self.by_step: dict[int, list[Conversion]] = {}
        for conversion in self.flow.conversions:
            self.by_step.setdefault(conversion.at, []).append(conversion)

    # ---- specs and buffers -------------------------------------------------------------

    def spec(self, place: Place) -> Spec:
        if place.kind == "home":
            spec = self.homes[place.home]
            return Spec(spec.dims[place.lead :], spec.partial)
        op = self.flow.sites[place.op].op
        choice = self.plan.choices[op.origin or op.name]
        if place.kind == "operand":
            return choice.operand(op.rule, place.slot)
        return choice.result(op.rule, place.slot, self.order)

    def buffer(
        self, tensor: str, shape: Sequence[int], dtype: str, spec: Spec, category: str,
        alias: int | None = None,
    ) -> int:  # fmt: skip
        local = spec.local_shape(shape, self.sizes)
        return self.local_buffer(tensor, local, dtype, category, alias)

    def local_buffer(
        self, tensor: str, shape: Sequence[int], dtype: str, category: str,
        alias: int | None = None,
    ) -> int:  # fmt: skip
        number = len(self.buffers)
        self.buffers[number] = Buffer(number, tuple(shape), dtype, category, tensor, alias)
        return number

    def home_buffer(self, home_id: int) -> int:
        home = self.flow.homes[home_id]
        return self.buffer(
            home.tensor, home.shape, home.dtype, self.homes[home_id], home.category
        )

    # ---- program ------------------------------------------------------------------------

    def program(self) -> Program:
        graph = self.flow.graph
        inputs = {}
        for name in graph.inputs:
            home, _ = self.flow.home_of[name]
            inputs[name] = self.at_home[home, 0] = self.home_buffer(home)
        self.outputs: dict[str, int] = {}
        block = self.block(graph)
        program = Program(self.plan.axes, self.buffers, block, inputs, self.outputs)
        return replace(program, remade=_never_stored(program))

    def block(self, graph: Graph) -> Block:
        return tuple(step for n in graph.nodes for step in self.node(n))

    def node(self, node: Node) -> tuple[Step | LoopStep, ...]:
        if isinstance(node, Op):
            return (self.op_step(node),)
        return self.loop_step(node), self.leave_step(node)

    def op_step(self, op: Op) -> Step:
        site = self.flow.sites[op.name]
        here = self.by_step.get(site.step, [])
        out: list[Instruction] = []
        operands = [-1] * len(op.ins)
        for c in (c for c in here if c.kind == "copy"):
            self.at_home[c.target.home, 0] = self.convert(c, self.read(c.source), out)
        for c in (c for c in here if c.kind == "use" and c.target.op == op.name):
            operands[c.target.slot] = self.convert(c, self.read(c.source), out)
        choice = self.plan.choices[op.origin or op.name]
        for halo in halos(op, choice, self.tensors, self.sizes):
            operands[halo.read.slot] = self.exchange(op, halo, operands[halo.read.slot], out)
        kernel = lower_op(op, choice, self.tensors, self.sizes)
        results = [self.result_buffer(op, k) for k in range(len(op.outs))]
        out.append(Compute(kernel, tuple(operands), tuple(results), op.phase))
        self.values.update(zip(op.outs, results, strict=True))
        self.hand_on_all(here, out)
        return Step(op.name, tuple(out))

    def exchange(self, op: Op, halo: Halo, source: int, out: list[Instruction]) -> int:
        """Edges of the neighbours' blocks around the block in `source`."""
        name, axes, dim = op.ins[halo.read.slot], halo.read.axes, halo.read.dim
        dtype = self.buffers[source].dtype
        parts = [source] if halo.kernel is not None else []
        for shift, shape in ((1, halo.low), (-1, halo.high)):
            if shape is None:
                continue
            piece = self.local_buffer(name, shape, dtype, "collective_buffers")
            size = self.buffers[piece].bytes
            out.append(
                Collective("collective-permute", axes, source, piece, size, dim, order=axes,
                           tensor=name, phase=op.phase, shift=shift, width=shape[dim],
                           wrap=halo.read.wrap)
            )  # fmt: skip
            parts.insert(0 if shift > 0 else len(parts), piece)
        if halo.kernel is None:
            return parts[0]
        result = self.local_buffer(name, halo.result, dtype, "temporaries")
        out.append(Compute(halo.kernel, tuple(parts), (result,), op.phase))
        return result

    def leave_step(self, loop: Loop) -> Step:
        """After a loop: what becomes of its results at once."""
        out: list[Instruction] = []
        self.hand_on_all(self.by_step.get(self.flow.loops[loop.name].stop, []), out)
        return Step(f"{loop.name}.leave", tuple(out))

    def hand_on_all(self, here: Sequence[Conversion], out: list[Instruction]) -> None:
        made = (c for c in here if c.kind not in ("copy", "use", "carry", "shared"))
        for c in sorted(made, key=lambda c: c.kind != "home"):
            self.hand_on(c, out)

    def result_buffer(self, op: Op, k: int) -> int:
        name = op.outs[k]
        t = self.tensors[name]
        spec = self.spec(Place("result", op.name, k))
        home = self.flow.home_of.get(name)
        stays = home is None or self.homes[home[0]] == spec
        alias = self.donated(name, spec) if stays else None
        if alias is None and name in self.sums:
            alias = self._sum_before(name, spec)
        return self.buffer(name, t.shape, t.dtype, spec, self.category(name), alias)

    def _sum_before(self, name: str, spec: Spec) -> int | None:
        """The carried gradient that the sum `name` is written over, if it lies like it."""
        home = self.flow.home_of[self.sums[name]][0]
        return self.at_home[home, 0] if self.homes[home] == spec else None

    def donated(self, name: str, spec: Spec) -> int | None:
        """The input's buffer that the new value `name` takes over if it lies there as `spec`."""
        old = self.flow.graph.aliases.get(name)
        if old is None or self.homes[self.flow.home_of[old][0]] != spec:
            return None
        return self.at_home[self.flow.home_of[old]]

    def category(self, name: str) -> str:
        role = self.tensors[name].role
        if role == "gradient":
            return "gradients"
        if role in ("parameter", "state", "cache", "copy"):
            return "temporaries"
        if name.endswith(".grad") or ".grad_" in name:
            return "temporaries"
        return "activations" if name in self.flow.graph.tensors else "temporaries"

    def hand_on(self, c: Conversion, out: list[Instruction]) -> None:
        """After an op: its result goes home, to a carry, a stack, an alias or the outputs."""
        result = self.convert(c, self.read(c.source), out)
        if c.kind == "home":
            self.at_home[c.target.home, 0] = result
        elif c.kind in ("alias", "output"):
            self.outputs[c.tensor] = result
        else:  # the loop that is being lowered picks it up
            self.leaving[c.kind, c.tensor, c.target.home] = result

    def read(self, place: Place) -> int:
        if place.kind == "home":
            return self.at_home[place.home, place.lead]
        op = self.flow.sites[place.op].op
        return self.values[op.outs[place.slot]]

    def convert(self, c: Conversion, source: int, out: list[Instruction]) -> int:
        """Appends the collectives of `c`; returns the buffer that holds the target."""
        spec, target = self.spec(c.source), self.spec(c.target)
        path = self.resharder.path(spec, target, c.shape, ITEM_BYTES[c.dtype], c.reduce)
        if path is None:
            raise ValueError(f"no way to reshard '{c.tensor}' from {spec} to {target}")
        for i, move in enumerate(path):
            last = i == len(path) - 1 and c.kind in ("home", "alias")
            alias = self.donated(c.tensor, move.result) if last else None
            category = "temporaries" if move.kind in FREE else "collective_buffers"
            result = self.buffer(c.tensor, c.shape, c.dtype, move.result, category, alias)
            payload = payload_elements(move, spec, c.shape, self.sizes) * ITEM_BYTES[c.dtype]
            moved = Collective(
                move.kind, move.axes, source, result, payload, move.dim, move.to_dim,
                move.order, c.reduce, c.tensor, c.phase,
            )  # fmt: skip
            out.append(moved)
            source, spec = result, move.result
        return source

    # ---- loops ---------------------------------------------------------------------------

    def loop_step(self, loop: Loop) -> LoopStep:
        site = self.flow.loops[loop.name]
        enter: list[Instruction] = []
        inits: dict[int, int] = {}
        here = self.by_step.get(site.enter, [])
        copies = set(site.copies.values())
        carried = {self.flow.home_of[k.entry][0] for k in loop.carries}
        for c in here:
            if c.target.home in copies:
                self.at_home[c.target.home, 0] = self.convert(c, self.read(c.source), enter)
            elif c.target.home in carried:
                inits[c.target.home] = self.convert(c, self.read(c.source), enter)
        self.hand_on_all(here, enter)
        reads, writes = self._stacks(loop)
        entries = {}
        for k in loop.carries:
            home = self.flow.home_of[k.entry][0]
            entries[home] = self.at_home[home, 0] = self.home_buffer(home)
            if self.flow.homes[home].category == "gradients":
                self.sums[k.exit] = k.entry
        outer_leaving, self.leaving = self.leaving, {}
        body = self.block(loop.body)
        carries = []
        for k in loop.carries:
            home = self.flow.home_of[k.entry][0]
            exit_ = self.leaving["exit", k.exit, home]
            result = self.home_buffer(home)
            carries.append(CarryBuffers(inits[home], entries[home], exit_, result))
            self.at_home[home, 0] = result
        written = tuple(
            StackBuffers(outer, self.leaving["write", s.inner, self.flow.home_of[s.outer][0]])
            for s, outer in writes
        )
        self.leaving = outer_leaving
        return LoopStep(
            loop.name, loop.times, Step(f"{loop.name}.enter", tuple(enter)), body,
            tuple(carries), reads, written, loop.reverse,
        )  # fmt: skip

    def _stacks(self, loop: Loop) -> tuple[tuple[StackBuffers, ...], list[tuple[Stack, int]]]:
        reads = []
        for s in loop.reads:
            home, lead = self.flow.home_of[s.inner]
            outer = self.at_home[home, lead - 1]
            inner = self.slice_buffer(s.inner, home, lead, outer)
            self.at_home[home, lead] = inner
            reads.append(StackBuffers(outer, inner))
        writes: list[tuple[Stack, int]] = []
        for s in loop.writes:
            home, lead = self.flow.home_of[s.outer]
            if (home, lead) not in self.at_home:
                self.at_home[home, lead] = self.home_buffer(home)
            writes.append((s, self.at_home[home, lead]))
        return tuple(reads), writes

    def slice_buffer(self, name: str, home: int, lead: int, outer: int) -> int:
        """One slice of a stack: a view, it takes no memory of its own."""
        spec = self.homes[home]
        t = self.tensors[name]
        return self.buffer(
            name, t.shape, t.dtype, Spec(spec.dims[lead:]), "temporaries", alias=outer
        )


def _never_stored(program: Program) -> dict[int, tuple[int, ...]]:
    """What products compute inside, unless it is moved first, and what of."""
    moved = {i.source for i, _ in program.instructions() if isinstance(i, Collective)}
    return {
        i.outs[0]: i.ins for i, _ in program.instructions()
        if isinstance(i, Compute) and i.outs[0] not in moved
        and isinstance(i.kernel.payload, Op) and i.kernel.payload.attrs.get("inside") == OPERAND
    }  # fmt: skip


def resolve_specs(flow: Flow, plan: Plan, resharder: Resharder) -> Mapping[str, Spec]:
    """The spec in which every tensor of the graph is materialised."""
    lowering = _Lowering(flow, plan, resharder)
    found: dict[str, Spec] = {}
    for name, (home, lead) in flow.home_of.items():
        spec = lowering.homes[home]
        found[name] = Spec(spec.dims[lead:], spec.partial)
    for site in flow.sites.values():
        for k, out in enumerate(site.op.outs):
            found.setdefault(out, lowering.spec(Place("result", site.op.name, k)))
    return found
