"""The fewest annotations from which propagation recovers a plan.

Annotations are dropped as long as what propagation makes of the rest is, priced, within
MAX_SLOWDOWN and MAX_GROWTH of the plan, and none can be dropped in the end. Compilers settle
disagreements between tensors differently: a set of annotations counts only if it recovers the plan
whichever is followed, and leaves no dispute (planner.sharding.agreement) that all annotations
together would not. Plans differ in that, so the search also starts from one with few disputes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from planner.annotations import Axes, annotated, stacked_dims
from planner.errors import InputError
from planner.graph.core import Graph, Op
from planner.pins import PinError, copies_of_parameters
from planner.planning import Infeasible, Options, Unsolved, agreeing_plan, price_annotations
from planner.progress import Progress
from planner.result import Result
from planner.sharding.agreement import Agreement
from planner.sharding.formulate import Unsatisfiable
from planner.sharding.propagate import propagate
from planner.sharding.spec import Spec

MAX_SLOWDOWN = 0.01  # plans within 1 % of the step time count as equally good
MAX_GROWTH = 0.05  # of the peak memory: a plan that fits may not eat all the room that is left
# Of the step time that a plan may be slower to avoid a dispute: what ends within MAX_SLOWDOWN.
DISPUTE_SHARES = (0.003, 0.001, 0.0003)
Names = tuple[str, ...]


@dataclass(frozen=True)
class Minimal:
    """`annotations` are the ones that are left, `result` the plan that they stand for. The plan
    that was asked for has `count` annotations. Like layers count as one and have one."""

    annotations: Mapping[str, Axes]
    result: Result
    count: int


def minimal(
    result: Result, options: Options | None = None, progress: Progress | None = None
) -> Minimal:
    """Raises InputError for a pipeline, or if no annotations stand for the plan."""
    if result.model.pipeline is not None:
        raise InputError("--minimal is not for pipelines", "their stages are programs of their own")
    options = options or Options()
    starts = [*_agreeing(result, options), result]
    # As good as the plan, or as all of its annotations: these bind gradients that the plan lays
    # otherwise, and what it keeps in memory, so that they may stand for a slower or larger step.
    for aim in (result, _read(result, _told(result), options)):
        if aim is None:
            break
        searches = [_Search(result, aim, _told(start), options, progress) for start in starts]
        found = [search for search in searches if search.smallest()]
        if found:
            best = min(found, key=lambda search: len(search.names))
            priced = best.priced(best.names)
            assert priced is not None  # it was accepted
            kept = {name: best.annotations[name] for name in best.names}
            return Minimal(kept, priced, len(annotated(result)))
    raise InputError(f"{result.model.name}: propagation recovers the plan from no annotations")


def completed(
    result: Result, annotations: Mapping[str, Axes], smallest: bool = False
) -> dict[str, Axes]:
    """What propagation makes of a few annotations: the axes of every tensor of the model."""
    graph = result.model.graph
    tensors = graph.all_tensors()
    given = {}
    for name, axes in annotations.items():
        whole = len(tensors[name].shape) - len(axes)  # stacked dimensions are left out
        given[name] = Spec((*((),) * whole, *axes))
    specs = propagate(graph, given, dict(result.mesh.axes), smallest)
    names = [a.name for a in annotated(result)]
    return {name: specs[name].dims[stacked_dims(tensors[name]) :] for name in names}


def _agreeing(result: Result, options: Options) -> Iterator[Result]:
    """A plan that is about as fast and as large and leaves less to be settled, if there is one."""
    if result.fits:
        room = int(result.memory.peak_bytes * (1 + MAX_GROWTH))
        options = replace(options, memory_bytes=room, headroom=0.0)
    for share in DISPUTE_SHARES:
        dispute_s = share * result.timing.step_time_s
        try:
            found = agreeing_plan(result.model, result.mesh, options, dispute_s)
        except (Infeasible, Unsolved):
            return
        if found.timing.step_time_s <= result.timing.step_time_s * (1 + MAX_SLOWDOWN):
            yield found
            return


def _read(plan: Result, axes: Mapping[str, Axes], options: Options) -> Result | None:
    """What annotations stand for; None if for no plan."""
    try:
        return price_annotations(plan.model, plan.mesh, axes, options)
    except (PinError, Unsatisfiable, Unsolved):
        return None


def _told(start: Result) -> dict[str, Axes]:
    """The annotations of a plan. Where its one reader wants an axis to leave a sum, a tensor is
    annotated as it is read: it is moved before."""
    found = {a.name: a.axes for a in annotated(start)}
    agreement = Agreement(start.graph)
    reads: dict[str, set[Spec]] = {}
    for op in _forward(start.graph):
        for i, name in enumerate(op.ins):
            reads.setdefault(name, set()).add(start.plan.choices[op.name].operand(op.rule, i))
    for name, ways in reads.items():
        if name in found and len(ways) == 1:
            (read,) = ways
            if agreement.leaves_sum(name, start.specs[name], read):
                found[name] = read.without_partial().dims
    return found


@dataclass
class _Search:
    """`aim`: what the annotations must be as good as. `names`: those that are left."""

    plan: Result
    aim: Result
    annotations: Mapping[str, Axes]
    options: Options
    progress: Progress | None
    agreement: Agreement = field(init=False)
    names: Names = ()
    inherent: float = 0.0  # disputes that no annotation avoids
    reached: bool = False  # whether `names` recover the plan
    seen: dict[tuple[tuple[str, Axes], ...], Result | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.plan.graph)

    def smallest(self) -> bool:
        """Drops halves, quarters, … and single ones of each group, then of all single ones, until
        none can go. Whether what is left recovers the plan.

        All annotations together may not: they bind gradients that the plan lays otherwise.
        """
        groups = _groups(self.plan.model.graph, self.annotations)
        self.names = tuple(name for group in reversed(groups) for name in group)
        everything = self.priced(self.names)
        if everything is None:
            return False
        self.inherent = self.disputes(everything, self.names)
        self.reached = self.recovers(self.names)
        for group in groups:
            size = len(group)
            while size:
                self.drop(group, size)
                size //= 2
        count = 0
        while count != len(self.names):  # dropping one may make another superfluous
            count = len(self.names)
            self.drop(self.names, 1)
        return self.reached

    def drop(self, names: Names, size: int) -> None:
        """Tries to drop `size` of `names` at a time, the last ones first."""
        left = [n for n in names if n in self.names]
        for stop in range(len(left), 0, -size):
            part = left[max(stop - size, 0) : stop]
            rest = tuple(n for n in self.names if n not in part)
            if self.recovers(rest):
                self.reached = True
            elif self.reached or not self.nears(rest):
                continue
            self.names = rest
            self.say(f"{len(rest)} annotations")

    def recovers(self, names: Names) -> bool:
        """Whether all ways to settle disagreements lead to what is as good as the plan."""
        limit_s = self.aim.timing.step_time_s * (1 + MAX_SLOWDOWN)
        limit_bytes = self.aim.memory.peak_bytes * (1 + MAX_GROWTH)
        for smallest in (False, True):
            found = self.priced(names, smallest)
            if found is None or found.timing.step_time_s > limit_s:
                return False
            if found.memory.peak_bytes > limit_bytes or found.fits != self.aim.fits:
                return False
            if self.disputes(found, names) > self.inherent:
                return False
        return True

    def disputes(self, found: Result, names: Names) -> float:
        """What no annotation settles: one of an op's result says how its operands are read,
        except that an axis is to leave a sum."""
        total = 0.0
        order = [axis for axis, _ in found.mesh.axes]
        for op in _forward(found.graph):
            choice, made = found.plan.choices[op.name], op.outs[0]
            for i, name in enumerate(op.ins):
                if name not in found.specs:
                    continue
                lies, read = found.specs[name], choice.operand(op.rule, i)
                if made not in names or self.agreement.leaves_sum(name, lies, read):
                    total += self.agreement.between(name, lies, read)
            if made not in names and made in found.specs:
                result = choice.result(op.rule, 0, order).without_partial()
                total += self.agreement.between(made, result, found.specs[made])
        return total

    def nears(self, names: Names) -> bool:
        """Whether fewer annotations are at least not slower, or larger."""
        now, then = self.priced(self.names), self.priced(names)
        if now is None or then is None:
            return False
        return (
            then.timing.step_time_s <= now.timing.step_time_s
            and then.memory.peak_bytes <= now.memory.peak_bytes
        )

    def priced(self, names: Names, smallest: bool = False) -> Result | None:
        """The plan that the annotations stand for; None if they stand for none."""
        axes = completed(self.plan, {n: self.annotations[n] for n in names}, smallest)
        key = tuple(axes.items())
        if key not in self.seen:
            self.seen[key] = _read(self.plan, axes, self.options)
        return self.seen[key]

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)


def _forward(graph: Graph) -> Iterator[Op]:
    return (op for op, _ in graph.walk() if op.phase == "forward")


def _groups(graph: Graph, annotations: Mapping[str, Axes]) -> tuple[Names, Names, Names]:
    """What a program would annotate, the other way round from how people do it: activations, the
    parameters, largest first, and what loops hand on.

    Casts lie like what is cast, and what enters and leaves a loop like what it hands on: a
    compiler is told best in the loop.
    """
    carries = [carry for loop in graph.loops() for carry in loop.carries]
    entries = [c.entry for c in carries if c.entry in annotations]
    hidden = copies_of_parameters(graph).union(entries)
    hidden |= {name for c in carries for name in (c.init, c.result, c.exit)}
    tensors = graph.all_tensors()
    named = [tensors[n] for n in annotations if n not in hidden]
    parameters = sorted(
        (t for t in named if t.role == "parameter"), key=lambda t: prod(t.shape), reverse=True
    )
    rest = tuple(t.name for t in named if t.role != "parameter")
    return rest, tuple(t.name for t in parameters), tuple(entries)
