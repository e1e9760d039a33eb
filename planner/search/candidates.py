"""Which candidate is best: every one bounded or planned, and what became of each.

Candidates differ in the logical mesh, in what is saved for the backward pass, or in settings of
the model file (a pipeline's microbatches).

Where the chip does not overlap communication and computation, the surrogate's bound is one of
the step time. Candidates then are planned in the order of their bounds until no bound leaves
room for a faster plan. Where it does, the bound only says where to look first: ordinary candidates
(meshes of one and two axes, fixed policies) are all planned. The others follow in the order of the
step times that they have if two of their axes are joined, unless that or a first look rules them
out, until several in a row bring nothing. Pipelines, of which no
bound is known, come last in their own order, again until several in a row bring nothing.

What a candidate can know of others is fixed by its place (all but the few just before it), so the
answer does not depend on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from time import monotonic

from costmodels.exposure import Moved, exposed_shares
from costmodels.program import Program
from meshes import LogicalMesh, alike
from planner.graph.recompute import OPEN
from planner.model import Model, Remat
from planner.pins import PinError
from planner.pipelining.pieces import PipelineError
from planner.plan import Plan
from planner.planning import (
    Infeasible,
    NoPromise,
    NothingFits,
    Options,
    Unsolved,
    plan_model,
    surrogate_bound,
)
from planner.progress import Progress
from planner.report import amounts
from planner.result import Result
from planner.saving import plan_saving, saving_bound
from planner.search.pool import Processes, processes
from planner.tying import tied_meshes
from planner.weighting import PLAIN, Seen, Weights

AHEAD = 4  # candidates begun before the first of them must be done
SAME = 1e-3  # step times that differ by less are equal
ORDINARY_AXES = 2
PATIENCE = 12  # candidates in a row that may fail to be faster,
STAGED_PATIENCE = 8  # and pipelines, which take longer
FALLBACKS = 5  # candidates of which the plan of least memory is sought if nothing fits
FITS, TOO_LARGE, UNSOLVED, SLOWER, LOOKED_SLOWER, LEFT_OUT, IMPOSSIBLE, LOST = (
    "fits", "does not fit", "no plan in time", "slower", "slower at first look", "left out",
    "impossible", "planning ran out of memory",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it. Where nothing fitted, step time and peak are those of
    the plan of least memory, if one was sought."""

    mesh: LogicalMesh
    remat: Remat | None = None
    model: Model | None = None  # if it is not the one that is searched for
    settings: tuple[str, ...] = ()  # of the model file, that make `model`
    weights: Weights = PLAIN  # with the policy `open`: what communication counts
    staged: bool = False
    bound_s: float = 0.0
    outcome: str = LEFT_OUT
    step_time_s: float = inf
    peak_bytes: int | None = None
    plan: Plan | None = None
    exposed: Mapping[Moved, float] = field(default_factory=dict, compare=False)
    explanation: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A shape and settings as the command line takes them, or what is saved in short."""
        if self.remat is None:
            return " ".join([self.shape, *(f"--set {s}" for s in self.settings)])
        return self.remat if isinstance(self.remat, str) else f"{len(self.remat)} values"

    @property
    def shape(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.mesh.axes)

    @property
    def ordinary(self) -> bool:
        if self.remat is not None:
            return isinstance(self.remat, str)
        return sum(size > 1 for _, size in self.mesh.axes) <= ORDINARY_AXES


@dataclass(frozen=True)
class _Call:
    """What a process needs to plan one candidate."""

    model: Model
    trial: Trial
    options: Options
    number: int = -1  # of the trial in its search


def search(
    model: Model, candidates: Sequence[Trial], options: Options,
    progress: Progress | None = None,
) -> list[Trial]:  # fmt: skip
    """All candidates, the best first: those that fit by step time, then the rest by bound.

    Raises Unsolved or PinError if no candidate has any plan.
    """
    with processes(len(candidates)) as spread:
        running = _Search(model, options, spread, progress)
        return ranked(_distinct(running.run(candidates)))


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """Without those that have come to save what another does."""
    found: dict[object, Trial] = {}
    for i, t in enumerate(trials):
        found.setdefault((t.mesh, t.remat) if isinstance(t.remat, tuple) else i, t)
    return list(found.values())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """By step time; of those that do not fit the plan of least memory first, then by bound."""

    def key(t: Trial) -> tuple[object, ...]:
        fits = t.outcome == FITS
        peak = inf if t.peak_bytes is None else t.peak_bytes
        return (not fits, t.step_time_s if fits else peak, t.outcome == IMPOSSIBLE, t.bound_s)

    return sorted(trials, key=key)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that fit and are faster than all that need no more memory, fastest first."""
    least = inf
    found = []
    for t in sorted(
        (t for t in trials if t.outcome == FITS), key=lambda t: (t.step_time_s, t.peak_bytes or 0)
    ):
        if t.peak_bytes is not None and t.peak_bytes < least:
            found.append(t)
            least = t.peak_bytes
    return found


