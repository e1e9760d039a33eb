"""A user's request carried out: find the model, place it, plan it or price what is given.

Joins the front ends with the planner; knows neither the options of a command line nor how
results are shown. `Planned` is what reports and exporters get.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import meshes
from costmodels.exposure import exposed_shares
from costmodels.program import Program
from meshes import LogicalMesh
from meshes.resolve import from_text
from planner.errors import InputError
from planner.export import planfile
from planner.export.annotationfile import AnnotationFile
from planner.export.planfile import PlanFile
from planner.export.stamp import Stale, Stamp
from planner.ilp.clock import Clock
from planner.model import Model
from planner.pins import Annotation, PinError
from planner.pipelining.pieces import PipelineError
from planner.placing import Machine, place
from planner.planning import (
    Infeasible,
    NothingFits,
    Options,
    Unsolved,
    plan_model,
    price_annotations,
    reprice,
)
from planner.progress import Progress
from planner.result import Result
from planner.search import saving, staging
from planner.search.candidates import IMPOSSIBLE, TOO_LARGE, Trial, search
from planner.search.pool import processes
from planner.source import Source
from planner.weighting import Seen

WORTH_A_PROCESS_S = 5.0  # planning that takes less ends before another process has started
END_GAP = 0.005  # a plan so near the best tells a utilization to a tenth of a point


@dataclass(frozen=True)
class Request:
    """What to plan: a model, the mesh to use instead of the model file's, and how."""

    source: Source
    mesh: str | None = None
    shape: str | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Planned:
    """A result and where its model and mesh came from.

    `annotation` is what the plan was made under: the model's constraints, or given pins.
    `explanation` says why nothing fits; empty if something does or nothing had to. `shapes` are
    the meshes that were considered, where more than one was, `savings` the choices of what to
    save for the backward pass, where the model leaves that open; the best first.
    """

    source: Source
    machine: Machine
    result: Result
    options: Options
    annotation: Annotation
    explanation: tuple[str, ...] = ()
    shapes: tuple[Trial, ...] = ()
    savings: tuple[Trial, ...] = ()

    @property
    def stamp(self) -> Stamp:
        return Stamp.of(self.result.model, self.result.mesh)


@dataclass(frozen=True)
class Sensitivity:
    """What an assumed parameter means: hardware utilization at both ends of its range, None
    where that end has no plan."""

    key: str
    low_hfu: float | None
    high_hfu: float | None


def plan(request: Request, progress: Progress | None = None) -> Planned:
    """The fastest plan over the candidate shapes; if none fits, the one of least memory."""
    model = request.source.load()
    machine = place(model, request.mesh, request.shape, request.source.folder)
    candidates = machine.meshes()
    try:
        if len(candidates) == 1 and not saving.is_open(model):
            return _plan_one(request, model, machine, candidates[0], progress)
        return _searched(request, model, machine, candidates, progress)
    except PinError as error:
        raise InputError(f"{request.source.file}: constraint {error}") from None
    except PipelineError as error:
        where = request.source.place_of("pipeline")
        raise InputError(f"{where}: {error.message}", error.hint) from None


def _searched(
    request: Request, model: Model, machine: Machine, candidates: Sequence[LogicalMesh],
    progress: Progress | None,
) -> Planned:  # fmt: skip
    """The best mesh, then on it what is best saved for the backward pass, if that is open."""
    options = request.options
    source = request.source
    shapes: list[Trial] = []
    savings: list[Trial] = []
    if len(candidates) > 1:
        trials = [Trial(mesh) for mesh in candidates]
        if machine.every:
            trials = [Trial(mesh) for mesh in staging.unstaged(model, candidates)]
            trials += _staged(source, model, machine)
        shapes = search(model, trials, options, progress)
        candidates = [shapes[0].mesh]
        model = shapes[0].model or model
        source = source.with_settings(shapes[0].settings)
    if saving.is_open(model):
        savings = search(model, saving.candidates(model, candidates[0]), options, progress)
    best = (savings or shapes)[0]
    if best.outcome == IMPOSSIBLE:
        raise InputError(f"{request.source.file}: {best.explanation[0]}")
    if best.plan is None:
        kind = NothingFits if best.outcome == TOO_LARGE else Unsolved
        why = ", ".join(sorted({t.outcome for t in savings or shapes}))
        raise kind(f"no plan for any of {len(savings or shapes)} candidates: {why}")
    result = reprice(model, best.mesh, best.plan, model.constraints, options)
    return Planned(
        source, machine, result, options, model.constraints, best.explanation,
        tuple(shapes), tuple(savings),
    )  # fmt: skip


