"""The findings of `check` as text, JSON and GitHub workflow commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from planner.checks import Check
from planner.report import amounts
from planner.report.console import Screen
from planner.report.document import SCHEMA_VERSION, as_json, document
from planner.result import Result

_LARGEST = 5


def show(screen: Screen, checks: Sequence[Check], form: str) -> None:
    """Prints the findings in one of the formats text, json and github."""
    if form == "json":
        screen.data(as_json(json_document(checks)))
    elif form == "github":
        screen.data("\n".join(github(checks)))
    else:
        for line in text(checks):
            screen.show(line)


def text(checks: Sequence[Check]) -> Iterable[Text]:
    """One line per finding; what fills the memory below a verdict that says no."""
    for check in checks:
        if check.planned is not None:
            yield Text(check.planned.result.mesh.describe())
        for finding in check.findings:
            word = Text("ok   ", "green") if finding.ok else Text("FAIL ", "bold red")
            yield word.append(f"{check.file}: {finding.message}", "default")
        too_large = any(f.rule == "memory" and not f.ok for f in check.findings)
        if check.planned is not None and too_large:
            for line in check.planned.explanation[1:] or _largest(check.planned.result):
                yield Text(f"       {line}")


def _largest(result: Result) -> list[str]:
    largest = result.memory.largest[:_LARGEST]
    return [f"{amounts.size(size):>11}  {tensor}" for tensor, _, size in largest]


def json_document(checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "ok": all(c.ok for c in checks),
        "checks": [
            {
                "file": c.file, "ok": c.ok,
                "findings": [
                    {"rule": f.rule, "ok": f.ok, "message": f.message, "value": f.value,
                     "limit": f.limit}
                    for f in c.findings
                ],
                "result": None if c.planned is None else document(c.planned),
            }
            for c in checks
        ],
    }  # fmt: skip


def github(checks: Sequence[Check]) -> list[str]:
    """Workflow commands: GitHub shows them on the lines of a pull request."""
    lines = []
    for check in checks:
        for finding in check.findings:
            level = "notice" if finding.ok else "error"
            lines.append(github_line(level, check.file, 1, 1, finding.rule, finding.message))
    return lines


def github_line(level: str, file: str, line: int, column: int, title: str, message: str) -> str:
    where = f"file={_property(file)},line={line},col={column},title={_property(title)}"
    return f"::{level} {where}::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
