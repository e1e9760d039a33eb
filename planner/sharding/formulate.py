"""The sharding ILP of one training step, in the problem class of `planner.ilp`.

Nodes      one per op (its strategies are its choices; an op and its recomputation are one
           node) and one per home (its strategies are the specs of the tensor).   _op_nodes,
           _home_nodes
Node cost  executions × seconds of the lowered kernel, halo exchange included.    _op_nodes
Edges      one per pair of nodes that a conversion joins; cost = executions × seconds of the
           resharding path between the two strategies' specs, inf if there is none. _edges
Memory     at a schedule step t: results waiting for their reader (op usage), live homes (home
           usage), and what conversions take at t. The last depends on both ends, so such a
           conversion becomes a node of its own, whose strategies are pairs of specs. So does
           what may gather a TPU's parameter, for its copy.  _usages

Only the steps in `active` get a memory constraint. The caller adds steps where the lowered
program exceeds the limit until it does so nowhere: a solution of the relaxed problem that fits
is an optimum of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod

import numpy as np
from numpy.typing import NDArray

from costmodels.collectives import collective_seconds
from costmodels.pricing import many_kernel_seconds, prices
from costmodels.program import ITEM_BYTES
from costmodels.retiling import retiling_seconds, summed_when_gathered
from meshes import LogicalMesh
from planner.graph.ahead import AHEAD, SLICE, WHOLE, narrows
from planner.graph.builder import is_cast
from planner.graph.core import Op, Tensor
from planner.ilp import Edge, Problem, Usage
from planner.ilp.clock import Clock
from planner.lowering.halo import Halo, halos
from planner.lowering.inside import OPERAND
from planner.lowering.lower_op import lower_op
from planner.plan import Plan, Proof
from planner.sharding.agreement import Agreement
from planner.sharding.choices import Choice, OpChoices
from planner.sharding.flow import Conversion, Flow, Home, Interval, OpSite, Place
from planner.sharding.reshard import Resharder
from planner.sharding.spec import Spec, all_specs

Array = NDArray[np.float64]
Key = tuple[str, int | str]  # ("op", name) or ("home", id)
Rows = tuple[list[Spec], NDArray[np.int64]]
HomeSeconds = Callable[[Home, Sequence[Spec]], Array]  # seconds a step of each spec


class Unsatisfiable(ValueError):
    """Pins leave a tensor or an op without any strategy."""


@dataclass
class Space:
    """The strategies of every node of a flow on a mesh, priced: everything that does not
    depend on the memory limit. `as_laid`: how ops must read some tensors. `check` is called
    between steps and may raise to give up."""

    flow: Flow
    mesh: LogicalMesh
    home_seconds: HomeSeconds | None = None  # what a home costs by itself, if not nothing
    as_laid: Mapping[str, Spec] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    narrow_first: bool = False  # whether to leave out plans that move what is only to be narrowed
    resharder: Resharder = field(init=False)
    keys: list[Key] = field(init=False, default_factory=list)
    choices: dict[str, tuple[Choice, ...]] = field(init=False, default_factory=dict)
    specs: dict[int, tuple[Spec, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = dict(self.mesh.axes)
        self.tensors = self.flow.graph.all_tensors()
        self.resharder = mesh_resharder(self.mesh, self.flow.uneven)
        self.site_seconds: dict[str, Array] = {}  # of all executions of an op in a step
        self._costs: dict[Key, Array] = {}
        # Layers repeat their ops. What is alike has the same tuple of choices, and shares the rest.
        self._found: dict[str, tuple[Choice, ...]] = {}
        self._seconds: dict[tuple[str, int], Array] = {}
        self._rows: dict[tuple[object, ...], Rows] = {}
        self._op_nodes()
        self._home_nodes()
        self.number = {key: i for i, key in enumerate(self.keys)}
        self.conversion_seconds = self._edges()

    # ---- nodes ------------------------------------------------------------------------------

    def _op_nodes(self) -> None:
        for site in self.flow.sites.values():
            self.check()
            op = site.op
            name = op.origin or op.name
            key: Key = ("op", name)
            like = signature(op, self.tensors)
            if key not in self._costs:
                self.keys.append(key)
                self.choices[name] = self._allowed(op, like)
                self._costs[key] = np.zeros(len(self.choices[name]))
            self.site_seconds[op.name] = site.times * self._op_seconds(op, like, self.choices[name])
            self._costs[key] += self.site_seconds[op.name]

    def _op_seconds(self, op: Op, like: str, choices: Sequence[Choice]) -> Array:
        same = like, id(choices)
        if same not in self._seconds:
            self._seconds[same] = choice_seconds(op, choices, self.tensors, self.mesh)
        return self._seconds[same]

    def _allowed(self, op: Op, like: str) -> tuple[Choice, ...]:
        """The choices that read operands in the specs that `as_laid` demands. `like`: the op's
        signature."""
        laid = self.as_laid
        demanded = [(i, laid[name]) for i, name in enumerate(op.ins) if name in laid]
        same = f"{like} {demanded}"
        if same not in self._found:
            found = OpChoices(op, self.mesh.axes, self.flow.uneven).choices
            self._found[same] = tuple(
                c for c in found if all(c.operand(op.rule, i) == s for i, s in demanded)
            )
        if not self._found[same]:
            raise Unsatisfiable(f"'{op.name}' cannot read its operands as they are laid")
        return self._found[same]

    def _home_nodes(self) -> None:
        for home in self.flow.homes:
            key: Key = ("home", home.id)
            self.keys.append(key)
            self.specs[home.id] = home_specs(home, self.sizes)
            specs = self.specs[home.id]
            self._costs[key] = (
                np.zeros(len(specs)) if self.home_seconds is None
                else self.home_seconds(home, specs)
            )  # fmt: skip

    def strategies(self, node: int) -> int:
        """How many a node has."""
        return len(self._costs[self.keys[node]])

    def node_of(self, op: Op) -> int:
        """The node of an op, and of its recomputations."""
        return self.number["op", op.origin or op.name]

    def key(self, place: Place) -> Key:
        """The node that decides the spec at `place`."""
        if place.kind == "home":
            return ("home", place.home)
        op = self.flow.sites[place.op].op
        return ("op", op.origin or op.name)

    def rows(self, place: Place) -> Rows:
        """Distinct specs at `place`, and for every strategy of its node the index of its own."""
        alike: tuple[object, ...] = (place,)
        if place.kind != "home":
            op = self.flow.sites[place.op].op
            alike = id(self.choices[op.origin or op.name]), place.kind, place.slot
        if alike not in self._rows:
            each = self._each(place)
            distinct = list(dict.fromkeys(each))
            where = {spec: i for i, spec in enumerate(distinct)}
            self._rows[alike] = distinct, np.array([where[s] for s in each])
        return self._rows[alike]

    def _each(self, place: Place) -> list[Spec]:
        if place.kind == "home":
            return [Spec(s.dims[place.lead :], s.partial) for s in self.specs[place.home]]
        op = self.flow.sites[place.op].op
        order = list(self.sizes)
        choices = self.choices[op.origin or op.name]
        if place.kind == "operand":
            return [c.operand(op.rule, place.slot) for c in choices]
        return [c.result(op.rule, place.slot, order) for c in choices]

    # ---- edges ------------------------------------------------------------------------------

    def spec_costs(self, c: Conversion) -> Array:
        """Seconds of one execution of `c` for every pair of distinct source and target specs."""
        sources, _ = self.rows(c.source)
        targets, _ = self.rows(c.target)
        found = self.resharder.matrix(sources, targets, c.shape, ITEM_BYTES[c.dtype], c.reduce)
        if self.narrow_first and (self._narrows(c.target) or self._stays(c.source)):
            found = _only_free(found)
        if self.narrow_first and self._widens(c.source):
            found = _unreduced(found, sources)
        return found

    def _narrows(self, target: Place) -> bool:
        """Whether an op only narrows what it reads there. Compilers do that before they move it."""
        if target.kind != "operand":
            return False
        op = self.flow.sites[target.op].op
        return op.attrs.get(AHEAD) == SLICE or narrows(op, self.tensors)

    def _stays(self, source: Place) -> bool:
        """Whether it is made of all layers of a parameter, before loops that read its slices."""
        made_by = self.flow.sites[source.op].op if source.kind == "result" else None
        return made_by is not None and made_by.attrs.get(AHEAD) == WHOLE

    def _item(self, name: str) -> float:
        return ITEM_BYTES[self.tensors[name].dtype]

    def _widens(self, source: Place) -> bool:
        """Whether an op only widens what it makes there. Compilers reduce sums before that."""
        if source.kind != "result":
            return False
        op = self.flow.sites[source.op].op
        return is_cast(op) and self._item(op.outs[0]) > self._item(op.ins[0])

    def _edges(self) -> list[tuple[Conversion, Array]]:
        found = []
        for c in self.flow.conversions:
            self.check()
            found.append((c, c.times * self.spec_costs(c)))
        return found

    @cached_property
    def _disputes(self) -> list[Array]:
        agreement = Agreement(self.flow.graph)
        return [
            agreement.disputes(c, self.rows(c.source)[0], self.rows(c.target)[0])
            for c in self.flow.conversions
        ]

    # ---- the problem ------------------------------------------------------------------------

    def problem(
        self, limit: float | None, active: Sequence[int], weights: Sequence[float] | None = None,
        dispute_s: float = 0.0,
    ) -> Problem:  # fmt: skip
        """The ILP with memory constraints at the schedule steps `active` (none: limit unused).

        `weights`: what a second of each conversion counts (all 1 by default): less than one
        where the simulator hides it behind computation. `dispute_s`: seconds that a plan may
        take longer to avoid a dispute (see planner.sharding.agreement).
        """
        costs = [self._costs[key].copy() for key in self.keys]
        merged: dict[tuple[int, int], Array] = {}
        paired: list[tuple[Conversion, Array]] = []
        for i, (c, full) in enumerate(self.conversion_seconds):
            by_spec = full if weights is None else weights[i] * full
            if dispute_s:
                by_spec = by_spec + dispute_s * self._disputes[i]
            if limit is not None and self.touches(c, active):
                paired.append((c, by_spec))
                continue
            self._join(costs, merged, c, by_spec)
        usages: list[Usage] = []
        if limit is not None:
            for site in self.flow.sites.values():
                usages += self.site_usages(site, active)
            for home in self.flow.homes:
                usages += self.home_usages(home, active)
            for c, by_spec in paired:
                self.pair_node(costs, merged, usages, c, by_spec, active)
        edges = tuple(Edge(i, j, m) for (i, j), m in merged.items())
        names = tuple(f"{kind}:{name}" for kind, name in self.keys)
        return Problem(tuple(costs), edges, tuple(usages), limit, names)

    def _join(
        self, costs: list[Array], merged: dict[tuple[int, int], Array], c: Conversion, m: Array
    ) -> None:
        """Adds a conversion's costs between the two nodes it joins."""
        left, right = self.key(c.source), self.key(c.target)
        rows = self.rows(c.source)[1]
        columns = self.rows(c.target)[1]
        if left == right:
            costs[self.number[left]] += np.diagonal(m[rows][:, columns])
            return
        add_edge(merged, self.number[left], self.number[right], m[rows][:, columns])

    def touches(self, c: Conversion, active: Sequence[int]) -> bool:
        lo, hi = c.overlap or (0, 0)
        lasts = bool(active) and self._may_be_copied(c)
        return lasts or any(t == c.at or lo <= t < hi for t in active)

    def _may_be_copied(self, c: Conversion) -> bool:
        """Whether it gathers a parameter's new value (see costmodels.gathered)."""
        home = c.target.home
        return (
            self.mesh.chip.family == "tpu"
            and c.kind == "alias"
            and self.flow.homes[home].category == "parameters"
        )

    def site_usages(self, site: OpSite, active: Sequence[int]) -> list[Usage]:
        """What an op's results and halos occupy at the steps `active`."""
        op = site.op
        node = self.node_of(op)
        found = []
        stored = op.attrs.get("inside") != OPERAND
        for k, interval in site.held.items() if stored else ():
            if points := _points(interval, active):
                t = self.tensors[op.outs[k]]
                amount = self._bytes(Place("result", op.name, k), t.shape, t.dtype)
                found += [Usage(node, p, p + 1, amount) for p in points]
        if op.rule.windows and site.step in active:
            p = active.index(site.step)
            found.append(Usage(node, p, p + 1, self._halo_bytes(op)))
        return found

    def _halo_bytes(self, op: Op) -> Array:
        """Memory of the halo exchange at the op's step, under each choice."""
        choices = self.choices[op.origin or op.name]
        each = (halos(op, c, self.tensors, self.sizes) for c in choices)
        return np.array([
            float(sum(h.bytes(self.tensors[op.ins[h.read.slot]].dtype) for h in found))
            for found in each
        ])  # fmt: skip

    def home_usages(self, home: Home, active: Sequence[int]) -> list[Usage]:
        """What a home occupies at the steps `active`."""
        amount = self._bytes(Place("home", home=home.id), home.shape, home.dtype)
        node = self.number["home", home.id]
        return [
            Usage(node, p, p + 1, amount * copies)
            for interval, copies in home.live
            for p in _points(interval, active)
        ]

    def _bytes(self, place: Place, shape: Sequence[int], dtype: str) -> Array:
        specs, rows = self.rows(place)
        return self._local(specs, shape)[rows] * ITEM_BYTES[dtype]

    def pair_node(
        self, costs: list[Array], merged: dict[tuple[int, int], Array], usages: list[Usage],
        c: Conversion, by_spec: Array, active: Sequence[int],
    ) -> None:  # fmt: skip
        """A conversion whose memory counts, which depends on both ends: a node whose strategies
        are a spec of one end and amounts that occur with it. There are far fewer of these than
        pairs of specs."""
        amounts = self.pair_bytes(c)
        steps = self.pair_steps(c, active)
        kinds = list(dict.fromkeys(kind for kind, _, _ in steps))
        occurring = np.stack([amounts[kind] for kind in kinds])
        near, far = c.source, c.target
        levels = _Levels.of(occurring, by_spec)
        others = _Levels.of(occurring.transpose(0, 2, 1), by_spec.T)
        if len(others.own) < len(levels.own):
            near, far, levels = far, near, others
        node = len(costs)
        costs.append(np.zeros(len(levels.own)))
        same = np.where(self.rows(near)[1][:, None] == levels.own[None, :], 0.0, np.inf)
        add_edge(merged, self.number[self.key(near)], node, same)
        add_edge(merged, self.number[self.key(far)], node, levels.cost[self.rows(far)[1]])
        for kind, start, stop in steps:
            usages.append(Usage(node, start, stop, levels.amounts[kinds.index(kind)]))

    def pair_steps(
        self, c: Conversion, active: Sequence[int]
    ) -> list[tuple[str, int, int]]:
        """Which amounts of `pair_bytes` count at which positions (half-open) in `active`."""
        found = [("copied", 0, len(active))] if self._may_be_copied(c) else []
        lo, hi = c.overlap or (0, 0)
        for p, t in enumerate(active):
            if t == c.at:
                found.append(("at step", p, p + 1))
            elif lo <= t < hi:
                found.append(("held", p, p + 1))
        return found

    def pair_bytes(self, c: Conversion) -> dict[str, Array]:
        """Bytes for every pair of specs: at the conversion's step, held as long as its `overlap`
        lasts, and of the old parameter's copy, which lives for the whole step."""
        sources, targets = self.rows(c.source)[0], self.rows(c.target)[0]
        item = ITEM_BYTES[c.dtype]
        differs = np.array([[s != t for t in targets] for s in sources])
        own = differs * self._local(sources, c.shape)[:, None] * item
        result = differs * self._local(targets, c.shape)[None, :] * item
        extra = {"result": result, "source": own, "both": own + result, "none": 0.0 * own}[c.extra]
        found = {
            "at step": extra + self.resharder.between_bytes(sources, targets, c.shape, item),
            "held": own if c.extra == "source" else result,
        }
        if self._may_be_copied(c):
            found["copied"] = result * self.resharder.gathers_last(
                sources, targets, c.shape, item,
                lambda axes: not summed_when_gathered(self.mesh, axes),
            )  # fmt: skip
        return found

    def _local(self, specs: Sequence[Spec], shape: Sequence[int]) -> Array:
        return np.array([float(prod(s.local_shape(shape, self.sizes))) for s in specs])

    # ---- solutions --------------------------------------------------------------------------

    def disputes(self, strategy: Sequence[int]) -> float:
        """How much compilers would settle in a solution."""
        found = 0.0
        for c, each in zip(self.flow.conversions, self._disputes, strict=True):
            ends = [
                self.rows(place)[1][strategy[self.number[self.key(place)]]]
                for place in (c.source, c.target)
            ]
            found += each[ends[0], ends[1]]
        return found

    def plan(self, strategy: Sequence[int], proof: Proof) -> Plan:
        """The Plan that a solution of any `problem` of this space means."""
        choices = {
            str(name): self.choices[str(name)][strategy[self.number[kind, name]]]
            for kind, name in self.keys
            if kind == "op"
        }
        homes = {
            h.tensor: self.specs[h.id][strategy[self.number["home", h.id]]]
            for h in self.flow.homes
        }
        return Plan(self.mesh.axes, choices, homes, proof)


