"""How values flow through a Graph: where specs are chosen and where conversions may happen.

The one structure that the ILP formulation and lowering share. A *place* is a point where a
tensor has one spec: a result or operand of an op (following the op's choice), or a *home*, a
materialised tensor with a spec of its own (parameters, carries, stacks, tensors read more than
once, and the copy that a group of readers shares). A *conversion* leads from place to place.
Homes and conversions know when they occupy memory, in steps of the flattened schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.graph.ahead import narrowed_of
from planner.graph.core import Carry, Graph, Loop, Node, Op, Tensor
from planner.graph.recompute import CHOOSES
from planner.sharding.spec import Spec

Interval = tuple[int, int]  # half-open, in steps


@dataclass(frozen=True)
class Place:
    """`kind`: "result" or "operand" of op `op` at position `slot`, or "home" with id `home`.
    `lead`: leading whole dimensions dropped from the home's spec."""

    kind: str
    op: str = ""
    slot: int = 0
    home: int = -1
    lead: int = 0


@dataclass
class Home:
    """A materialised tensor. `shape` is of the whole (outermost, stacked) tensor; its first
    `lead` dimensions stay whole. `live`: where how many copies of it occupy memory. `uneven`:
    whether its shards may be padded."""

    id: int
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    lead: int
    partial: bool
    category: str
    live: list[tuple[Interval, int]] = field(default_factory=list)
    pin: Spec | None = None
    uneven: bool = False


@dataclass
class Conversion:
    """A possible resharding, executed `times` times a step in schedule step `at`.

    If the specs differ, extra memory is taken at `at` (intermediates, and what `extra` says:
    the "result", the "source", "both" or "none"), and during `overlap` (the source's bytes if
    `extra` is "source", else the result's).
    """

    source: Place
    target: Place
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    times: int
    at: int
    kind: str
    extra: str = "result"
    overlap: Interval | None = None
    reduce: str = "sum"
    phase: str = "forward"


@dataclass
class OpSite:
    """An op in the schedule. `held[k]`: how long result k itself occupies memory (if no home
    takes it over at once)."""

    op: Op
    step: int
    times: int
    held: dict[int, Interval] = field(default_factory=dict)


@dataclass
class LoopSite:
    """A loop in the schedule: step `enter`, its body, and step `stop`, where results leave."""

    loop: Loop
    enter: int
    stop: int
    times: int
    copies: dict[str, int] = field(default_factory=dict)  # shared tensor → home inside


@dataclass
class Flow:
    graph: Graph
    sites: dict[str, OpSite] = field(default_factory=dict)
    loops: dict[str, LoopSite] = field(default_factory=dict)
    homes: list[Home] = field(default_factory=list)
    conversions: list[Conversion] = field(default_factory=list)
    home_of: dict[str, tuple[int, int]] = field(default_factory=dict)  # tensor → (home, lead)
    steps: int = 0
    uneven: bool = False  # whether dimensions may be split that do not divide


def build_flow(
    graph: Graph, pins: Mapping[str, Spec], alike: Mapping[str, str] | None = None,
    uneven: bool = False, reduce_once: bool = True,
) -> Flow:  # fmt: skip
    """The flow of a training-step graph; tensors in `pins` always get a home of that spec.

    `alike`: tensors that share the home of an input, so that they lie like it. Such a flow is to
    be solved, not lowered. `uneven`: dimensions may be split that do not divide, except where the
    step receives or returns a tensor, which JAX refuses. `reduce_once`: sums may
    wait, those over parts of the batch until the last one, others while a loop runs; else they
    are reduced before.
    """
    flow = Flow(graph, uneven=uneven)
    flow.steps = _number(flow, graph.nodes, 0, 1)
    builder = _FlowBuilder(flow, pins, alike or {}, reduce_once)
    builder.outermost()
    return flow


def _number(flow: Flow, nodes: Iterable[Node], step: int, times: int) -> int:
    for node in nodes:
        if isinstance(node, Op):
            if CHOOSES in node.attrs:  # what it stands for is made by the op before
                step -= 1
            flow.sites[node.name] = OpSite(node, step, times)
            step += 1
            continue
        enter = step
        stop = _number(flow, node.body.nodes, step + 1, times * node.times)
        flow.loops[node.name] = LoopSite(node, enter, stop, times)
        step = stop + 1
    return step


