"""A pipeline as one program: all stages are a dimension of the layers' tensors.

A stack of L layers becomes p stages of L / p; their parameters and activations get a dimension
that the pipeline's axis splits. A loop over m + p - 1 ticks moves every activation on by one
stage, lets the next microbatch in at the first, and runs the layers of all stages at once; what
the last stage makes from tick p - 1 on are the results. This is GSPMD's GPipe (Xu et al. 2021,
section 3.3): bubbles are ticks in which a stage works on nothing. Outside of the loop the
microbatches are a dimension too, and the axis is free for other uses.

Several stacks, as of an encoder and a decoder, become such loops one after the other. What all
layers of a stack read (the encoder's result) moves on from stage to stage with its microbatch.

Made from a model's forward graph; everything after it is planned like any other model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from planner.graph import expr as ex
from planner.graph import structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Carry, Factor, Graph, Loop, Node, Op, Stack, Tensor
from planner.model import Model
from planner.pipelining.pieces import PipelineError
from planner.sharding.choices import bound_name

MICRO, TICK = "micro", "ticks"
# Ops that may be done for all stages at once: one more dimension is nothing to them.
STACKABLE = ("map", "reshape", "concat", "slice", "pad", "cumsum", "sort")


def stacked(model: Model, axis: str, stages: int) -> Model:
    """`model` with its layers in `stages` along mesh axis `axis`, all microbatches in one graph."""
    training = replace(
        model.training, pipeline_microbatches=1, accumulation_steps=1
    )  # the graph holds all of them
    graph = _Stacking(model, bound_name("stage", axis), stages).graph()
    return replace(model, graph=graph, workload=training, pipeline=None)


@dataclass
class _Stacking:
    model: Model
    stage: str
    stages: int
    made: dict[str, Tensor] = field(default_factory=dict)
    many: set[str] = field(default_factory=set)  # tensors that have a dimension of microbatches

    def __post_init__(self) -> None:
        self.old = self.model.graph
        self.parts = self.model.training.parts
        self.b = Builder(self.model.training.compute, self.model.training.params)
        self.b._names.update(self.old.all_tensors())

    def graph(self) -> Graph:
        loops = [node for node in self.old.nodes if isinstance(node, Loop)]
        if not loops or any(loop.times % self.stages for loop in loops):
            counts = ", ".join(f"{loop.name} {loop.times}" for loop in loops) or "no repeats"
            raise PipelineError(
                f"a pipeline in one program needs stacks of equal layers that divide into "
                f"{self.stages} stages; the model has {counts}"
            )
        times = {stack.outer: loop.times for loop in loops for stack in loop.reads}
        for name in self.old.inputs:
            self._input(self.old.tensors[name], times.get(name))
        for node in self.old.nodes:
            if isinstance(node, Loop):
                self._pipeline(node)
            else:
                self._op(node)
        loss = self.old.outputs[0]
        mean = self.b.map(
            f"{loss}.mean", [(loss, (MICRO,))], (), ex.div(ex.x(0), ex.c(self.parts)), dtype="f32"
        )
        return self.b.graph([mean])

    # ---- outside of the layers ----------------------------------------------------------------

    def _input(self, t: Tensor, layers: int | None) -> None:
        """`layers`: how many are stacked in a parameter."""
        if layers is not None:
            shape = (layers // self.stages, self.stages, *t.shape[1:])
            t = replace(t, shape=shape, dims=(t.dims[0], self.stage, *t.dims[1:]))
        elif t.role != "parameter":
            t = self._with(t, MICRO, self.parts)
            self.many.add(t.name)
        self.b.inputs.append(self.b.declare(t))

    def _op(self, op: Op) -> None:
        several = self.many.intersection(op.ins)
        outs = [self.old.tensors[o] for o in op.outs]
        if several:
            op = with_dimension(op, MICRO, self.parts, self.many)
            outs = [self._with(t, MICRO, self.parts) for t in outs]
            self.many.update(op.outs)
        self.b.emit(op, outs)

    def _with(self, t: Tensor, label: str, size: int) -> Tensor:
        return replace(t, shape=(size, *t.shape), dims=(label, *t.dims))

    # ---- the layers ---------------------------------------------------------------------------

    def _pipeline(self, loop: Loop) -> None:
        ticks = self.parts + self.stages - 1
        name = f"{loop.name}.{TICK}"
        outer = Builder(self.b.compute, self.b.param_dtype, f"{name}.", self.b, times=ticks)
        carries, reads, writes, inner = [], [], [], []
        for k in loop.carries:
            carry, read, moved = self._travelling(outer, k.init, k.result)
            after = outer.declare(replace(outer.lookup(moved), name=f"{k.result}.after"))
            inner.append(Carry(moved, k.entry, k.exit, after))
            carries.append(replace(carry, exit=after))
            reads.append(read)
            state = outer.lookup(after)
            every = replace(
                state, name=f"{k.result}.ticks", shape=(ticks, *state.shape),
                dims=(TICK, *state.dims),
            )  # fmt: skip
            writes.append(Stack(self.b.declare(every), after))
        along = {}
        for shared in loop.shared:
            if shared in self.many:
                own = f"{loop.name}.{shared}"
                carry, read, along[shared] = self._travelling(outer, shared, own)
                carries.append(carry)
                reads.append(read)
        whole = tuple(along.get(shared, shared) for shared in loop.shared)
        layers = replace(
            loop, times=loop.times // self.stages, carries=tuple(inner),
            body=self._body(loop, along), shared=whole,
        )  # fmt: skip
        body = Graph(outer.tensors, (*outer.nodes, layers))
        passed = (*(s.outer for s in loop.reads), *(s for s in whole if s not in outer.tensors))
        self.b.nodes.append(
            Loop(
                name, ticks, body, tuple(carries), tuple(reads), tuple(writes),
                tuple(dict.fromkeys(passed)), of_parts=True,
            )
        )  # fmt: skip
        for k, stack in zip(loop.carries, writes, strict=True):
            self._results(k, stack.outer)

    def _travelling(self, outer: Builder, value: str, name: str) -> tuple[Carry, Stack, str]:
        """`value` of every microbatch, on its way through the stages: what is carried from tick
        to tick, the next microbatch's, and what the stages read in a tick."""
        fed = structural.pad(
            self.b, value, MICRO, 0, self.stages - 1, label=TICK, name=f"{name}.fed"
        )
        state = replace(
            self._with(self.old.tensors[value], self.stage, self.stages), role="activation"
        )
        zero = self._zeros(f"{name}.start", state)
        before = outer.declare(replace(state, name=f"{name}.before"))
        now = outer.declare(replace(self.old.tensors[value], name=f"{name}.now"))
        moved = self._moved(outer, before, now)
        last = self.b.declare(replace(state, name=f"{name}.end"))
        return Carry(zero, before, moved, last), Stack(fed, now), moved

    def _zeros(self, name: str, like: Tensor) -> str:
        sizes = dict(zip(like.dims, like.shape, strict=True))
        return self.b.map(
            name, [], like.dims, ex.c(0), dtype=like.dtype, sizes=sizes, attrs={"written": True}
        )

    def _moved(self, outer: Builder, state: str, now: str) -> str:
        """Everything one stage on, the next microbatch at the first."""
        moved = windows.shift(outer, state, self.stage, 1, f"{state}.moved")
        dims = outer.lookup(state).dims
        first = ex.call("eq", ex.index(self.stage), ex.c(0))
        value = ex.call("where", first, ex.x(1), ex.x(0))
        return outer.map(
            f"{state}.in", [(moved, dims), (now, dims[1:])], dims, value,
            dtype=outer.lookup(state).dtype,
        )

    def _body(self, loop: Loop, along: Mapping[str, str]) -> Graph:
        """One layer of every stage; `along`: what is read whole, by its name of a tick."""
        several = {k.entry for k in loop.carries} | {s.inner for s in loop.reads}
        several.update(along.values())
        nodes: list[Node] = []
        for node in loop.body.nodes:
            if isinstance(node, Loop):
                raise PipelineError("in a pipeline of one program, layers hold no repeats")
            node = replace(node, ins=tuple(along.get(name, name) for name in node.ins))
            if several.intersection(node.ins):
                node = with_dimension(node, self.stage, self.stages, several)
                several.update(node.outs)
            nodes.append(node)
        tensors = {
            name: self._with(t, self.stage, self.stages) if name in several else t
            for name, t in loop.body.tensors.items()
        }
        return Graph(tensors, tuple(nodes))

    def _results(self, k: Carry, every: str) -> None:
        """What the last stage has made of every microbatch."""
        result = self.old.tensors[k.result]
        whole = structural.slice_dim(
            self.b, every, TICK, self.stages - 1, self.stages - 1 + self.parts, label=MICRO,
            name=f"{k.result}.late",
        )
        is_last = ex.call("eq", ex.index(self.stage), ex.c(self.stages - 1))
        dims = (MICRO, self.stage, *result.dims)
        self.many.add(k.result)
        self.b._names.discard(k.result)  # it is this tensor's own name
        self.b.map(
            k.result, [(whole, dims)], (MICRO, *result.dims), ex.mul(is_last, ex.x(0)),
            dtype=result.dtype,
        )


def with_dimension(op: Op, label: str, size: int, several: Iterable[str]) -> Op:
    """`op` done `size` times at once: a new leading dimension of its results and of those of
    its operands that are in `several`."""
    names = set(several)
    looked_up = "onehot" in op.attrs and op.ins[0] in names  # of tables there is only one
    if op.kind not in STACKABLE or looked_up:
        raise PipelineError(f"op '{op.name}' ({op.kind}) cannot be stacked for a pipeline")
    number = len(op.rule.factors)
    factors = (*op.rule.factors, Factor(label, size))
    ins = tuple(
        ((number,), *dims) if name in names else dims
        for name, dims in zip(op.ins, op.rule.ins, strict=True)
    )
    outs = tuple(((number,), *dims) for dims in op.rule.outs)
    attrs = dict(op.attrs)
    if "axis" in attrs:
        attrs["axis"] += 1
    if "visits" in attrs:
        attrs["visits"] = (*attrs["visits"], number)
    return replace(op, rule=replace(op.rule, factors=factors, ins=ins, outs=outs), attrs=attrs)
