"""The driver: a model and a mesh in, the fastest plan that fits out.

Only the order of the stages belongs here: derive the step, lay out its flow, solve the ILP with
memory constraints added where the lowered program exceeds the limit, simulate what was found.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import inf, prod, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import meshes
from costmodels.compiled import as_compiled
from costmodels.exposure import Moved, exposed_shares
from costmodels.memory import Memory, read_memory
from costmodels.program import ITEM_BYTES, Program
from costmodels.simulate import Timing, simulate
from meshes import LogicalMesh
from planner.graph.ahead import casts_ahead
from planner.graph.core import Graph
from planner.graph.derive import step_of
from planner.graph.flops import count_flops
from planner.ilp import Look, Outcome, Problem, quick_bound, solve
from planner.ilp.clock import Clock
from planner.lowering.inside import inside_products
from planner.lowering.lower import lower, resolve_specs
from planner.model import Model, Training
from planner.pins import (
    Annotation,
    Meaning,
    PinError,
    in_loop,
    in_loops,
    part_copies,
    pinned_specs,
    saved_values,
)
from planner.plan import Plan, Proof
from planner.progress import Progress
from planner.report.unfit import explain
from planner.result import Result
from planner.sharding.flow import Flow, Home, build_flow
from planner.sharding.formulate import HomeSeconds, Space, least_compute, mesh_resharder
from planner.sharding.reshard import Resharder
from planner.sharding.spec import Spec
from planner.tying import tied_annotation, tied_meshes, untied
from planner.weighting import (
    GUESSED_AXES,
    GUESSES,
    LATER,
    LOOK,
    PLAIN,
    PROMISE,
    ROUNDS,
    Counts,
    Exposure,
    Seen,
    Weights,
    settled,
)

if TYPE_CHECKING:
    from planner.pipelining.planning import PipelinePlanning

DEFAULT_HEADROOM = 0.1  # how much more than predicted a compiler may need
EXACT_AXES = 3  # above, two axes are tied: the choices would not fit in memory
WORK_LIMIT = 30  # branch-and-bound nodes of one solve: the same answer on every machine
ENOUGH_GAP = 0.001  # differences of simulated times below this are noise
LOOSE_GAP = 0.01  # where the surrogate is rough, or constraints for memory are still to come
SOLVE_SHARE = 0.5  # of the time left that one solve may take: others may have to follow
TIE_SHARE = 1e-3  # of the time in which memory is read: what holding it counts, to settle ties
LAST_SHARE = 0.1  # of the time limit that is too short for another solve
MEMORY_ROUNDS = 40  # additions of memory constraints before giving up
LEAST_MEMORY_ROUNDS = 6  # limits tried between what is proven too little and what is enough
LEAST_MEMORY_GAP = 0.1  # how far above the least possible peak is near enough
LEAST_MEMORY_COST_GAP = 0.1  # any plan within such a limit will do, but not one absurdly slow


@dataclass(frozen=True)
class Options:
    """How to plan. `memory_bytes`: limit per device instead of the chip's own. Without
    `least_memory`, no plan is looked for once nothing fits (it takes longer than the proof). What
    has no promise to be faster than `to_beat_s` is given up. `known`: of meshes (by `meshes.alike`)
    what has been seen without constraints, `like`: of this mesh what a similar model has shown.
    `gap`: how far above the least surrogate cost is near enough, if more than by default."""

    memory_bytes: int | None = None
    headroom: float = DEFAULT_HEADROOM
    time_limit_s: float | None = None
    seed: int = 0
    backend: str = "auto"
    least_memory: bool = True
    to_beat_s: float = inf
    known: Mapping[Hashable, Seen] = field(default_factory=dict, compare=False)
    like: Seen | None = field(default=None, compare=False)
    gap: float = 0.0


class Infeasible(Exception):
    """No plan fits (proven). `result`: the plan of least memory found, priced."""

    def __init__(self, result: Result, explanation: tuple[str, ...]) -> None:
        super().__init__(explanation[0])
        self.result = result
        self.explanation = explanation


class Unsolved(Exception):
    """The limits on time or work ended the search before any plan was found."""


class NoPromise(Unsolved):
    """A first look says that the step will take longer than what is to be beaten, or a bound."""

    def __init__(self, message: str, bound_s: float = 0.0) -> None:
        super().__init__(message)
        self.bound_s = bound_s


class NothingFits(Unsolved):
    """Proven, and the plan of least memory was not asked for."""


def plan_model(
    model: Model, mesh: LogicalMesh, options: Options | None = None,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """The fastest plan that fits; `model.constraints` are kept.

    Raises Infeasible (with the least-memory plan), Unsolved, or PinError.
    """
    return _planning(model, mesh, options, model.constraints, progress).best()


def agreeing_plan(
    model: Model, mesh: LogicalMesh, options: Options | None, dispute_s: float,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """A plan that may take `dispute_s` seconds longer for every dispute that it avoids (see
    planner.sharding.agreement). Not for pipelines. Raises what `plan_model` raises."""
    annotation = in_loops(model.constraints, model.members)
    return Planning(
        model, mesh, options or Options(), annotation, progress, dispute_s=dispute_s
    ).best()


def surrogate_bound(model: Model, mesh: LogicalMesh, enough_s: float = inf) -> float:
    """Seconds that no plan's serial time falls below, memory left aside: where the chip does
    not overlap communication, a bound of the step time. Quick: nothing is solved to the end, and
    a bound of `enough_s` is not improved. Nothing is known of pipelines: 0."""
    if model.pipeline is not None:
        return 0.0
    annotation = in_loops(model.constraints, model.members)
    planning = Planning(model, mesh, Options(), annotation, None, settles_ties=False)
    return quick_bound(planning.space.problem(None, []), enough_s)


def price_annotations(
    model: Model, mesh: LogicalMesh, annotation: Annotation, options: Options | None = None,
    as_laid: Collection[str] = (), meaning: Meaning = Meaning.PROGRAM,
) -> Result:  # fmt: skip
    """A given annotation, completed at least cost and priced: nothing is required to fit.

    Tensors that the annotation leaves open get what the surrogate finds cheapest, within the
    memory if that is possible. Annotated tensors in `as_laid` (and their cotangents and
    recomputations) are read as they lie, even where resharding them first would be cheaper, and
    with any, all are saved for the backward pass as they lie: what programs written by hand do.
    Raises PinError, and Unsatisfiable if no op can read them so.
    """
    options = replace(options or Options(), least_memory=False)
    planning = _planning(model, mesh, options, annotation, meaning=meaning, as_laid=as_laid)
    return planning.completed()


def reprice(
    model: Model, mesh: LogicalMesh, plan: Plan, annotation: Annotation,
    options: Options | None = None,
) -> Result:  # fmt: skip
    """A stored plan, lowered and read again; nothing is solved.

    `annotation` is the one the plan was made under. Raises ValueError if it does not belong to
    this model and mesh.
    """
    model = model.decided(plan.remat)
    return _planning(model, mesh, options, annotation).read(plan)


def _planning(
    model: Model, mesh: LogicalMesh, options: Options | None, annotation: Annotation,
    progress: Progress | None = None, meaning: Meaning = Meaning.CONSTRAINTS,
    as_laid: Collection[str] = (),
) -> Planning | PipelinePlanning:  # fmt: skip
    """How a model is planned, under an annotation in the names of its file."""
    laid = in_loops({n: a for n, a in annotation.items() if n in as_laid}, model.members)
    asked = in_loops(annotation, model.members)
    try:
        return _planning_of(
            model, mesh, options or Options(), asked, progress, meaning, frozenset(laid)
        )
    except PinError as error:
        names = {stack: name for name, stack in in_loop(annotation, model.members).items()}
        raise PinError(names.get(error.tensor, error.tensor), error.message) from None


def _planning_of(
    model: Model, mesh: LogicalMesh, options: Options, annotation: Annotation,
    progress: Progress | None, meaning: Meaning, laid: frozenset[str],
) -> Planning | PipelinePlanning:  # fmt: skip
    """In stages if the model's pipeline has several."""
    pipeline = model.pipeline
    if pipeline is None or dict(mesh.axes).get(pipeline.axis) == 1:
        return Planning(model, mesh, options, annotation, progress, meaning, laid)
    if not pipeline.inside:
        from planner.pipelining.stacked_planning import StackedPlanning  # a kind of Planning

        return StackedPlanning(model, mesh, options, annotation, progress, meaning, laid)
    from planner.pipelining.planning import PipelinePlanning  # it plans stages with Planning

    return PipelinePlanning(model, mesh, options, annotation, progress, meaning, laid)


