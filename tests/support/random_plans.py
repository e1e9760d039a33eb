"""Draws random valid plans of a flow, and runs their lowered programs on virtual devices."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import prod

import numpy as np

from costmodels.program import Program
from planner.graph.core import Graph, Op
from planner.lowering.lower import lower
from planner.plan import Plan, Proof
from planner.sharding.choices import Choice, OpChoices
from planner.sharding.flow import Conversion, Flow, Place
from planner.sharding.formulate import home_specs
from planner.sharding.reshard import Resharder
from planner.sharding.spec import Spec
from planner.values import reference
from planner.values.interpret import Interpreter, shard, unshard

Axes = tuple[tuple[str, int], ...]
NO_PROOF = Proof("drawn", 0.0, 0.0, 0.0)
Node = tuple[str, int | str]  # ("op", name) or ("home", id)


def unit_price(kind: str, axes: tuple[str, ...], payload_bytes: float) -> float:
    """A stand-in for seconds that makes no two collectives free."""
    return 1e-6 + payload_bytes * 1e-9 * len(axes)


class PlanDrawer:
    """Random choices and specs, repaired until every conversion has a path."""

    def __init__(self, flow: Flow, axes: Axes) -> None:
        self.flow, self.axes, self.sizes = flow, axes, dict(axes)
        self.options: dict[Node, tuple[object, ...]] = {}
        for site in flow.sites.values():
            name = site.op.origin or site.op.name
            if ("op", name) not in self.options:
                self.options["op", name] = OpChoices(site.op, axes, flow.uneven).choices
        for home in flow.homes:
            self.options["home", home.id] = home_specs(home, self.sizes)

    def node(self, place: Place) -> Node:
        if place.kind == "home":
            return ("home", place.home)
        op = self.flow.sites[place.op].op
        return ("op", op.origin or op.name)

    def plan(self, taken: Mapping[Node, object]) -> Plan:
        choices = {str(n): c for (kind, n), c in taken.items() if kind == "op"}
        homes = {h.tensor: taken["home", h.id] for h in self.flow.homes}
        return Plan(self.axes, choices, homes, NO_PROOF)  # type: ignore[arg-type]

    def draw(self, seed: int) -> Plan:
        rng = random.Random(seed)
        eager = rng.choice((0.0, 0.3, 0.7))  # how often the first option (replicated) is retried
        taken = {node: self._option(rng, node, eager) for node in self.options}
        for attempt in range(200):
            broken = [c for c in self.flow.conversions if not self._valid(c, taken)]
            if not broken:
                return self.plan(taken)
            for c in broken:
                node = rng.choice((self.node(c.source), self.node(c.target)))
                calm = rng.random() < attempt / 100  # replicated ends always have a path
                taken[node] = self.options[node][0] if calm else self._option(rng, node, eager)
        raise AssertionError("no valid plan was drawn")

    def _option(self, rng: random.Random, node: Node, eager: float) -> object:
        found = rng.choice(self.options[node])
        if found is self.options[node][0] and rng.random() < eager:
            return rng.choice(self.options[node])
        return found

    def _valid(self, c: Conversion, taken: Mapping[Node, object]) -> bool:
        source, target = self.spec(c.source, taken), self.spec(c.target, taken)
        return possible(source, target, c.reduce)

    def spec(self, place: Place, taken: Mapping[Node, object]) -> Spec:
        option = taken[self.node(place)]
        if isinstance(option, Spec):
            return Spec(option.dims[place.lead :], option.partial)
        rule = self.flow.sites[place.op].op.rule
        if place.kind == "operand":
            return option.operand(rule, place.slot)  # type: ignore[attr-defined]
        return option.result(rule, place.slot, list(self.sizes))  # type: ignore[attr-defined]


class UnevenDrawer(PlanDrawer):
    """Prefers choices that pad something."""

    def __init__(self, flow: Flow, axes: Axes) -> None:
        super().__init__(flow, axes)
        self.padding = {
            ("op", name): tuple(
                o for o in self.options["op", name]
                if isinstance(o, Choice) and pads(site.op, o, self.sizes)
            )
            for name, site in flow.sites.items() if ("op", name) in self.options
        }  # fmt: skip

    def _option(self, rng: random.Random, node: Node, eager: float) -> object:
        if self.padding.get(node) and rng.random() < 0.7:
            return rng.choice(self.padding[node])
        return super()._option(rng, node, eager)


def padded_ops(flow: Flow, plan: Plan) -> set[str]:
    """Ops of which the plan splits a factor that does not divide."""
    return {
        name for name, choice in plan.choices.items()
        if pads(flow.sites[name].op, choice, plan.sizes)
    }  # fmt: skip


def pads(op: Op, choice: Choice, sizes: Mapping[str, int]) -> bool:
    return any(
        f.size % prod(sizes[a] for a in axes)
        for f, axes in zip(op.rule.factors, choice.split, strict=True)
    )


def possible(source: Spec, target: Spec, reduce: str) -> bool:
    """Whether arrays in `source` can be brought into `target`: not if an unreduced maximum
    would have to be an unreduced sum."""
    return reduce == "sum" or not set(source.partial) & set(target.partial)


def run_plan(flow: Flow, plan: Plan, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The step's outputs as the lowered program computes them on virtual devices."""
    return outputs(flow, plan, lowered(flow, plan), inputs)


def lowered(flow: Flow, plan: Plan) -> Program:
    return lower(flow, plan, Resharder(plan.sizes, unit_price, flow.uneven))


def outputs(
    flow: Flow, plan: Plan, program: Program, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What `program`, lowered from `plan`, computes, its shards put together."""
    shards = {
        name: shard(np.asarray(inputs[name], dtype=float), _home(flow, plan, name), plan.axes)
        for name in flow.graph.inputs
    }
    outs = Interpreter(program).run(shards)
    found = {}
    for name, parts in outs.items():
        old = flow.graph.aliases.get(name)
        spec = _output(flow, plan, name) if old is None else _home(flow, plan, old)
        found[name] = unshard(parts, spec, plan.axes)
    return found


def _output(flow: Flow, plan: Plan, tensor: str) -> Spec:
    """Where a step leaves a result that takes over no input's memory."""
    return plan.homes[f"{tensor}@output"]


def _home(flow: Flow, plan: Plan, tensor: str) -> Spec:
    home, lead = flow.home_of[tensor]
    spec = plan.homes[flow.homes[home].tensor]
    return Spec(spec.dims[lead:], spec.partial)


def expected(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = reference.evaluate(graph, inputs)
    return {name: values[name] for name in graph.outputs}