HANDED_ON = -1  # the step of a use that follows from where its tensor is made


@dataclass
class _Use:
    """Somebody needs a tensor of a scope at `target` in step `at` (HANDED_ON: as soon as it is
    made); `group` keys shared copies."""

    target: Place
    at: int
    kind: str
    group: str
    live_to: int  # the reader keeps reading until this step (exclusive)


@dataclass
class _Scope:
    graph: Graph
    tensors: Mapping[str, Tensor]
    times: int
    start: int
    stop: int
    phase: str = "forward"
    sources: dict[str, Place] = field(default_factory=dict)
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)  # must live until here in any case

    def use(self, tensor: str, use: _Use) -> None:
        self.uses.setdefault(tensor, []).append(use)


READER_GROUPS = {"recompute": "backward"}  # one shared copy serves both phases
COPY_CATEGORY = "collective_buffers"
ROLE_CATEGORIES = {
    "parameter": "parameters", "state": "optimizer", "gradient": "gradients",
    "residual": "activations", "input": "activations", "activation": "activations",
    "cache": "kv_cache", "copy": "temporaries",
}  # fmt: skip


class _FlowBuilder:
    """Walks scopes outside in; see the module docstring for what it makes."""

    def __init__(
        self, flow: Flow, pins: Mapping[str, Spec], alike: Mapping[str, str], reduce_once: bool
    ) -> None:
        self.flow = flow
        self.pins = pins
        self.alike = alike
        self.reduce_once = reduce_once
        self.tensors = flow.graph.all_tensors()
        self.narrow = {name: narrow for narrow, name in narrowed_of(flow.graph).items()}
        self.held: set[int] = set()  # homes whose memory a conversion already accounts for

    # ---- scopes -------------------------------------------------------------------------

    def outermost(self) -> None:
        graph = self.flow.graph
        scope = _Scope(graph, graph.tensors, 1, 0, self.flow.steps)
        for name in graph.inputs:
            home = self.home(name, stacked=self._stack_depth(name))
            home.uneven = False
            home.live.append(((0, self.flow.steps), 1))
            scope.sources[name] = self.place(name)
        for out in graph.outputs:
            self._output(scope, out)
        self.scope(scope)

    def _output(self, scope: _Scope, out: str) -> None:
        alias = self.flow.graph.aliases.get(out)
        if alias is not None:
            if any(out in site.loop.outs for site in self.flow.loops.values()):
                scope.ends[out] = self.flow.steps  # a loop needs the old value while it makes this
            scope.use(out, _Use(self.place(alias), HANDED_ON, "alias", "", 0))
            return
        t = self.tensors[out]
        home = self.new_home(f"{out}@output", t.shape, t.dtype, 0, False, ROLE_CATEGORIES[t.role])
        home.uneven = False
        scope.use(
            out, _Use(Place("home", home=home.id), HANDED_ON, "output", "", self.flow.steps)
        )

    def _stack_depth(self, name: str) -> int:
        """Leading dimensions along which loops slice this tensor, or what is cast of all of it."""
        narrow = self.narrow.get(name)
        depth = 0 if narrow is None else self._stack_depth(narrow)
        for site in self.flow.loops.values():
            for stack in (*site.loop.reads, *site.loop.writes):
                if stack.outer == name:
                    depth = max(depth, 1 + self._stack_depth(stack.inner))
        return depth

    def scope(self, scope: _Scope) -> None:
        for node in scope.graph.nodes:
            if isinstance(node, Op):
                self._op_uses(scope, node)
            else:
                self._loop_uses(scope, node)
        for name in dict.fromkeys((*scope.sources, *scope.uses)):
            if name in scope.sources:
                self._connect_source(scope, name)
        for node in scope.graph.nodes:
            if isinstance(node, Loop):
                self._body(scope, node)

    def _op_uses(self, scope: _Scope, op: Op) -> None:
        site = self.flow.sites[op.name]
        for k, out in enumerate(op.outs):
            scope.sources[out] = Place("result", op.name, k)
        group = READER_GROUPS.get(op.phase, op.phase)
        for i, name in enumerate(op.ins):
            target = Place("operand", op.name, i)
            scope.use(name, _Use(target, site.step, "use", group, site.step + 1))

    def _loop_uses(self, scope: _Scope, loop: Loop) -> None:
        site = self.flow.loops[loop.name]
        for carry in loop.carries:
            home = self._carry_home(carry)
            entry = Place("home", home=home.id)
            scope.use(carry.init, _Use(entry, site.enter, "carry", "", site.enter + 1))
            scope.sources[carry.result] = Place("home", home=home.id)
        for stack in loop.writes:
            home = self.home(stack.outer, stacked=self._stack_depth(stack.outer))
            inside = scope.graph is not self.flow.graph
            self._may_stay_partial(home, inside and self.tensors[stack.outer].role == "gradient")
            scope.sources[stack.outer] = self.place(stack.outer)
        for stack in loop.reads:
            use = _Use(self.place_or_new(stack.outer), site.enter, "read", "", site.stop)
            scope.use(stack.outer, use)
        for name in loop.shared:
            t = self.tensors[name]
            lead = self._stack_depth(name)
            home = self.new_home(
                f"{name}@{loop.name}", t.shape, t.dtype, lead, False, COPY_CATEGORY
            )
            site.copies[name] = home.id
            scope.use(
                name, _Use(Place("home", home=home.id), site.enter, "shared", "", site.stop)
            )

    def _carry_home(self, carry: Carry) -> Home:
        gradient = self.tensors[carry.entry].role == "gradient"
        category = "gradients" if gradient else "activations"
        home = self.home(carry.entry, names=(carry.result,), category=category)
        self._may_stay_partial(home, gradient)
        return home

    def _may_stay_partial(self, home: Home, accumulated: bool) -> None:
        home.partial = self.reduce_once and accumulated and home.pin is None

    def _body(self, outer: _Scope, loop: Loop) -> None:
        site = self.flow.loops[loop.name]
        inner = _Scope(
            loop.body, loop.body.tensors, outer.times * loop.times, site.enter + 1, site.stop,
            loop.phase,
        )  # fmt: skip
        for stack in loop.reads:
            whole = outer.sources[stack.outer]  # here perhaps the copy that this scope shares
            if whole.kind == "result":
                whole = self.place(stack.outer)
            self.flow.home_of[stack.inner] = (whole.home, whole.lead + 1)
            inner.sources[stack.inner] = self.place(stack.inner)
        for carry in loop.carries:
            inner.sources[carry.entry] = self.place(carry.entry)
            inner.use(carry.exit, _Use(self.place(carry.entry), HANDED_ON, "exit", "", 0))
        for name, home_id in site.copies.items():
            inner.sources[name] = Place("home", home=home_id)
            self.held.add(home_id)
        for stack in loop.writes:
            home, lead = self.flow.home_of[stack.outer]
            slot = Place("home", home=home, lead=lead + 1)
            inner.use(stack.inner, _Use(slot, HANDED_ON, "write", "", 0))
        self.scope(inner)

    # ---- homes ----------------------------------------------------------------------------

    def home(
        self, name: str, *, names: Sequence[str] = (), stacked: int = 0, category: str = ""
    ) -> Home:
        """The home of tensor `name` (made on first call), shared with `names`."""
        if name in self.alike:
            self.flow.home_of[name] = self.flow.home_of[self.alike[name]]
        if name in self.flow.home_of:
            return self.flow.homes[self.flow.home_of[name][0]]
        t = self.tensors[name]
        kind = category or ROLE_CATEGORIES[t.role]
        home = self.new_home(name, t.shape, t.dtype, stacked, False, kind)
        for n in (name, *names):
            self.flow.home_of[n] = (home.id, 0)
        return home

    def new_home(
        self, name: str, shape: tuple[int, ...], dtype: str, lead: int, partial: bool, category: str
    ) -> Home:
        home = Home(
            len(self.flow.homes), name, shape, dtype, lead, partial, category,
            uneven=self.flow.uneven,
        )  # fmt: skip
        pin = self.pins.get(name)
        if pin is not None:  # of one slice, where the home holds a stack of them
            home.pin = Spec(((),) * (len(shape) - len(pin.dims)) + pin.dims)
        self.flow.homes.append(home)
        return home

    def place(self, name: str) -> Place:
        home, lead = self.flow.home_of[name]
        return Place("home", home=home, lead=lead)

    def place_or_new(self, name: str) -> Place:
        if name not in self.flow.home_of:
            self.home(name, stacked=self._stack_depth(name))
        return self.place(name)

    # ---- connections ------------------------------------------------------------------------

    def _connect_source(self, scope: _Scope, name: str) -> None:
        source = scope.sources[name]
        uses = [
            replace(u, at=self._hand_on_step(scope, name, source, u.kind)) if u.at == HANDED_ON
            else u
            for u in scope.uses.get(name, [])
        ]  # fmt: skip
        if source.kind == "result":
            self._connect_result(scope, name, source, uses)
        else:
            self._connect_home(scope, name, source, uses)

    def _hand_on_step(self, scope: _Scope, name: str, source: Place, kind: str) -> int:
        """Where a tensor leaves its scope: with its op or after its loop. What the scope gets
        from outside is stacked at once (to be free early) and else handed on at the end."""
        if source.kind == "result":
            return self.flow.sites[source.op].step
        for site in self.flow.loops.values():
            if name in site.loop.outs:
                return site.stop
        return scope.start if kind == "write" else scope.stop - 1

    def _connect_result(
        self, scope: _Scope, name: str, source: Place, uses: list[_Use]
    ) -> None:
        site = self.flow.sites[source.op]
        start = site.step
        stack = any(u.kind == "read" for u in uses)
        waits = not self.reduce_once and self._outlives_a_loop(start, uses)
        if len(uses) == 1 and not stack and not waits and name not in self.pins:
            use = uses[0]
            stop = max(use.at + 1, scope.ends.get(name, 0))
            summed = (
                use.kind == "exit" and self.flow.homes[use.target.home].category == "gradients"
            )
            if summed:
                site.held[source.slot] = (start + 1, stop)  # it is written over the old sum
            elif use.kind != "alias" and not self._chosen(use.target):
                site.held[source.slot] = (start, stop)
            handed = use.kind == "alias" or self._chosen(use.target)
            extra = "source" if handed else "both" if summed else "result"
            self._convert(scope, name, source, use, (start, stop), extra, producer=site)
            return
        if not uses:
            site.held[source.slot] = (start, start + 1)
            return
        t = self.tensors[name]
        if stack:
            home = self.home(name, stacked=self._stack_depth(name))
        else:
            # A maximum is not a sum: its partial results are combined where they arise.
            partial = site.op.rule.combiner == "sum" and not waits and name not in self.pins
            home = self.new_home(name, t.shape, t.dtype, 0, partial, ROLE_CATEGORIES[t.role])
            self.flow.home_of[name] = (home.id, 0)
        place = Place("home", home=home.id)
        stored = Conversion(
            source, place, name, t.shape, t.dtype, site.times, start, "home", "source",
            reduce=site.op.rule.combiner, phase=site.op.phase,
        )  # fmt: skip
        self.flow.conversions.append(stored)
        self._fan_out(scope, name, place, uses, start)

    def _outlives_a_loop(self, start: int, uses: Sequence[_Use]) -> bool:
        """Whether a loop runs between the making of a result and its last use."""
        last = max((u.at for u in uses), default=start)
        return any(start < loop.enter < last for loop in self.flow.loops.values())

    def _connect_home(self, scope: _Scope, name: str, source: Place, uses: list[_Use]) -> None:
        start = scope.start
        for site in self.flow.loops.values():
            if any(k.result == name for k in site.loop.carries):
                start = site.stop  # occupied inside the loop by the carry itself
            elif any(s.outer == name for s in site.loop.writes):
                start = site.enter
                scope.ends[name] = max(scope.ends.get(name, 0), site.stop + 1)
        if uses or name in scope.ends:
            self._fan_out(scope, name, source, uses, start)

    def _fan_out(
        self, scope: _Scope, name: str, source: Place, uses: list[_Use], start: int
    ) -> None:
        """Connects a home with its readers, through one shared copy per group of readers.

        A donated result takes over the memory of the input it replaces, so its home costs
        bytes only if it is sharded in another way: the conversion to the input's spec accounts
        for it, and its readers share no copies (they would outlive it).
        """
        groups: dict[str, list[_Use]] = {}
        for use in uses:
            if use.kind == "use":
                groups.setdefault(use.group, []).append(use)
        others = [u for u in uses if u.kind != "use"]
        made = scope.sources[name]
        own = self.flow.sites[made.op] if made.kind == "result" else None
        donated = own is not None and any(u.kind == "alias" for u in others)
        # A home free to lie where its only readers want it needs no copy.
        bound = own is None or len(groups) + len(others) > 1 or name in self.pins
        copied = {g for g, us in groups.items() if len(us) > 1 and bound and not donated}
        stop = max(
            [start + 1, scope.ends.get(name, 0)]
            + [u.live_to if u.kind == "read" else max(u.at, start) + 1 for u in others]
            + [u.at + 1 for g, us in groups.items() if g not in copied for u in us]
            + [min(u.at for u in us) + 1 for g, us in groups.items() if g in copied]
        )
        live = (start, stop)
        if self._argument(name, source):
            live = (0, self.flow.steps)
        elif not donated:
            self._occupy(source, name, live)
        for use in others:
            if use.kind != "read":
                extra = "none" if use.kind == "alias" else "result"
                if donated and use.kind == "alias":
                    extra = "source"
                self._convert(scope, name, source, use, live, extra, producer=own)
        for group, members in groups.items():
            if group in copied:
                self._copy(scope, name, source, members, live)
                continue
            for use in members:
                extra = "none" if self._chosen(use.target) else "result"
                self._convert(scope, name, source, use, live, extra, producer=own)

    def _chosen(self, target: Place) -> bool:
        """Whether it is an operand of an op that stands for a choice: its result is the value."""
        return target.kind == "operand" and CHOOSES in self.flow.sites[target.op].op.attrs

    def _argument(self, name: str, source: Place) -> bool:
        """Whether something else accounts for the home: inputs live all the time, a slice is
        a view of its stack, a loop's copy is held by its conversion."""
        return (
            source.lead > 0 or source.home in self.held or name in self.flow.graph.inputs
        )

    def _occupy(self, source: Place, name: str, live: Interval) -> None:
        if live[1] > live[0]:
            self.flow.homes[source.home].live.append((live, 1))

    def _copy(
        self, scope: _Scope, name: str, source: Place, members: list[_Use], live: Interval
    ) -> None:
        t = self.tensors[name]
        partial = self.flow.homes[source.home].partial
        label = f"{name}@{members[0].group}"
        home = self.new_home(label, t.shape, t.dtype, 0, partial, COPY_CATEGORY)
        first, last = min(u.at for u in members), max(u.at for u in members) + 1
        place = Place("home", home=home.id)
        use = _Use(place, first, "copy", members[0].group, last)
        self._convert(scope, name, source, use, live, "result", producer=None)
        for member in members:
            self._convert(
                scope, name, place, member, (first, last), "result", producer=None
            )

    def _convert(
        self,
        scope: _Scope,
        name: str,
        source: Place,
        use: _Use,
        live: Interval,
        extra: str,
        producer: OpSite | None,
    ) -> None:
        """One conversion and the memory its result takes; `live`: the source's lifetime."""
        t = self.tensors[name]
        phase = producer.op.phase if producer else use.group or scope.phase
        if use.kind == "use":
            phase = self.flow.sites[use.target.op].op.phase
        overlap = None
        until = self._result_until(scope, use)
        if extra == "source" and source.kind == "home" and live[1] > use.at + 1:
            overlap = (use.at + 1, live[1])
        elif until > use.at + 1:
            overlap = self._hold(use.target, (use.at + 1, until), live)
        found = Conversion(
            source, use.target, name, t.shape, t.dtype, scope.times, use.at, use.kind, extra,
            overlap, producer.op.rule.combiner if producer else "sum", phase,
        )  # fmt: skip
        self.flow.conversions.append(found)

    def _result_until(self, scope: _Scope, use: _Use) -> int:
        """When the converted value is needed no more (by the target's own accounting)."""
        if use.kind in ("copy", "shared", "output"):
            return use.live_to
        if use.kind == "exit":
            return scope.stop
        return use.at + 1  # from the first body step on a carry's entry accounts for itself

    def _hold(self, target: Place, wanted: Interval, live: Interval) -> Interval | None:
        """Where both live a copy costs only if it differs; alone it costs its bytes."""
        both = (max(wanted[0], live[0]), min(wanted[1], live[1]))
        home = self.flow.homes[target.home]
        if both[1] <= both[0]:
            home.live.append((wanted, 1))
            return None
        if both[1] < wanted[1]:
            home.live.append(((both[1], wanted[1]), 1))
        return both
