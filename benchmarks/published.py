"""The four models of Google's announcement of GSPMD: published, simulated, and planned.

    python benchmarks/published.py --write

The published annotation is priced as `plan simulate MODEL --annotations` does, as the model file
stands and with every assumed parameter at both ends of its range; then the planner plans the same
model. Prints a Markdown table; `--write` puts it into docs/validation.md. Ends with 1 if a
simulation is further than 4 points from what is published, or slower to the plan found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

import meshes  # noqa: E402
from planner import source, zoo  # noqa: E402
from planner.planning import plan_model, price_annotations  # noqa: E402
from planner.result import Result  # noqa: E402
from planner.validation import suitefile  # noqa: E402

PAGE = ROOT / "docs" / "validation.md"
BEGINS, ENDS = "<!-- published -->\n", "<!-- end of published -->\n"
POINTS = 0.04
HEAD = (
    "| model | published HFU | simulated | with what is assumed at both ends | step "
    "| step of the plan found | planned in |\n"
    "| --- | ---: | ---: | --- | ---: | ---: | ---: |\n"
)


@dataclass(frozen=True)
class Row:
    name: str
    published: float
    given: Result
    ends: tuple[str, ...]
    found: Result
    seconds: float

    @property
    def holds(self) -> bool:
        near = abs(self.given.hfu - self.published) <= POINTS
        return near and self.found.timing.step_time_s <= self.given.timing.step_time_s

    def cells(self) -> str:
        cells = [
            f"`{self.name}`", f"{self.published:.1%}", f"{self.given.hfu:.1%}",
            "; ".join(self.ends) or "nothing is", f"{self.given.timing.step_time_s:.3g} s",
            f"{self.found.timing.step_time_s:.3g} s", f"{self.seconds:.0f} s",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |\n"


def rows() -> Iterator[Row]:
    for run in suitefile.load("seeds").runs:
        name, hfu = run.model, run.measured.hfu
        if not isinstance(name, str) or hfu is None:
            raise SystemExit(f"{run.id}: not a utilization of a model of the zoo")
        given = _priced(name)
        start = perf_counter()
        found = plan_model(given.model, given.mesh)
        yield Row(name, hfu, given, tuple(_ends(given)), found, perf_counter() - start)


def _priced(name: str, *settings: str) -> Result:
    model = source.find(name, settings).load()
    if model.mesh is None or not isinstance(model.shape, dict):
        raise SystemExit(f"{name}: no mesh with a shape")
    mesh = meshes.logical(meshes.resolve(model.mesh), model.shape, model.layout)
    return price_annotations(model, mesh, zoo.published(name))


def _ends(given: Result) -> Iterator[str]:
    """Each assumed parameter at its ends, the others as in the model file."""
    for a in given.model.assumed:
        hfu = [_priced(given.model.name, f"{a.key}={end}").hfu for end in (a.low, a.high)]
        yield f"{a.key} {a.low} … {a.high}: {hfu[0]:.1%} … {hfu[1]:.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    arguments = parser.parse_args()
    found = []
    for row in rows():
        print(row.cells(), end="", file=sys.stderr, flush=True)
        found.append(row)
    table = HEAD + "".join(row.cells() for row in found)
    print(table, end="")
    if arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGINS)[0], text.split(ENDS)[1]
        PAGE.write_text(before + BEGINS + table + ENDS + after, encoding="utf-8")
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
