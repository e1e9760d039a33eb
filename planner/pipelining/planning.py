"""Planning a pipelined model: cut, plan every kind of stage, connect, read.

Stages of one kind differ only in their number of layers and share one solution. The first kind
planned settles how what crosses between stages lies; the others keep to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from costmodels.pipeline import PipelineProgram, StageProgram
from costmodels.pipeline_memory import read_pipeline_memory
from costmodels.pipeline_time import simulate_pipeline, slowest
from costmodels.schedule import ScheduleError, Table, most_waiting, schedule
from meshes import LogicalMesh
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.graph.flops import count_flops
from planner.graph.fuse import fuse_graph
from planner.ilp.clock import Clock
from planner.lowering.lower import resolve_specs
from planner.model import Model, Pipeline
from planner.pins import Annotation, Meaning, pinned_specs
from planner.pipelining.cuts import stage_starts
from planner.pipelining.pieces import Piece, PipelineError, cut
from planner.pipelining.stage_planning import Crossing, StagePlanning
from planner.plan import Plan, Proof
from planner.planning import Infeasible, Options, Progress
from planner.report.unfit import explain
from planner.result import PlannedStage, Result
from planner.sharding.choices import Choice
from planner.sharding.formulate import least_compute
from planner.sharding.spec import Spec

Solver = Callable[[StagePlanning], Plan]


@dataclass
class PipelinePlanning:
    """Everything about planning one pipelined step on one mesh."""

    model: Model
    mesh: LogicalMesh
    options: Options
    annotation: Annotation
    progress: Progress | None
    meaning: Meaning = Meaning.CONSTRAINTS
    as_laid: frozenset[str] = frozenset()
    graph: Graph = field(init=False)  # the whole step, as if on one device
    clock: Clock = field(init=False)
    unfit: bool = False  # whether a stage was found that fits under no plan

    def __post_init__(self) -> None:
        self.clock = Clock.of(self.options.time_limit_s)
        axes = dict(self.mesh.axes)
        if self.pipeline.axis not in axes:
            raise PipelineError(
                f"the mesh has no axis '{self.pipeline.axis}' for the pipeline; "
                f"it has {', '.join(axes)}",
                f"name it in the shape: {self.pipeline.axis}=4,…",
            )
        self.graph = training_step(self.model, keep=tuple(self.annotation))
        # Raises if it cannot hold.
        pinned_specs(self.graph, self.annotation, dict(self.inner.axes), self.model.uneven)

    @property
    def pipeline(self) -> Pipeline:
        if self.model.pipeline is None:
            raise PipelineError(f"{self.model.name} has no pipeline")
        return self.model.pipeline

    @cached_property
    def inner(self) -> LogicalMesh:
        """The axes that shard a stage, on the links where they are."""
        return self.mesh.without(self.pipeline.axis)

    @cached_property
    def table(self) -> Table:
        devices = dict(self.mesh.axes)[self.pipeline.axis]
        parts = self.model.training.parts
        try:
            return schedule(self.pipeline.schedule, devices, self.pipeline.interleave, parts)
        except ScheduleError as error:
            raise PipelineError(str(error)) from None

    @cached_property
    def forward(self) -> Graph:
        return fuse_graph(self.model.graph, tuple(self.annotation))

    # ---- entry points -------------------------------------------------------------------------

    def best(self) -> Result:
        """The fastest plan found in which every stage fits."""
        result = self.planned(self._best_of)
        if self.unfit:
            raise Infeasible(result, explain(result))
        return result

    def completed(self) -> Result:
        """The annotation completed at least cost; nothing is required to fit."""
        return self.planned(lambda stage: stage.completed().plan)

    def read(self, plan: Plan) -> Result:
        """A stored plan, lowered and read again."""
        kinds = Kinds.of(cut(self.forward, plan.starts))
        if len(kinds.numbers) != len(plan.pieces):
            raise ValueError("the plan does not belong to this model")
        pieces = [replace(piece, axes=self.inner.axes) for piece in plan.pieces]
        return self.result(kinds, pieces, plan.starts, plan.proof)

    # ---- planning -----------------------------------------------------------------------------

    def planned(self, solve: Solver) -> Result:
        stages = len(self.table) * self.pipeline.interleave
        starts = stage_starts(self.forward, stages, self.inner, self.model.uneven)
        kinds = Kinds.of(cut(self.forward, starts))
        settled: dict[Crossing, Spec] = {}
        plans: dict[int, Plan] = {}
        for kind in kinds.by_weight():
            plans[kind] = self._planned_kind(kinds, kind, settled, solve)
        ordered = [plans[kind] for kind in range(len(kinds.numbers))]
        return self.result(kinds, ordered, starts, self._proof(kinds, ordered))

    def _planned_kind(
        self, kinds: Kinds, kind: int, settled: dict[Crossing, Spec], solve: Solver
    ) -> Plan:
        """The plan of a kind; what it is the first to decide becomes `settled`."""
        self._say(f"stage kind {kind + 1} of {len(kinds.numbers)}")
        piece, copies = kinds.largest(kind), self._in_flight(kinds, kind)
        stage = self.stage(piece, settled, copies)
        if not settled.keys() >= stage.edges.keys():
            found = self.stage(piece, settled, copies, settling=True).settled()
            settled.update({key: spec for key, spec in found.items() if key not in settled})
            stage = self.stage(piece, settled, copies)
        return solve(stage)

    def _best_of(self, stage: StagePlanning) -> Plan:
        try:
            return stage.best().plan
        except Infeasible as error:
            self.unfit = True
            return error.result.plan

    def _proof(self, kinds: Kinds, plans: Sequence[Plan]) -> Proof:
        """Of the costliest stage. The bound is that of its computation: cut and crossings are
        not proven to be the best."""
        heaviest = max(range(len(plans)), key=lambda kind: plans[kind].proof.objective_s)
        found = plans[heaviest].proof
        seconds = sum(plan.proof.seconds for plan in plans)
        if found.status == "given" or self.unfit:
            return replace(found, seconds=seconds)
        stage = self.stage(kinds.largest(heaviest), {})
        bound = least_compute(stage.flow, self.inner, self.clock)
        gap = 1 - bound / found.objective_s
        return Proof("heuristic", found.objective_s, bound, gap, seconds)

    def _in_flight(self, kinds: Kinds, kind: int) -> int:
        """The most microbatches in flight on any device with a stage of a kind."""
        places = {number % len(self.table) for number in kinds.numbers[kind]}
        return max(most_waiting(self.table[place]) for place in places)

    def stage(
        self, piece: Piece, settled: Mapping[Crossing, Spec], copies: int = 1,
        settling: bool = False,
    ) -> StagePlanning:  # fmt: skip
        """The planning of `piece`, of which a device holds `copies` microbatches."""
        names = {*piece.graph.all_tensors(), *self._states(piece.graph)}
        local = {**{name: name for name in names}, **{v: k for k, v in piece.received.items()}}
        annotation = {
            name: self.annotation[key] for name, key in local.items() if key in self.annotation
        }
        stage = StagePlanning(
            self.model, self.inner, self.options, annotation, self.progress, self.meaning,
            self.as_laid, piece=piece, whole=self.mesh, axis=self.pipeline.axis, crossing=settled,
            copies=copies, chunks=self.pipeline.interleave, settling=settling,
        )  # fmt: skip
        stage.clock = self.clock
        return stage

    def _states(self, piece: Graph) -> set[str]:
        """Annotated optimizer states of the parameters of a piece."""
        own = tuple(f"{parameter.name}." for parameter in piece.parameters())
        forward = self.model.graph.all_tensors()
        return {n for n in self.annotation if n not in forward and n.startswith(own)}

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)

    # ---- readings -----------------------------------------------------------------------------

    def result(
        self, kinds: Kinds, plans: Sequence[Plan], starts: tuple[int, ...], proof: Proof
    ) -> Result:
        made: dict[tuple[int, int], tuple[StageProgram, PlannedStage]] = {}  # (kind, layers) →
        specs: dict[str, Spec] = {}
        found = []
        for piece, kind in zip(kinds.pieces, kinds.kind_of, strict=True):
            key = (kind, piece.layers)
            if key not in made:
                stage = self.stage(piece, {})
                stage.check(plans[kind])
                own = resolve_specs(stage.flow, plans[kind], stage.resharder)
                planned = PlannedStage(piece, stage.graph, plans[kind], own)
                made[key] = stage.stage(plans[kind]), planned
                for name, spec in own.items():
                    specs.setdefault(name, spec)
            found.append(made[key])
        programs, stages = zip(*found, strict=True)
        axis = self.pipeline.axis
        program = PipelineProgram(self.mesh.axes, axis, programs, self.table)
        program = replace(program, reported=slowest(program, self.mesh))
        choices: dict[str, Choice] = {}
        for plan in plans:
            choices.update(plan.choices)
        limit = self.options.memory_bytes
        return Result(
            self.model, self.mesh, self.graph,
            Plan(self.mesh.axes, choices, {}, proof, tuple(plans), starts), program,
            simulate_pipeline(program, self.mesh), read_pipeline_memory(program),
            count_flops(self.graph),
            int(self.mesh.chip.usable_bytes) if limit is None else limit,
            self.options.headroom, specs, self.mesh.topology.notes, stages,
        )  # fmt: skip


@dataclass(frozen=True)
class Kinds:
    """Pieces and which of them are alike: `numbers[k]` are those of kind k, `kind_of` the
    reverse."""

    pieces: tuple[Piece, ...]
    numbers: tuple[tuple[int, ...], ...]
    kind_of: tuple[int, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Kinds:
        found: dict[tuple[object, ...], list[int]] = {}
        for number, piece in enumerate(pieces):
            found.setdefault(piece.kind, []).append(number)
        order = list(found)
        kind_of = tuple(order.index(piece.kind) for piece in pieces)
        return cls(tuple(pieces), tuple(map(tuple, found.values())), kind_of)

    def largest(self, kind: int) -> Piece:
        """Of a kind the piece with most layers."""
        return max((self.pieces[n] for n in self.numbers[kind]), key=lambda piece: piece.layers)

    def by_weight(self) -> list[int]:
        """Kinds, those with most layers in all first."""

        def layers(kind: int) -> int:
            return sum(self.pieces[n].layers for n in self.numbers[kind])

        return sorted(range(len(self.numbers)), key=lambda kind: -layers(kind))