@dataclass(frozen=True)
class _Levels:
    """Strategies that stand for the pairs of specs of two ends: strategy i is spec `own[i]` of
    the first end with amounts `amounts[:, i]`; `cost[t, i]` is that of spec t of the second end,
    inf where spec t does not go with strategy i."""

    own: NDArray[np.int64]
    amounts: Array
    cost: Array

    @classmethod
    def of(cls, amounts: Array, cost: Array) -> _Levels:
        """From (kinds, first, second) amounts and (first, second) costs."""
        own: list[int] = []
        found: list[Array] = []
        columns: list[Array] = []
        for i, row in enumerate(cost):
            possible = np.flatnonzero(np.isfinite(row))
            each, which = np.unique(amounts[:, i, possible], axis=1, return_inverse=True)
            part = np.full((cost.shape[1], each.shape[1]), np.inf)
            part[possible, which.reshape(-1)] = row[possible]
            own += [i] * each.shape[1]
            found.append(each)
            columns.append(part)
        return cls(np.array(own), np.concatenate(found, axis=1), np.concatenate(columns, axis=1))


def _only_free(seconds: Array) -> Array:
    """Nothing that takes time, where a source can do without."""
    free = seconds == 0.0
    return np.where(free | ~free.any(axis=1, keepdims=True), seconds, np.inf)