@dataclass
class _Search:
    model: Model
    options: Options
    spread: Processes
    progress: Progress | None
    candidates: Sequence[Trial] = ()
    trials: list[Trial] = field(default_factory=list)
    settled: dict[int, Trial] = field(default_factory=dict)
    best_s: float = inf
    began: float = field(default_factory=monotonic)

    def run(self, candidates: Sequence[Trial]) -> list[Trial]:
        self.candidates = candidates
        self.trials = list(candidates)
        staged = [i for i, t in enumerate(candidates) if t.staged]
        few = [i for i, t in enumerate(candidates) if t.ordinary and not t.staged]
        more = [i for i, t in enumerate(candidates) if not t.ordinary and not t.staged]
        self._bound([i for i in few if not self._follows(i)])
        self._plan(sorted(few, key=self._promise), patience=len(few))
        self._bound([i for i in more if not self._follows(i) or self._joined_s(i) == inf])
        self._plan(sorted(more, key=self._promise), patience=PATIENCE)
        self._plan(staged, patience=STAGED_PATIENCE)
        found = [self.settled.get(i, t) for i, t in enumerate(self.trials)]
        if self.options.least_memory and not any(t.outcome == FITS for t in found):
            found = self._least_memory(found)
        return found

    def _follows(self, i: int) -> bool:
        """Whether no bound is needed, since joined axes will tell when it is this one's turn."""
        trial = self.trials[i]
        return bool(trial.mesh.chip.overlap) and trial.remat is None

    def _bound(self, those: Sequence[int]) -> None:
        options = replace(self.options, to_beat_s=self.best_s * (1 - SAME))
        calls = [_Call(self.model, self.trials[i], options) for i in those]
        for i, trial in zip(those, self._each(_bound, calls, "bounding"), strict=True):
            self.trials[i] = trial

    def _plan(self, order: Sequence[int], patience: int) -> None:
        """Plans the trials of these numbers, as long as there is hope and time."""
        idle = begun = 0

        def calls() -> Iterator[_Call]:
            nonlocal begun
            for i in order:
                if idle + begun >= patience or self._late():
                    return
                if not self._hopeless(i):
                    begun += 1
                    options = replace(
                        self._options(), known=self._known(), to_beat_s=self._to_beat(i)
                    )
                    yield _Call(self.model, self.trials[i], options, i)

        def settle(call: _Call, trial: Trial) -> None:
            nonlocal idle, begun
            begun -= 1
            self.settled[call.number] = trial
            faster = trial.outcome == FITS and trial.step_time_s < self.best_s * (1 - SAME)
            idle = 0 if faster else idle + 1
            if trial.outcome == FITS:
                self.best_s = min(self.best_s, trial.step_time_s)
            self._tell("planning", trial, 0)

        self.spread.rolling(_plan, calls(), settle, _lost, AHEAD)
        for i in order:
            if i not in self.settled:
                self._hopeless(i)

    def _to_beat(self, i: int) -> float:
        """Bounds that grow on the way may settle a trial; where they say little, and planning
        takes long, a first look."""
        trial = self.trials[i]
        settles = not trial.ordinary or not trial.mesh.chip.overlap
        return self.best_s if settles and not trial.staged else inf

    def _promise(self, i: int) -> tuple[float, float]:
        """Sorts trials by their step times with two axes joined, where known, and by bound."""
        return self._joined_s(i), self.trials[i].bound_s

    def _joined_s(self, i: int) -> float:
        known = self._known()
        joined = (known.get(alike(m)) for _, m in tied_meshes(self.trials[i].mesh, {}))
        return min((seen.step_s for seen in joined if seen is not None), default=inf)

    def _known(self) -> dict[Hashable, Seen]:
        """Of ordinary meshes what planning them has shown."""
        return {
            alike(t.mesh): Seen(t.step_time_s, t.exposed)
            for t in self.settled.values()
            if t.exposed
        }

    def _hopeless(self, i: int) -> bool:
        """Settles what its constraints or its bound rule out."""
        trial = self.trials[i]
        if trial.outcome == IMPOSSIBLE:
            return True
        bounds = not trial.mesh.chip.overlap
        if bounds and trial.bound_s >= self.best_s * (1 - SAME):
            self.settled[i] = replace(trial, outcome=SLOWER)
            return True
        return False

    def _least_memory(self, trials: list[Trial]) -> list[Trial]:
        """Nothing fits: for a few candidates the plan of least memory, and why."""
        asked = [i for i, t in enumerate(trials) if t.outcome == TOO_LARGE][:FALLBACKS]
        options = replace(self._options(), least_memory=True)
        calls = [_Call(self.model, trials[i], options) for i in asked]
        found = self._each(_plan, calls, "looking for the plan of least memory")
        result = list(trials)
        for i, trial in zip(asked, found, strict=True):
            result[i] = trial
        return result

    # ---- time and progress --------------------------------------------------------------------

    def _late(self) -> bool:
        limit = self.options.time_limit_s
        return limit is not None and monotonic() - self.began >= limit

    def _options(self) -> Options:
        """Options of the next call: what is left of the time limit, no plan that cannot fit."""
        limit = self.options.time_limit_s
        left = None if limit is None else limit - (monotonic() - self.began)
        return replace(self.options, time_limit_s=left, least_memory=False)

    def _each(
        self, function: Callable[[_Call], Trial], calls: Sequence[_Call], what: str
    ) -> list[Trial]:
        done = 0

        def tell(_: int, trial: Trial) -> None:
            nonlocal done
            done += 1
            self._tell(what, trial, done)

        return self.spread(function, calls, tell, _lost)

    def _tell(self, what: str, trial: Trial, done: int) -> None:
        """Of one more trial, the last of `done` that are not yet settled."""
        if self.progress is not None:
            best = f", best {amounts.seconds(self.best_s)}" if isfinite(self.best_s) else ""
            share = (len(self.settled) + done) / (2 * len(self.candidates))
            self.progress(f"{what} {trial.name}{best}", share)