def _staged(source: Source, model: Model, machine: Machine) -> Iterator[Trial]:
    """The pipelines to consider; a model is read again for each number of microbatches."""
    models: dict[tuple[str, ...], Model] = {(): model}
    for mesh, setting in staging.staged(model, machine.topology):
        settings = (setting,) if setting else ()
        if settings not in models:
            models[settings] = source.with_settings(settings).load()
        yield Trial(mesh, model=models[settings], settings=settings, staged=True)


def _plan_one(
    request: Request, model: Model, machine: Machine, mesh: LogicalMesh, say: Progress | None
) -> Planned:
    options = request.options
    explanation: tuple[str, ...] = ()
    try:
        result = plan_model(model, mesh, options, say)
    except Infeasible as error:
        result, explanation = error.result, error.explanation
    return Planned(request.source, machine, result, options, model.constraints, explanation)


def sensitivity(request: Request, planned: Planned) -> list[Sensitivity]:
    """Plans both ends of the range of every assumed parameter, on the mesh of `planned`. A limit
    on the time of planning holds once more, for all of them together.

    Nothing where `planned` does not fit: then utilization is not the question.
    """
    if not planned.result.fits:
        return []
    options = replace(request.options, like=_seen(planned.result), gap=END_GAP)
    shape = planned.stamp.shape_text
    request = replace(request, source=planned.source, shape=shape, options=options)
    clock = Clock.of(request.options.time_limit_s)
    assumed = planned.result.model.assumed
    other = [(a.key, end) for a in assumed for end in (a.low, a.high) if end != a.value]
    ends = [_End(request, f"{key}={end}", clock) for key, end in other]
    # Processes that share a limit would each have to get less than what may be left to it.
    alone = clock.limited or planned.result.plan.proof.seconds < WORTH_A_PROCESS_S
    with processes(1 if alone else len(ends)) as spread:
        found = dict(zip(other, spread(_hfu_at, ends), strict=True))
    found |= {(a.key, a.value): (planned.result.hfu, True) for a in assumed}
    pairs = ((a.key, found[a.key, a.low], found[a.key, a.high]) for a in assumed)
    return [Sensitivity(key, low[0], high[0]) for key, low, high in pairs if low[1] and high[1]]


def _seen(result: Result) -> Seen | None:
    """What a plan of one program has shown, where that makes planning another quicker."""
    program = result.program
    if not result.mesh.chip.overlap or not isinstance(program, Program):
        return None
    return Seen(result.timing.step_time_s, exposed_shares(program, result.mesh))


@dataclass(frozen=True)
class _End:
    request: Request
    setting: str
    clock: Clock


def _hfu_at(end: _End) -> tuple[float | None, bool]:
    """Hardware utilization there, None without a plan; and whether there was time to tell."""
    source = end.request.source.with_settings([end.setting])
    limit_s = end.clock.left() if end.clock.limited else None
    options = replace(end.request.options, least_memory=False, time_limit_s=limit_s)
    try:
        found = plan(replace(end.request, source=source, options=options)).result.hfu
    except (ValueError, Unsolved):  # an end of the range may be no model, or have no plan
        found = None
    return found, not end.clock.over()


def price_plan(request: Request, stored: PlanFile) -> Planned:
    """A stored plan, lowered and priced for the request's model and mesh; nothing is solved.

    Raises Stale if it was made for another model or mesh.
    """
    model = request.source.load(stored.constraints)
    machine, mesh = _stored_mesh(request, model, stored)
    _check_fresh(stored.file, stored.stamp, model, mesh, request)
    result = _reprice(model, mesh, stored, request.options)
    return Planned(request.source, machine, result, request.options, stored.constraints)