def _unreduced(seconds: Array, sources: Sequence[Spec]) -> Array:
    """Pending sums stay pending."""
    pending = np.array([bool(s.partial) for s in sources])[:, None]
    return np.where(pending & (seconds > 0.0), np.inf, seconds)


def mesh_resharder(mesh: LogicalMesh, uneven: bool = False) -> Resharder:
    """Reshardings priced on the links of `mesh`, and by what its chips copy for them."""
    return Resharder(
        dict(mesh.axes), lambda kind, axes, size: collective_seconds(mesh, kind, axes, size),
        uneven, partial(retiling_seconds, mesh) if mesh.chip.family == "tpu" else None,
    )  # fmt: skip


def choice_seconds(
    op: Op, choices: Sequence[Choice], tensors: Mapping[str, Tensor], mesh: LogicalMesh
) -> Array:
    """Seconds of one execution of `op` under each choice, halo exchange included."""
    sizes = dict(mesh.axes)
    parts = [tuple(prod(sizes[a] for a in axes) for axes in c.split) for c in choices]
    each = dict(zip(parts, choices, strict=True))  # kernels depend on sizes, not on axes
    kernels = [lower_op(op, c, tensors, sizes) for c in each.values()]
    priced = dict(zip(each, many_kernel_seconds(mesh.chip, kernels).tolist(), strict=True))
    seconds = np.array([priced[split] for split in parts])
    if op.rule.windows:
        seconds += [
            sum(_halo_seconds(h, tensors[op.ins[h.read.slot]].dtype, mesh) for h in found)
            for found in (halos(op, c, tensors, sizes) for c in choices)
        ]
    return seconds


