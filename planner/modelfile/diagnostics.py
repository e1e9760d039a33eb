"""What is wrong with a model file: diagnostics as data, their collection, and their rendering."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from meshes.errors import MeshError
from meshes.yamltree import Place, YamlProblem

# A file with more errors than this is no model file; the rest would only repeat the first.
MAX_DIAGNOSTICS = 100

_WIDTH = 100  # columns of a source line that are shown around the caret


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One error. `code` is a stable word for machines, `source` the line it stands in."""

    file: str
    line: int
    column: int
    code: str
    message: str
    hint: str = ""
    source: str = field(default="", repr=False)


class ModelErrors(ValueError):
    """A file that is no model: all that is wrong with it, sorted by place."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(sorted(set(diagnostics)))
        super().__init__("\n".join(d.message for d in self.diagnostics))


class Findings:
    """Collects diagnostics; gives up (raises ModelErrors) at MAX_DIAGNOSTICS."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []

    def add(self, code: str, message: str, place: Place, hint: str = "") -> None:
        self.diagnostics.append(at(place, code, message, hint))
        if len(self.diagnostics) >= MAX_DIAGNOSTICS:
            raise ModelErrors(self.diagnostics)


def at(place: Place, code: str, message: str, hint: str = "") -> Diagnostic:
    return Diagnostic(
        place.source.file, place.line, place.column, code, message, hint, place.text
    )


def from_yaml(problem: YamlProblem) -> Diagnostic:
    return at(problem.place, problem.code, problem.message, problem.hint)


def from_mesh(error: MeshError) -> Diagnostic:
    """The diagnostic of a mesh file (or of a mesh name: then without a place)."""
    return Diagnostic(
        error.file or "", error.line or 0, error.column or 0, error.code, error.message,
        error.hint, error.source,
    )  # fmt: skip


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint: the known name that is most like `name`, or all of them if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if not near:
        near = [k for k in known if k.lower() == name.lower()]
    if near:
        return f"did you mean '{near[0]}'?"
    return otherwise or (f"known: {', '.join(known)}" if 1 < len(known) <= 12 else "")


def render(diagnostics: Sequence[Diagnostic]) -> str:
    """For people: place, message and code, the line with a caret under the place, the hint."""
    return "\n".join(_render(d) for d in diagnostics)


def _render(d: Diagnostic) -> str:
    place = ":".join(str(part) for part in (d.file, d.line, d.column) if part)
    lines = [f"{place}: {d.message} [{d.code}]" if place else f"{d.message} [{d.code}]"]
    if d.source.strip():
        lines += _excerpt(d.source, d.column)
    if d.hint:
        lines.append(f"  hint: {d.hint}")
    return "\n".join(lines)


def _excerpt(source: str, column: int) -> list[str]:
    """The source line, cut to a window around the column, and the caret under it."""
    first = max(0, column - 1 - _WIDTH * 3 // 4) if len(source) > _WIDTH else 0
    shown = "".join(_printable(c) for c in source[first : first + _WIDTH]).rstrip()
    before = shown[: column - 1 - first]
    number = "  | "
    return [f"{number}{shown}", f"{number}{' ' * sum(map(_cells, before))}^"]


def _printable(char: str) -> str:
    return " " if char == "\t" else char if char.isprintable() else "?"


def _cells(char: str) -> int:
    """Terminal columns that a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