def read_plan(stored: PlanFile) -> Planned:
    """A stored plan with the model and mesh that it holds itself."""
    options = Options(stored.memory_bytes, stored.headroom, seed=stored.seed)
    model = stored.source.load(stored.constraints)
    topology = (
        meshes.resolve(stored.mesh_argument)
        if stored.mesh_text is None
        else from_text(stored.mesh_text, stored.mesh_argument)
    )
    shape = stored.stamp.shape
    machine = Machine(stored.mesh_argument, topology, shape, False, stored.mesh_text, stored.layout)
    mesh = machine.meshes()[0]
    _check_fresh(stored.file, stored.stamp, model, mesh, Request(stored.source))
    result = _reprice(model, mesh, stored, options)
    return Planned(stored.source, machine, result, options, stored.constraints)


def plan_or_read(
    argument: str, request: Callable[[], Request], progress: Progress | None = None
) -> Planned:
    """The plan of a model; if `argument` is a plan file or its folder, the plan in it."""
    path = Path(argument)
    if path.is_dir() or (path.suffix == ".json" and path.is_file()):
        return read_plan(planfile.load(path))
    return plan(request(), progress)


def price_annotated(request: Request, given: AnnotationFile) -> Planned:
    """Given annotations, completed and priced."""
    model = request.source.load(given.annotations)
    shape = request.shape or (given.stamp.shape_text if given.stamp else None)
    machine = place(model, request.mesh, shape, request.source.folder)
    if machine.shape is None:
        raise InputError(f"{given.file} says nothing of the mesh", "give its --shape")
    mesh = machine.meshes()[0]
    if given.stamp is not None:
        _check_fresh(given.file, given.stamp, model, mesh, request)
    try:
        result = price_annotations(
            model, mesh, given.annotations, request.options, meaning=given.meaning
        )
    except PinError as error:
        raise InputError(f"{given.file}: {error}") from None
    return Planned(request.source, machine, result, request.options, given.annotations)


def _reprice(model: Model, mesh: LogicalMesh, stored: PlanFile, options: Options) -> Result:
    try:
        return reprice(model, mesh, stored.plan, stored.constraints, options)
    except ValueError as error:
        raise InputError(f"{stored.file}: {error}", "plan the model again") from None


def _stored_mesh(request: Request, model: Model, stored: PlanFile) -> tuple[Machine, LogicalMesh]:
    """The request's or the model's mesh; without any, the one that the plan holds."""
    shape = request.shape or stored.stamp.shape_text
    if request.mesh is None and model.mesh is None and stored.mesh_text is None:
        request = replace(request, mesh=stored.mesh_argument)
    machine = place(model, request.mesh, shape, request.source.folder)
    return machine, machine.meshes()[0]


def _check_fresh(
    file: str, stamp: Stamp, model: Model, mesh: LogicalMesh, request: Request
) -> None:
    reasons = stamp.differences(Stamp.of(model, mesh))
    if reasons:
        raise Stale(file, reasons, refresh_command(request, file))


def refresh_command(request: Request, file: str) -> str:
    """The command that writes `file` and its siblings anew."""
    return write_command(request, str(Path(file).parent))


def write_command(request: Request, folder: str) -> str:
    """The command that plans the request and writes the files to `folder`."""
    words = [f"plan {request.source.arguments()}"]
    for option, value in _given(request):
        words += [option, shlex.quote(value)]
    return " ".join([*words, "-o", shlex.quote(folder)])


def _given(request: Request) -> Iterator[tuple[str, str]]:
    """The options that change what is planned."""
    options, default = request.options, Options()
    for name, value in (("--mesh", request.mesh), ("--shape", request.shape)):
        if value:
            yield name, value
    if options.memory_bytes is not None:
        yield "--memory", str(options.memory_bytes)
    if options.headroom != default.headroom:
        yield "--headroom", f"{options.headroom:g}"
    if options.time_limit_s is not None:
        yield "--time-limit", f"{options.time_limit_s:g}s"
    if options.seed != default.seed:
        yield "--seed", str(options.seed)