def _halo_seconds(halo: Halo, dtype: str, mesh: LogicalMesh) -> float:
    table, axes = prices(mesh), halo.read.axes
    pieces = (prod(shape) * ITEM_BYTES[dtype] for shape in (halo.low, halo.high) if shape)
    joining = 0.0 if halo.kernel is None else table.kernel(halo.kernel)
    return joining + sum(table.move("shift", axes, n) for n in pieces)


def signature(op: Op, tensors: Mapping[str, Tensor]) -> str:
    """The same for ops that differ in their names alone."""
    operands = [(tensors[n].shape, tensors[n].dtype) for n in (*op.ins, *op.outs)]
    return repr((op.kind, op.rule, op.phase, sorted(op.attrs.items()), operands))


def least_compute(flow: Flow, mesh: LogicalMesh, clock: Clock) -> float:
    """A lower bound of any plan's serial time: every op under its cheapest choice, those that
    there is no time to look at for nothing."""
    tensors = flow.graph.all_tensors()
    seconds: dict[str, float] = {}  # of ops that are the same but for their names
    found = 0.0
    for site in flow.sites.values():
        op = site.op
        alike = signature(op, tensors)
        if alike not in seconds:
            if clock.over():
                continue
            choices = OpChoices(op, mesh.axes, flow.uneven).choices
            seconds[alike] = float(choice_seconds(op, choices, tensors, mesh).min())
        found += site.times * seconds[alike]
    return found


def home_specs(home: Home, sizes: Mapping[str, int]) -> tuple[Spec, ...]:
    """Candidate specs of a home: all that fit (or its pin), its stacked dimensions whole."""
    inner = home.shape[home.lead :]
    if home.pin is not None:
        return (home.pin,)
    splitting = {a: n for a, n in sizes.items() if n > 1}
    return tuple(
        Spec(((),) * home.lead + s.dims, s.partial)
        for s in all_specs(inner, splitting, home.partial, home.uneven)
    )


def _points(interval: Interval, active: Sequence[int]) -> list[int]:
    """Positions in `active` of the steps inside the half-open interval."""
    return [p for p, t in enumerate(active) if interval[0] <= t < interval[1]]


def add_edge(merged: dict[tuple[int, int], Array], i: int, j: int, m: Array) -> None:
    if (j, i) in merged:
        merged[j, i] = merged[j, i] + m.T
    elif (i, j) in merged:
        merged[i, j] = merged[i, j] + m
    else:
        merged[i, j] = m