@dataclass(frozen=True)
class Candidate:
    plan: Plan
    program: Program
    memory: Memory
    timing: Timing
    disputed_s: float = 0.0  # what its disputes count

    @property
    def seconds(self) -> float:
        return self.timing.step_time_s + self.disputed_s


@dataclass
class Planning:
    """Everything about planning one step on one mesh."""

    model: Model
    mesh: LogicalMesh
    options: Options
    annotation: Annotation
    progress: Progress | None
    meaning: Meaning = Meaning.CONSTRAINTS
    as_laid: frozenset[str] = frozenset()  # annotated tensors that are read as they lie
    dispute_s: float = 0.0  # what a dispute counts (see planner.sharding.agreement)
    settles_ties: bool = True  # whether of equal plans the one is taken that holds less
    graph: Graph = field(init=False)
    flow: Flow = field(init=False)
    follows: bool = True  # whether what a plan exposes decides what the next one pays for
    active: list[int] = field(default_factory=list)  # steps with a memory constraint
    slack: float = 0.0  # bytes by which the ILP has under-estimated a program
    leanest: Candidate | None = None  # of the plans seen the one of least peak
    solving_s: float = 0.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock.of(self.options.time_limit_s)
        self.say("deriving the step")
        step = self.step()
        self.graph = inside_products(step) if self.on_tpu else step
        self.flow = self.laid_out()
        limit = self.options.memory_bytes
        self.limit = int(self.mesh.chip.usable_bytes) if limit is None else limit

    def step(self) -> Graph:
        step = step_of(self.model, tuple(self.annotation), self.lean)
        return casts_ahead(step) if self.on_tpu else step

    @property
    def on_tpu(self) -> bool:
        return self.mesh.chip.family == "tpu"

    @property
    def lean(self) -> bool:
        """Whether the backward pass is ordered for memory: as TPUs' compiler does it, which
        programs tell to make gradients of weights first (see planner.export.placement)."""
        return self.on_tpu

    def laid_out(self) -> Flow:
        return build_flow(
            self.graph, self.pins(), uneven=self.model.uneven, reduce_once=self.reduces_once()
        )

    def reduces_once(self) -> bool:
        """Whether gradients may stay unreduced until the last part of the batch. Unasked, no: XLA
        reduces what a loop adds up in every iteration."""
        work = self.model.workload
        return isinstance(work, Training) and bool(work.reduce_once)

    def pins(self) -> dict[str, Spec]:
        pins = self.specs_of(self.annotation)
        if self.as_laid:
            pins = {**saved_values(self.graph, pins), **pins}
        if self.meaning is not Meaning.PROGRAM:
            return pins
        return {**pins, **part_copies(self.graph, pins)}

    def specs_of(self, annotation: Annotation) -> dict[str, Spec]:
        sizes = dict(self.mesh.axes)
        return pinned_specs(self.graph, annotation, sizes, self.model.uneven, self.meaning)

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)

    @cached_property
    def space(self) -> Space:
        self.say("pricing choices")
        rigid = {n: axes for n, axes in self.annotation.items() if n in self.as_laid}
        return Space(
            self.flow, self.mesh, self.home_seconds(), self.specs_of(rigid), self.check_time,
            narrow_first=not rigid,
        )  # fmt: skip

    def home_seconds(self) -> HomeSeconds:
        """What homes cost by themselves: so little that it settles nothing but ties."""
        sizes, rate = dict(self.mesh.axes), self.mesh.chip.hbm_bytes_per_s

        def seconds(home: Home, specs: Sequence[Spec]) -> NDArray[np.float64]:
            if not home.live or not self.settles_ties:
                return np.zeros(len(specs))
            size = np.array([prod(s.local_shape(home.shape, sizes)) for s in specs], dtype=float)
            return TIE_SHARE / rate * ITEM_BYTES[home.dtype] * size

        return seconds

    def check_time(self, needed_s: float = 0.0) -> None:
        if self.clock.left() <= needed_s:
            raise Unsolved("the time limit ended before a plan was found")

    @cached_property
    def prefetched(self) -> set[str]:
        """Parameters, what is made of them alone, and their gradients."""
        found = self.graph.of_parameters()
        return found | {self.graph.cotangents[t] for t in found if t in self.graph.cotangents}

    @cached_property
    def resharder(self) -> Resharder:
        return mesh_resharder(self.mesh, self.model.uneven)

    # ---- entry points ---------------------------------------------------------------------

    def best(self) -> Result:
        if sum(size > 1 for _, size in self.mesh.axes) > EXACT_AXES:
            return self.tied()
        return self.result(self.fastest(self.fitting))

    def fastest(self, find: Callable[[Counts], Candidate]) -> Candidate:
        """What `find` finds; where communication is hidden, of what it finds under many weights
        that which the simulator says is fastest."""
        if not self.mesh.chip.overlap:
            found = find(self.counts(PLAIN))
            return self.proven(found, found.plan.proof.status)
        seen: list[Candidate] = []
        status = ""
        try:
            for counts in self.countings(seen):
                seen.append(find(counts))
        except NoPromise:
            raise
        except Unsolved:  # the best so far is the answer
            if not seen:
                raise
            status = "time_limit" if self.clock.limited else ""
        found = fastest(seen)
        return self.proven(found, status or found.plan.proof.status)

    def proven(self, candidate: Candidate, status: str) -> Candidate:
        """With the time of all solves in its proof."""
        proof = replace(candidate.plan.proof, status=status, seconds=self.solving_s)
        return replace(candidate, plan=replace(candidate.plan, proof=proof))

    def countings(self, seen: Sequence[Candidate]) -> Iterator[Counts]:
        """What communication counts at first, then what has been exposed in the plans `seen`,
        which grow meanwhile, until their times settle. Raises NoPromise."""
        joined = (self.options.like or self.joined()) if self.follows else None
        guesses = () if joined else GUESSES
        yield from (self.counts(weights) for weights in guesses)
        if not self.follows:
            return
        exposure = Exposure()
        if joined:
            exposure.see(joined.exposed)
        else:
            # A plan that paid for all it moves has not shown how the rest would be hidden.
            hiding = [c for c, weights in zip(seen, GUESSES, strict=True) if weights != PLAIN]
            exposure.see(self.exposed(fastest(hiding)))
        guessed = self.counts(GUESSES[0])
        for n in range(ROUNDS):
            yield exposure.counts(self.flow.conversions, guessed)
            times = [c.seconds for c in seen]
            if n + 1 == LOOK:
                self.check_promise(min(times))
            late = min(times) > self.options.to_beat_s * (1 + LATER.get(n + 1, inf))
            if late or settled(times[len(guesses) :]):
                return
            exposure.see(self.exposed(seen[-1]))

    def exposed(self, candidate: Candidate) -> Mapping[Moved, float]:
        return exposed_shares(candidate.program, self.mesh)

    def check_promise(self, seconds: float) -> None:
        if seconds > self.options.to_beat_s * (1 + PROMISE):
            raise NoPromise("slower at first look")

    def joined(self) -> Seen | None:
        """Of the fastest plan where two of many axes are joined. Raises NoPromise."""
        if sum(size > 1 for _, size in self.mesh.axes) <= GUESSED_AXES:
            return None
        found = []
        for pair, mesh in tied_meshes(self.mesh, self.annotation):
            known = self.options.known.get(meshes.alike(mesh))
            if known is None or self.annotation:
                self.say(f"joining axes {pair[0]} and {pair[1]}")
                known = self._seen(mesh, tied_annotation(self.annotation, pair))
            if known is not None:
                found.append(known)
        if not found:
            return None
        best = min(found, key=lambda s: s.step_s)
        self.check_promise(best.step_s)
        return best

    def _seen(self, mesh: LogicalMesh, annotation: Annotation) -> Seen | None:
        options = replace(self.options, least_memory=False, to_beat_s=inf)
        planning = Planning(
            self.model, mesh, options, annotation, self.progress, dispute_s=self.dispute_s
        )
        planning.clock = self.clock
        try:
            found = planning.fastest(planning.fitting)
        except Unsolved:
            return None
        finally:
            self.solving_s += planning.solving_s
        return Seen(found.timing.step_time_s, planning.exposed(found))

    def tied(self) -> Result:
        """Of the plans that tie two axes the fastest; the bound is that of the computation."""
        found: list[tuple[float, Plan]] = []
        slower: NoPromise | None = None
        cut = False
        for pair, mesh in tied_meshes(self.mesh, self.annotation):
            self.say(f"tying axes {pair[0]} and {pair[1]}")
            tied = tied_annotation(self.annotation, pair)
            planning = Planning(
                self.model, mesh, self.options, tied, self.progress, dispute_s=self.dispute_s
            )
            planning.clock = self.clock
            try:
                result = planning.best()
            except NoPromise as error:
                slower = error
                continue
            except Unsolved:  # the best so far is the answer
                if not found:
                    raise
                cut = True
                break
            found.append((result.timing.step_time_s, untied(result.plan, pair, self.mesh)))
        if slower is not None and not found:
            raise slower
        if not found:
            raise Unsolved(
                f"a mesh of more than {EXACT_AXES} axes is planned with two of them tied, "
                "but the constraints separate every pair"
            )
        plan = min(found, key=lambda entry: entry[0])[1]
        objective = plan.proof.objective_s
        bound, gap = inf, inf  # unknown
        if not cut:
            bound = least_compute(self.flow, self.mesh, self.clock)
            gap = (objective - bound) / objective
        seconds = sum(p.proof.seconds for _, p in found)
        proof = Proof("time_limit" if cut else "heuristic", objective, bound, gap, seconds)
        return self.result(self.lowered(replace(plan, proof=proof)))

    def completed(self) -> Result:
        """What is left open fits if it can: least cost alone would replicate what costs nothing.
        No trouble is taken to hide more than others do who annotate so."""
        self.follows = False
        try:
            found = self.fastest(self.fitting)
        except Unsolved:
            found = self.fastest(self.unlimited)
        proof = replace(found.plan.proof, status="given")
        return self.result(replace(found, plan=replace(found.plan, proof=proof)))

    def read(self, plan: Plan) -> Result:
        self.check(plan)
        return self.result(self.lowered(plan))

    def check(self, plan: Plan) -> None:
        """Raises ValueError if the plan is for something else."""
        factors = {
            site.op.origin or name: len(site.op.rule.factors)
            for name, site in self.flow.sites.items()
        }
        ranks = {home.tensor: len(home.shape) for home in self.flow.homes}
        if factors != {name: len(choice.split) for name, choice in plan.choices.items()} or (
            ranks != {tensor: len(spec.dims) for tensor, spec in plan.homes.items()}
        ):
            raise ValueError("the plan does not belong to this model")
        if plan.axes != self.mesh.axes:
            raise ValueError(f"the plan is for mesh {plan.axes}, not {self.mesh.axes}")

    # ---- the ILP with memory ---------------------------------------------------------------

    @property
    def enough_gap(self) -> float:
        """How near to the least surrogate cost is near enough."""
        rough = self.follows and self.mesh.chip.overlap
        return max(LOOSE_GAP if rough else ENOUGH_GAP, self.options.gap)

    def fitting(self, counts: Counts) -> Candidate:
        """Least surrogate cost among the plans that fit."""
        found = self.within(self.target, counts, self.enough_gap)
        if found is not None:
            return found
        if not self.options.least_memory:
            raise NothingFits("nothing fits")
        raise self.infeasible()

    def unlimited(self, counts: Counts) -> Candidate:
        """Least surrogate cost, whatever memory it takes."""
        return self.candidate(self.solved(None, counts, self.enough_gap))

    def within(self, target: float, counts: Counts, gap: float) -> Candidate | None:
        """Least surrogate cost among the plans whose peak is at most `target`; constraints are
        added as needed. None if there is none. Raises NoPromise."""
        fits: list[Candidate] = []

        def worth(outcome: Outcome) -> bool:
            """A plan near the least cost shows whether constraints are still to come."""
            candidate = self.candidate(outcome)
            if candidate.memory.peak_bytes > target:
                return False
            fits.append(candidate)
            return True

        for _ in range(MEMORY_ROUNDS):
            limited = target - self.slack if self.active else None
            early = LOOSE_GAP if self.active and gap < LOOSE_GAP else 0.0
            outcome = self.solved(limited, counts, gap, Look(early, worth, self.hopeless_s))
            if outcome.status == "infeasible":
                break
            self.check_bound(outcome)
            candidate = self.candidate(outcome)
            if candidate.memory.peak_bytes <= target:
                fits.append(candidate)
                break
            self.constrain(candidate.memory, target, outcome.peak)
        else:
            if not fits:
                raise Unsolved(f"memory constraints did not settle in {MEMORY_ROUNDS} rounds")
        return reduce(better, fits) if fits else None

    @property
    def hopeless_s(self) -> float:
        """Where the surrogate is the step time: of what bound it cannot beat what it is to beat."""
        return inf if self.mesh.chip.overlap else self.options.to_beat_s * (1 - ENOUGH_GAP)

    def check_bound(self, outcome: Outcome) -> None:
        if outcome.bound >= self.hopeless_s:
            raise NoPromise("slower", outcome.bound)

    @property
    def target(self) -> float:
        """Predicted peak that still fits, headroom included."""
        return self.limit / (1 + self.options.headroom)

    def constrain(self, memory: Memory, target: float, counted: float) -> None:
        """Constraints at the steps that exceed the limit most, one for each hump of the profile.
        `counted`: bytes that the ILP counts of the plan."""
        new = [t for t in humps(memory.profile, target) if t not in self.active]
        if new:
            self.active = sorted({*self.active, *new})
            self.say(f"{len(self.active)} memory constraints")
            return
        # It must not come again, however little of it the ILP counts.
        self.slack = max(self.slack, target - counted) + memory.peak_bytes - target + 1

    def solved(
        self, limit: float | None, counts: Counts, gap: float, look: Look | None = None
    ) -> Outcome:
        self.check_time(LAST_SHARE * (self.options.time_limit_s or 0.0))
        problem = self.problem(limit, counts)
        self.say(f"solving for {problem.size} decisions")
        time_limit = self.clock.left() * SOLVE_SHARE if self.clock.limited else None
        outcome = solve(
            problem, backend=self.options.backend, time_limit=time_limit,
            work_limit=WORK_LIMIT, seed=self.options.seed, gap=gap, look=look,
        )  # fmt: skip
        self.solving_s += outcome.seconds
        return outcome

    def counts(self, weights: Weights) -> list[float]:
        """What a second of each conversion counts."""
        ahead, waiting = weights
        return [ahead if c.tensor in self.prefetched else waiting for c in self.flow.conversions]

    def problem(self, limit: float | None, counts: Counts) -> Problem:
        """What is solved, with memory constraints at the active steps."""
        return self.space.problem(limit, self.active, counts, self.dispute_s)

    def infeasible(self) -> Infeasible:
        """The plan of least memory, between what is proven too little and the least peak seen."""
        if self.leanest is None:
            raise Unsolved("no plan found (infeasible)")
        self.say("nothing fits: looking for the plan of least memory")
        too_little = self.target
        for _ in range(LEAST_MEMORY_ROUNDS):
            enough = self.leanest.memory.peak_bytes
            if too_little >= enough * (1 - LEAST_MEMORY_GAP):
                break
            middle = sqrt(too_little * enough)
            try:
                found = self.within(middle, self.counts(PLAIN), LEAST_MEMORY_COST_GAP)
            except Unsolved:  # the least so far is the answer
                break
            if found is None:
                too_little = middle
        best = self.leanest
        # Nothing is known of the least time at this limit.
        unknown = Proof("infeasible", inf, inf, inf, self.solving_s)
        result = self.result(replace(best, plan=replace(best.plan, proof=unknown)))
        return Infeasible(result, explain(result))

    # ---- readings -------------------------------------------------------------------------

    def candidate(self, outcome: Outcome, status: str = "") -> Candidate:
        found = self.lowered(self.candidate_plan(outcome, status))
        if self.dispute_s and outcome.choice is not None:
            disputes = self.space.disputes(outcome.choice.tolist())
            found = replace(found, disputed_s=self.dispute_s * disputes)
        if self.leanest is None or found.memory.peak_bytes < self.leanest.memory.peak_bytes:
            self.leanest = found
        return found

    def candidate_plan(self, outcome: Outcome, status: str = "") -> Plan:
        if outcome.choice is None:
            raise Unsolved(f"no plan found ({outcome.status})")
        proof = Proof(
            status or outcome.status, outcome.cost, outcome.bound, outcome.gap, outcome.seconds
        )
        plan = self.space.plan(outcome.choice.tolist(), proof)
        objective = outcome.cost - self.ties(plan)
        proof = replace(proof, objective_s=objective, bound_s=min(outcome.bound, objective))
        return replace(plan, proof=proof)

    def ties(self, plan: Plan) -> float:
        """What settled ties, of the surrogate cost of a plan: no seconds of anything."""
        held = Planning.home_seconds(self)
        return sum(float(held(home, [plan.homes[home.tensor]])[0]) for home in self.flow.homes)

    def lowered(self, plan: Plan) -> Candidate:
        program = as_compiled(lower(self.flow, plan, self.resharder), self.mesh)
        return Candidate(plan, program, read_memory(program), simulate(program, self.mesh))

    def result(self, c: Candidate) -> Result:
        return Result(
            self.model, self.mesh, self.graph, c.plan, c.program, c.timing, c.memory,
            count_flops(self.graph), self.limit, self.options.headroom,
            resolve_specs(self.flow, c.plan, self.resharder), self.mesh.topology.notes,
        )  # fmt: skip


def fastest(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda c: c.seconds)


def better(a: Candidate, b: Candidate) -> Candidate:
    """Of two solutions of one problem that of less cost, with the better of both bounds."""
    found = min(a, b, key=lambda c: c.plan.proof.objective_s)
    bound = max(c.plan.proof.bound_s for c in (a, b))
    objective = found.plan.proof.objective_s
    gap = max(0.0, (objective - bound) / objective)
    proof = replace(found.plan.proof, bound_s=min(bound, objective), gap=gap)
    return replace(found, plan=replace(found.plan, proof=proof))


def humps(profile: Sequence[int], limit: float) -> list[int]:
    """The highest step of every run of steps above the limit."""
    found: list[int] = []
    inside = False
    for t, size in enumerate(profile):
        if size <= limit:
            inside = False
        elif not inside or size > profile[found[-1]]:
            found[-1:] = [t] if inside else [*found[-1:], t]
            inside = True
    return found
