"""Suites of runs as YAML: the format of those that ship with the project and of a user's own.

docs/validation.md describes it. Reading and checking only.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meshes.yamltree import YamlProblem, parse
from planner.errors import InputError, nearest
from planner.export.jsontext import checked, read_text
from planner.modelfile.scalars import plain_data
from planner.validation import vtrain
from planner.validation.layouts import Layout, Rules
from planner.validation.runs import PLANNED, PUBLISHED, Measured, Run, Suite

_SUFFIX = ".yaml"


def _axes(value: Any) -> Any:
    """One axis may stand without a list around it."""
    return [value] if isinstance(value, str) else value


_Rules = dict[str, Annotated[list[str], BeforeValidator(_axes)]]
_Moves = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayoutFields(_Strict):
    parameters: _Rules = {}
    activations: _Rules = {}
    states: _Rules | None = None
    literal: bool = False

    def layout(self) -> Layout:
        states = None if self.states is None else _rules(self.states)
        return Layout(_rules(self.parameters), _rules(self.activations), states, self.literal)


class MeasuredFields(_Strict):
    step_time_s: _Positive | None = None
    mfu: _Positive | None = None
    hfu: _Positive | None = None
    peak_bytes: _Positive | None = None
    out_of_memory: bool = False


class RunFields(_Strict):
    id: Annotated[str, Field(min_length=1)]
    name: str = ""
    source: str
    model: dict[str, Any] | str
    layout: str | LayoutFields
    measured: MeasuredFields
    eager: bool = False
    group: str = ""
    network_bytes_per_s: _Positive | None = None
    overlap: list[_Moves] | None = None
    combined_sums: bool = False
    notes: str = ""


class SuiteFields(_Strict):
    schema_version: Literal[1] = 1
    summary: str = ""
    sources: dict[str, str] = {}
    layouts: dict[str, LayoutFields] = {}
    runs: Annotated[list[RunFields], Field(min_length=1)]


def names() -> tuple[str, ...]:
    """The suites that ship with the project, sorted."""
    found = (entry.name for entry in (files("planner.validation") / "suites").iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in found if n.endswith(_SUFFIX)))


def load(argument: str) -> Suite:
    """The suite of that name, or that of a file; InputError if there is neither."""
    if argument in names():
        data = files("planner.validation") / "suites" / f"{argument}{_SUFFIX}"
        return from_text(data.read_text(encoding="utf-8"), argument, argument)
    path = Path(argument)
    if not path.is_file():
        near = nearest(argument, names())
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names())}, or a file"
        raise InputError(f"no suite or file {argument!r}", hint)
    text = read_text(path)
    if path.suffix == ".csv":
        return vtrain.from_text(text, str(path))
    return from_text(text, path.stem, str(path))


def from_text(text: str, name: str, file: str) -> Suite:
    """A suite in YAML; InputError says what is wrong and where."""
    try:
        document = parse(text, file)
    except YamlProblem as problem:
        where = f"{file}:{problem.place.line}:{problem.place.column}"
        raise InputError(f"{where}: {problem.message}", problem.hint) from None
    for key in document.repeated:
        raise InputError(f"{file}:{key.place.line}: key {key.value!r} appears twice")
    fields = checked(SuiteFields, plain_data(document.root), file)
    runs = tuple(_run(run, fields, file) for run in fields.runs)
    seen: set[str] = set()
    for run in runs:
        if run.id in seen:
            raise InputError(f"{file}: two runs are called {run.id!r}")
        seen.add(run.id)
    return Suite(name, runs, fields.summary, fields.sources)


def _run(run: RunFields, suite: SuiteFields, file: str) -> Run:
    measured = Measured(**run.measured.model_dump())
    return Run(
        run.id, run.name or run.id, suite.sources.get(run.source, run.source), run.model,
        _layout(run, suite, file), measured, run.eager, run.group, run.network_bytes_per_s,
        None if run.overlap is None else frozenset(run.overlap), run.combined_sums, run.notes,
    )  # fmt: skip


def _layout(run: RunFields, suite: SuiteFields, file: str) -> Layout | Literal["published"] | None:
    layout = run.layout
    if layout == PLANNED:
        return None
    if layout == PUBLISHED:
        if isinstance(run.model, str):
            return PUBLISHED
        raise InputError(f"{file}: {run.id}: only models of the zoo have published annotations")
    if isinstance(layout, str):
        if layout not in suite.layouts:
            known = ", ".join(suite.layouts) or "none"
            raise InputError(f"{file}: {run.id}: no layout {layout!r}", f"known: {known}")
        layout = suite.layouts[layout]
    return layout.layout()


def _rules(fields: _Rules) -> Rules:
    return {dim: tuple(axes) for dim, axes in fields.items()}
