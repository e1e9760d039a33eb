"""What `plan validate` prints: predicted beside measured, row by row, and how good that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from planner.report import amounts
from planner.report.console import Screen
from planner.report.document import SCHEMA_VERSION, as_json
from planner.report.tables import table
from planner.validation.runs import Suite
from planner.validation.scores import Row, Score, score
from planner.validation.split import EVEN, ODD

MANY = 60  # rows: of more, only the worst are printed
WORST = 10

Results = Mapping[str, tuple[Suite, Sequence[Row]]]


def show(screen: Screen, results: Results, form: str) -> None:
    """Prints the suites in one of the formats text and json."""
    if form == "json":
        screen.data(as_json(document(results)))
        return
    for suite, rows in results.values():
        for part in text(suite, rows):
            screen.show(part)


def within(screen: Screen, results: Results, max_error: float | None) -> bool:
    """Whether every suite's mean error is small enough; says which are not."""
    means = {name: score(rows).mean_abs_error or 0.0 for name, (_, rows) in results.items()}
    large = {n: mean for n, mean in means.items() if max_error is not None and mean > max_error}
    for name, mean in large.items():
        screen.remark(f"{name}: mean error {amounts.share(mean)}, allowed {max_error:.1%}")
    return not large


def document(results: Results) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "suites": {
            name: {
                **asdict(score(rows)),
                "halves": {
                    half: asdict(score([r for r in rows if r.half == half])) for half in (EVEN, ODD)
                },
                "runs": [_row_document(row) for row in rows],
            }
            for name, (_, rows) in results.items()
        },
    }  # fmt: skip


def _row_document(row: Row) -> dict[str, Any]:
    return {
        "id": row.run.id, "name": row.run.name, "half": row.half, "figure": row.figure or None,
        "error": row.error, "points": row.points, "measured": asdict(row.run.measured),
        "predicted": asdict(row.predicted),
    }  # fmt: skip


def text(suite: Suite, rows: Sequence[Row]) -> Iterable[Text | Table]:
    yield Text(f"{suite.name}: {len(rows)} runs", "bold")
    shown = list(rows)
    if len(rows) > MANY:
        shown = sorted(rows, key=lambda r: -abs(r.error or 0))[:WORST]
        yield Text(f"the {WORST} worst")
    yield _rows(shown)
    yield Text("")
    halves = [(half, [r for r in rows if r.half == half]) for half in (EVEN, ODD)]
    yield _scores([(half, score(own)) for half, own in halves if own] + [("all", score(rows))])
    yield Text("")


def _rows(rows: Sequence[Row]) -> Table:
    found = table(
        "run", "half", "figure", "measured", "predicted", "error", "peak", "fits",
        right=("measured", "predicted", "error", "peak"),
    )  # fmt: skip
    for row in rows:
        found.add_row(
            row.run.name, row.half, row.figure.removesuffix("_s").replace("_", " "),
            "out of memory" if not row.figure else _amount(row.figure, row.measured),
            "" if not row.figure else _amount(row.figure, row.value),
            "" if row.error is None else f"{row.error:+.1%}",
            amounts.size(row.predicted.peak_bytes), "yes" if row.predicted.fits else "no",
        )  # fmt: skip
    return found


def _amount(figure: str, value: float) -> str:
    return amounts.seconds(value) if figure == "step_time_s" else amounts.share(value)


def _scores(scores: Sequence[tuple[str, Score]]) -> Table:
    columns = ("half", "runs", "mean error", "median", "max", "bias", "tau", "regret", "max regret",
               "in range", "out of memory")  # fmt: skip
    found = table(*columns, right=columns[1:])
    for half, s in scores:
        memory = f"{s.right_memory_verdicts} of {s.memory_verdicts}" if s.memory_verdicts else ""
        found.add_row(
            half, str(s.rows), _share(s.mean_abs_error), _share(s.median_abs_error),
            _share(s.max_abs_error), _share(s.bias), _number(s.kendall_tau),
            _share(s.mean_regret), _share(s.max_regret), _share(s.coverage), memory,
        )  # fmt: skip
    return found


def _share(value: float | None) -> str:
    return "" if value is None else amounts.share(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
