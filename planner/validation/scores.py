"""How good predictions are: errors of rows, and what a suite of rows says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from planner.validation import suitefile
from planner.validation.predict import Prediction, predictions
from planner.validation.runs import Run, Suite
from planner.validation.split import half

FIGURES = ("step_time_s", "mfu", "hfu")  # in order of preference


@dataclass(frozen=True)
class Row:
    """A run and what was predicted for it. `figure`: what was compared, "" for a run that was
    out of memory: then only whether it fits counts."""

    run: Run
    predicted: Prediction

    @property
    def figure(self) -> str:
        return next((f for f in FIGURES if getattr(self.run.measured, f) is not None), "")

    @property
    def measured(self) -> float:
        return float(getattr(self.run.measured, self.figure))

    @property
    def value(self) -> float:
        return float(getattr(self.predicted, self.figure))

    @property
    def error(self) -> float | None:
        """Predicted over measured step time, minus one. Utilization is work over step time, so
        a measured utilization means a step time."""
        if not self.figure:
            return None
        if self.figure == "step_time_s":
            return self.value / self.measured - 1
        return self.measured / self.value - 1

    @property
    def points(self) -> float | None:
        """Difference of utilizations, where one was measured."""
        return self.value - self.measured if self.figure in ("mfu", "hfu") else None

    @property
    def covered(self) -> bool | None:
        """Whether the measured step time is in the predicted range; None without either."""
        found = self.predicted.step_time_range_s
        if found is None or self.error is None:
            return None
        measured_s = self.predicted.step_time_s / (1 + self.error)
        return found[0] <= measured_s <= found[1]

    @property
    def half(self) -> str:
        return half(self.run.id)


@dataclass(frozen=True)
class Score:
    """Of the step times of some rows. Kendall's tau and regret are of groups of several runs; of
    a group, regret is the measured time of the predicted best over the measured best, minus one.
    `coverage`: the share of runs whose measured step time is in the predicted range.
    `memory_verdicts`: runs that were out of memory, and those of which that was predicted."""

    rows: int
    mean_abs_error: float | None
    median_abs_error: float | None
    max_abs_error: float | None
    bias: float | None
    kendall_tau: float | None
    mean_regret: float | None
    max_regret: float | None
    coverage: float | None
    memory_verdicts: int
    right_memory_verdicts: int


def score(rows: Sequence[Row]) -> Score:
    errors = [row.error for row in rows if row.error is not None]
    sizes = [abs(e) for e in errors]
    timed = [r for r in rows if r.run.measured.step_time_s is not None]
    groups = _groups(timed)
    taus = [t for t in (kendall_tau(g) for g in groups) if t is not None]
    regrets = [regret(g) for g in groups]
    covered = [float(r.covered) for r in rows if r.covered is not None]
    verdicts = [r for r in rows if r.run.measured.out_of_memory]
    return Score(
        len(rows), _mean(sizes), median(sizes) if sizes else None, max(sizes, default=None),
        _mean(errors), _mean(taus), _mean(regrets), max(regrets, default=None), _mean(covered),
        len(verdicts), sum(not r.predicted.fits for r in verdicts),
    )  # fmt: skip


def kendall_tau(rows: Sequence[Row]) -> float | None:
    """Agreement of two rankings: pairs in the same order minus pairs in the opposite order, over
    all pairs that differ in measured time."""
    agree = total = 0
    for a, b in combinations(rows, 2):
        measured = a.measured - b.measured
        if measured == 0:
            continue
        total += 1
        predicted = (a.value - b.value) * measured
        agree += (predicted > 0) - (predicted < 0)
    return agree / total if total else None


def regret(rows: Sequence[Row]) -> float:
    """What choosing by prediction costs: 0 if the predicted best is the measured best."""
    chosen = min(rows, key=lambda row: row.value)
    return chosen.measured / min(row.measured for row in rows) - 1


def validate(
    arguments: Sequence[str], progress: Callable[[str], None] | None = None
) -> dict[str, tuple[Suite, list[Row]]]:
    """Predictions for the suites that are named, or for all that ship."""
    found: dict[str, tuple[Suite, list[Row]]] = {}
    for argument in arguments or suitefile.names():
        suite = suitefile.load(argument)
        rows = []
        for run, predicted in zip(suite.runs, predictions(suite), strict=True):
            rows.append(Row(run, predicted))
            if progress is not None:
                progress(f"{suite.name}: {len(rows)} of {len(suite.runs)} runs")
        found[suite.name] = suite, rows
    return found


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.run.group:
            found.setdefault(row.run.group, []).append(row)
    return [group for group in found.values() if len(group) > 1]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