def _lost(call: _Call) -> Trial:
    return replace(call.trial, outcome=LOST)


def _bound(call: _Call) -> Trial:
    trial = call.trial
    model = (trial.model or call.model).decided(trial.remat)
    # Where communication is hidden, bounds only say where to look first.
    enough_s = inf if trial.mesh.chip.overlap else call.options.to_beat_s
    bound = saving_bound if trial.remat == OPEN else surrogate_bound
    try:
        return replace(trial, bound_s=bound(model, trial.mesh, enough_s))
    except PinError as error:
        return _conflict(call.trial, error)


def _plan(call: _Call) -> Trial:
    model = (call.trial.model or call.model).decided(call.trial.remat)
    trial = call.trial
    try:
        if trial.remat == OPEN:
            result = plan_saving(model, trial.mesh, call.options, trial.weights)
            return _told(replace(trial, remat=result.model.training.remat), FITS, result)
        result = plan_model(model, trial.mesh, call.options)
    except Infeasible as error:
        return _told(call.trial, TOO_LARGE, error.result, error.explanation)
    except NothingFits:
        return replace(call.trial, outcome=TOO_LARGE)
    except NoPromise as error:
        bound_s = max(trial.bound_s, error.bound_s)
        outcome = LOOKED_SLOWER if trial.mesh.chip.overlap else SLOWER
        return replace(trial, outcome=outcome, bound_s=bound_s)
    except Unsolved as error:
        return replace(call.trial, outcome=UNSOLVED, explanation=(str(error),))
    except PipelineError as error:
        return _impossible(call.trial, str(error))
    except PinError as error:
        return _conflict(call.trial, error)
    return _shown(_told(trial, FITS, result), result)


def _shown(trial: Trial, result: Result) -> Trial:
    """With what the plan exposes, where others may make use of it."""
    program = result.program
    shows = trial.mesh.chip.overlap and trial.ordinary and trial.remat is None
    if trial.staged or not shows or not isinstance(program, Program):
        return trial
    return replace(trial, exposed=exposed_shares(program, trial.mesh))


def _conflict(trial: Trial, error: PinError) -> Trial:
    return _impossible(trial, f"constraint {error}")


def _impossible(trial: Trial, why: str) -> Trial:
    return replace(trial, outcome=IMPOSSIBLE, bound_s=inf, explanation=(why,))


def _told(trial: Trial, outcome: str, result: Result, explanation: tuple[str, ...] = ()) -> Trial:
    """What goes back to the caller's process: the plan and its figures, not its program."""
    return replace(
        trial, outcome=outcome, step_time_s=result.timing.step_time_s,
        peak_bytes=result.memory.peak_bytes, plan=replace(result.plan, remat=trial.remat),
        explanation=explanation,
    )  # fmt: skip
