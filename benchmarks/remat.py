"""`remat: auto` against every fixed policy, each planned by itself, on every zoo model.

    python benchmarks/remat.py                          # the zoo
    python benchmarks/remat.py lamda-137b --memory 5GiB
    python benchmarks/remat.py --keep FOLDER --write    # goes on where it was stopped

Prints a Markdown table; `--write` puts it into docs/rematerialisation.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "rematerialisation.md"
BEGINS, ENDS = "<!-- remat -->\n", "<!-- end of remat -->\n"
POLICIES = ("full", "dots", "attention", "none")
LIMIT_S = 900.0
SAME = 1e-3  # the planner takes step times that differ by less as equal
HEAD = (
    "| model | full | dots | attention | none | `auto` saves | step | faster than the best |\n"
    "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n"
)


def planned(model: str, policy: str, memory: str | None, folder: Path | None) -> dict[str, Any]:
    """The document of a plan; {} if there is none within the limit."""
    name = "-".join(filter(None, [model, memory, policy])) + ".json"
    if folder is not None and (folder / name).exists():
        known: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return known
    command = [sys.executable, "cli.py", model, "--set", f"training.remat={policy}", "-q"]
    command += ["--format", "json", *(["--memory", memory] if memory else [])]
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        found: dict[str, Any] = json.loads(run.stdout) if run.stdout else {}
    except subprocess.TimeoutExpired:
        found = {}
    if folder is not None:
        (folder / name).write_text(json.dumps(found), encoding="utf-8")
    return found


def row(model: str, memory: str | None, folder: Path | None) -> str:
    fixed = {p: _step_s(planned(model, p, memory, folder)) for p in POLICIES}
    auto = planned(model, "auto", memory, folder)
    step_s = _step_s(auto)
    best_s = min((s for s in fixed.values() if s is not None), default=None)
    faster = "–"
    if step_s is not None and best_s is not None:
        share = 1 - step_s / best_s
        faster = "0" if abs(share) <= SAME else f"{share:.1%}".replace("%", " %")
    saved = auto.get("remat", "–")
    saved = saved if isinstance(saved, str) else f"{len(saved)} values"
    name = model if memory is None else f"{model}, `--memory {memory}`"
    steps = " | ".join(_shown(fixed[p]) for p in POLICIES)
    return f"| {name} | {steps} | {saved} | {_shown(step_s)} | {faster} |\n"


def _step_s(document: dict[str, Any]) -> float | None:
    """None for what does not fit, too."""
    return document["step_time_s"] if document.get("memory", {}).get("fits") else None


def _shown(step_s: float | None) -> str:
    if step_s is None:
        return "–"
    return f"{step_s:.4g} s" if step_s >= 0.1 else f"{step_s * 1e3:.4g} ms"


def cases(models: list[str], memory: str | None) -> Iterator[tuple[str, str | None]]:
    if models:
        yield from ((m, memory) for m in models)
        return
    yield from ((path.stem, None) for path in sorted((ROOT / "planner/zoo").glob("*.yaml")))
    yield "lamda-137b", "5GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--memory")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    print(HEAD, end="", flush=True)
    rows = []
    for model, memory in cases(given.models, given.memory):
        rows.append(row(model, memory, given.keep))
        print(rows[-1], end="", flush=True)
    if given.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGINS)
        after = rest.split(ENDS)[1]
        text = before + BEGINS + HEAD + "".join(rows) + ENDS + after
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
