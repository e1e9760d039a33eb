"""A pipeline as one program: all stages are a dimension of the layers' tensors.

A stack of L layers becomes p stages of L / p; their parameters and activations get a dimension
that the pipeline's axis splits. A loop over m + p - 1 ticks moves every activation on by one
stage, lets the next microbatch in at the first, and runs the layers of all stages at once; what
the last stage makes from tick p - 1 on are the results. This is GSPMD's GPipe (Xu et al. 2021,
section 3.3): bubbles are ticks in which a stage works on nothing. Outside of the loop the
microbatches are a dimension too, and the axis is free for other uses.

In a circular pipeline a device has v runs of layers, L / (v p) each, and microbatches go round v
times: round r of stage s is run r p + s. What leaves the last stage waits in a buffer of m slots,
from which the first stage takes it m ticks after it took it last; inputs wait there before their
first round, results after their last. In tick t stage s is in round (t - s) div m, so parameters
are chosen by stage in every tick, and there are m v + p - 1 ticks.

Several stacks, as of an encoder and a decoder, become such loops one after the other. What all
layers of a stack read (the encoder's result) moves on from stage to stage with its microbatch.

Made from a model's forward graph; everything after it is planned like any other model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from planner.graph import expr as ex
from planner.graph import layers, structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Carry, Factor, Graph, Loop, Node, Op, Stack, Tensor
from planner.model import Model
from planner.pipelining.pieces import PipelineError
from planner.sharding.choices import bound_name

MICRO, TICK, ROUND = "micro", "ticks", "repeats"
# Ops that may be done for all stages at once: one more dimension is nothing to them.
STACKABLE = ("map", "reshape", "concat", "slice", "pad", "cumsum", "sort")


def stacked(model: Model, axis: str, stages: int, rounds: int = 1) -> Model:
    """`model` with its layers in `stages` along mesh axis `axis`, through which each of the
    microbatches, all in one graph, goes `rounds` times."""
    training = replace(
        model.training, pipeline_microbatches=1, accumulation_steps=1
    )  # the graph holds all of them
    graph = _Stacking(model, bound_name("stage", axis), stages, rounds).graph()
    return replace(model, graph=graph, workload=training, pipeline=None)


@dataclass
class _Stacking:
    model: Model
    stage: str
    stages: int
    rounds: int
    many: set[str] = field(default_factory=set)  # tensors that have a dimension of microbatches

    def __post_init__(self) -> None:
        self.old = self.model.graph
        self.parts = self.model.training.parts
        self.b = Builder(self.model.training.compute, self.model.training.params)
        self.b._names.update(self.old.all_tensors())

    def graph(self) -> Graph:
        loops = [node for node in self.old.nodes if isinstance(node, Loop)]
        if not loops or any(loop.times % (self.rounds * self.stages) for loop in loops):
            counts = ", ".join(f"{loop.name} {loop.times}" for loop in loops) or "no repeats"
            of = f"{self.rounds} × " if self.rounds > 1 else ""
            raise PipelineError(
                f"a pipeline in one program needs stacks of equal layers that divide into "
                f"{of}{self.stages} stages; the model has {counts}"
            )
        if self.rounds > 1 and self.parts < self.stages:
            raise PipelineError(
                f"{self.parts} microbatches come back to the first of {self.stages} stages before "
                "it has let all of them in: a circular pipeline in one program has at least as "
                "many microbatches as stages",
                f"raise training.pipeline_microbatches to {self.stages} or more",
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
            rounds = (self.rounds,) if self.rounds > 1 else ()
            each = layers // (self.rounds * self.stages)
            t = replace(
                t, shape=(*rounds, each, self.stages, *t.shape[1:]),
                dims=(*(ROUND for _ in rounds), t.dims[0], self.stage, *t.dims[1:]),
            )  # fmt: skip
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
        ticks = self.parts * self.rounds + self.stages - 1
        outer = Builder(
            self.b.compute, self.b.param_dtype, f"{loop.name}.{TICK}.", self.b, times=ticks
        )
        from_slot, to_slot = self._slots(outer, loop.name)
        inner, going = [], []
        for k in loop.carries:
            now, on_its_way = self._enters(outer, k.init, k.result, from_slot)
            after = outer.declare(replace(outer.lookup(now), name=f"{k.result}.after"))
            inner.append(Carry(now, k.entry, k.exit, after))
            going.append((on_its_way, after))
        along = {}
        for shared in loop.shared:
            if shared in self.many:
                own = f"{loop.name}.{shared}"
                along[shared], on_its_way = self._enters(outer, shared, own, from_slot)
                going.append((on_its_way, along[shared]))
        whole = tuple(along.get(shared, shared) for shared in loop.shared)
        reads = self._chosen(outer, loop)
        outer.nodes.append(
            replace(
                loop, times=loop.times // (self.rounds * self.stages), carries=tuple(inner),
                reads=reads, body=self._body(loop, along), shared=whole,
            )
        )  # fmt: skip
        carries = [k for way, made in going for k in self._leaves(outer, way, made, to_slot)]
        passed = (*(s.outer for s in loop.reads), *(s for s in whole if s not in outer.tensors))
        self.b.nodes.append(
            Loop(
                f"{loop.name}.{TICK}", ticks, Graph(outer.tensors, tuple(outer.nodes)),
                tuple(carries), tuple(outer.reads), (), tuple(dict.fromkeys(passed)),
                of_parts=True,
            )
        )  # fmt: skip
        for k, (way, _) in zip(loop.carries, going, strict=False):
            self._results(k, way)

    def _slots(self, outer: Builder, name: str) -> tuple[str, str]:
        """In which slot the first stage finds the microbatch that it works on in a tick, and in
        which one that leaves the last stage waits.

        Stages that have nothing yet, or nothing more, to do move something, too: it is put where a
        microbatch has just been taken from, and taken from where the last one will come to.
        """
        m, tick = self.parts, ex.index(TICK)
        last = ex.c(m - 1)
        over = ex.call("ge", tick, ex.c(m * self.rounds))
        enters = ex.call("where", over, last, _modulo(tick, m))
        through = ex.c(self.stages - 1)
        leaves = ex.call(
            "where", ex.call("ge", tick, through), _modulo(ex.sub(tick, through), m),
            ex.call("min", tick, last),
        )  # fmt: skip
        return self._known(outer, f"{name}.enters", enters), self._known(
            outer, f"{name}.leaves", leaves
        )

    def _known(self, outer: Builder, name: str, value: ex.Expr) -> str:
        """What a loop knows of each tick: a whole number."""
        table = self.b.map(
            f"{name}.all", [], (TICK,), value, dtype="i32", sizes={TICK: outer.times}
        )
        outer.reads.append(Stack(table, outer.declare(Tensor(name, (), "i32", ()))))
        return name

    def _chosen(self, outer: Builder, loop: Loop) -> tuple[Stack, ...]:
        """The layers' parameters, of the round that each stage is in."""
        if self.rounds == 1:
            return loop.reads
        tick = self._known(outer, f"{loop.name}.tick", ex.index(TICK))
        return tuple(
            replace(
                s, outer=layers.chosen_round(
                    outer, s.outer, tick, self.stage, self.parts, f"{s.outer}.now"
                ),
            )
            for s in loop.reads
        )  # fmt: skip

    def _enters(
        self, outer: Builder, value: str, name: str, slot: str
    ) -> tuple[str, tuple[Carry, Carry]]:
        """`value` of every microbatch on its way through the stages: what these have in a tick,
        and what is carried from tick to tick (without exits): that, and what waits."""
        like = replace(self.old.tensors[value], role="activation")
        state = self._with(like, self.stage, self.stages)
        first = ex.call("eq", ex.index(self.stage), ex.c(0))
        dims = (MICRO, *state.dims)
        start = self.b.map(
            f"{name}.start", [], state.dims, ex.c(0), dtype=state.dtype,
            sizes=dict(zip(state.dims, state.shape, strict=True)), attrs={"written": True},
        )  # fmt: skip
        waiting = self.b.map(
            f"{name}.waiting", [(value, (MICRO, *like.dims))], dims, ex.mul(first, ex.x(0)),
            dtype=state.dtype, sizes={self.stage: self.stages},
        )  # fmt: skip
        before = outer.declare(replace(state, name=f"{name}.before"))
        held = outer.declare(replace(self.b.lookup(waiting), name=f"{name}.held"))
        row, rest = structural.pop(outer, held, slot, f"{name}.next", f"{name}.rest")
        now = outer.map(
            f"{name}.now", [(before, state.dims), (row, state.dims)], state.dims,
            ex.call("where", first, ex.x(1), ex.x(0)), dtype=state.dtype,
        )  # fmt: skip
        end = self.b.declare(replace(state, name=f"{name}.end"))
        done = self.b.declare(replace(self.b.lookup(waiting), name=f"{name}.done"))
        return now, (Carry(start, before, "", end), Carry(waiting, held, rest, done))

    def _leaves(
        self, outer: Builder, way: tuple[Carry, Carry], made: str, slot: str
    ) -> tuple[Carry, Carry]:
        """Everything one stage on; what leaves the last one waits on the first one's device."""
        moving, waiting = way
        name = moving.entry.removesuffix(".before")
        moved = windows.shift(outer, made, self.stage, 1, f"{name}.on", wrap=True)
        kept = structural.put(outer, waiting.exit, moved, slot, f"{name}.kept")
        return replace(moving, exit=moved), replace(waiting, exit=kept)

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

    def _results(self, k: Carry, way: tuple[Carry, Carry]) -> None:
        """What waits in the end is what has been made of every microbatch."""
        result = self.old.tensors[k.result]
        first = ex.call("eq", ex.index(self.stage), ex.c(0))
        self.many.add(k.result)
        self.b._names.discard(k.result)  # it is this tensor's own name
        self.b.map(
            k.result, [(way[1].result, (MICRO, self.stage, *result.dims))],
            (MICRO, *result.dims), ex.mul(first, ex.x(0)), dtype=result.dtype,
        )  # fmt: skip


def _modulo(value: ex.Expr, m: int) -> ex.Expr:
    """`value` mod m of whole numbers."""
    return ex.sub(value, ex.mul(ex.c(m), ex.whole_part(value, m)))


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
