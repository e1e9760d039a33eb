"""Every zoo model on its own full-size machine, planned, compiled by XLA and compared.

    python benchmarks/verify_zoo.py --gpu-python /path/to/gpu-venv/bin/python --write
    python benchmarks/verify_zoo.py lamda-137b --keep FOLDER     # plan, program, HLO, document

Prints a Markdown table; `--write` puts it into docs/verification.md. With `--keep`, models whose
document is already in FOLDER are not compiled again, so a table can be made in several runs.
Models that cannot be planned, written or compiled within the limits are rows too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from planner import source, zoo  # noqa: E402
from planner.export import bundle, planfile  # noqa: E402
from planner.export.jax_program import result_program  # noqa: E402
from planner.planning import Options, Unsolved  # noqa: E402
from planner.request import Planned, Request, plan, read_plan  # noqa: E402
from planner.verify import (  # noqa: E402
    BackendError,
    ExportError,
    compare_compiled,
    compile_result,
    document,
)

PAGE = ROOT / "docs" / "verification.md"
BEGINS, ENDS = "<!-- verify_zoo -->\n", "<!-- end of verify_zoo -->\n"
PLANNING_S = 300.0  # a model that is not planned by then is a row that says so
COMPILING_S = 900.0
HEAD = (
    "| model | machine | arguments | peak | FLOPs | compute | collectives: median, worst "
    "| compiled peak | seconds |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)


def verified(name: str, gpu_python: str | None, folder: Path | None) -> dict[str, Any]:
    """The document of one model, or {"model", "failed"}."""
    try:
        planned = _planned(name, folder)
        result = planned.result
        python = gpu_python if result.mesh.chip.family == "gpu" else None
        if folder is not None:
            (folder / f"{name}.py").write_text(result_program(result), encoding="utf-8")
        compiled = compile_result(result, python=python, timeout_s=COMPILING_S)
        if folder is not None:
            (folder / f"{name}.hlo").write_text(compiled.hlo, encoding="utf-8")
        return document(compare_compiled(result, compiled))
    except (Unsolved, BackendError, ExportError) as error:
        return {"model": name, "failed": str(error).splitlines()[0]}


def _planned(name: str, folder: Path | None) -> Planned:
    kept = None if folder is None else folder / f"{name}.plan.json"
    if kept is not None and kept.is_file():
        return read_plan(planfile.load(kept))
    planned = plan(Request(source.find(name), options=Options(time_limit_s=PLANNING_S)))
    if kept is not None:
        kept.write_text(bundle.files(planned)[planfile.FILE_NAME], encoding="utf-8")
    return planned


def row(found: Mapping[str, Any]) -> str:
    if "failed" in found:
        return f"| `{found['model']}` | {found['failed']} | | | | | | | |"
    errors = {q["name"]: q["error"] for q in found["quantities"]}
    peak = next(q["compiled"] for q in found["quantities"] if q["name"] == "peak")
    both = found["collective_errors"]
    names = ("arguments", "peak", "FLOPs per device", "compute time")
    cells = [
        f"`{found['model']}`", found["mesh"].split(", mesh")[0],
        *(_percent(errors.get(n), "+.1%") for n in names),
        f"{_percent(both.get('median'), '.1%')}, {_percent(both.get('worst'), '.1%')}",
        "-" if peak is None else f"{peak / 2**30:.2f} GiB", f"{found['seconds']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _percent(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(found: Iterable[Mapping[str, Any]]) -> str:
    return HEAD + "".join(f"{row(f)}\n" for f in found)


def write(text: str) -> None:
    before, begins, rest = PAGE.read_text(encoding="utf-8").partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not ends:
        sys.exit(f"{PAGE.name} has no place for the table")
    PAGE.write_text(before + begins + text + ends + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all of the zoo")
    parser.add_argument("--gpu-python", help="interpreter of an environment with jax[cuda12]")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    documents = []
    for name in given.models or zoo.names():
        kept = None if given.keep is None else given.keep / f"{name}.json"
        if kept is not None and kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
        else:
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
            found = verified(name, given.gpu_python, given.keep)
            if kept is not None:
                kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
        documents.append(found)
        print(row(found), file=sys.stderr, flush=True)
    text = table(documents)
    print(text, end="")
    if given.write:
        write(text)


if __name__ == "__main__":
    main()
