"""What was verified, as text for people and as JSON documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.annotations import as_lists
from planner.export.jax_expr import partition
from planner.sharding.spec import Spec
from planner.verify.compare import Row, Verification, summary
from planner.verify.compile import Compiled
from planner.verify.fewest import Recovered
from planner.verify.stages import VerifiedStage, VerifiedStages

_SCALES = {"B": (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)),
           "FLOP": (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("FLOP", 1)),
           "s": (("s", 1), ("ms", 1e-3), ("µs", 1e-6))}  # fmt: skip


def document(v: Verification) -> dict[str, Any]:
    """SI units, bytes, seconds; errors are predicted / compiled − 1."""
    return {
        "schema_version": 1,
        "model": v.model,
        "mesh": v.mesh,
        "backend": v.compiled.backend,
        "versions": dict(v.compiled.versions),
        **_findings(v),
    }


def stages_document(v: VerifiedStages) -> dict[str, Any]:
    """One entry per kind of stage, with the same keys."""
    compiled = v.stages[0].found.compiled
    return {
        "schema_version": 1, "model": v.model, "mesh": v.mesh, "schedule": v.schedule,
        "backend": compiled.backend, "versions": dict(compiled.versions), "ok": v.ok,
        "stages": [
            {"numbers": list(s.alone.numbers), "mesh": s.found.mesh,
             "in_flight": s.alone.in_flight, "held_bytes": s.alone.held_bytes,
             "unreduced": list(s.alone.unreduced),
             **_findings(s.found)}
            for s in v.stages
        ],
    }  # fmt: skip


def _findings(v: Verification) -> dict[str, Any]:
    return {
        "status": v.compiled.status,
        "seconds": v.compiled.seconds,
        "fits": v.fits,
        "limit_bytes": v.limit_bytes,
        "needed_bytes": v.compiled.needed_bytes,
        "ok": v.ok,
        "quantities": [_row(r) for r in v.rows],
        "collectives": [_row(r) for r in v.collectives],
        "raw_collectives": [_row(r) for r in v.raw],
        "collective_errors": dict(summary(v.collectives)),
        "note": v.note,
    }


def _row(r: Row) -> dict[str, Any]:
    error = r.error
    return {
        "name": r.name, "unit": r.unit, "predicted": r.predicted, "compiled": r.compiled,
        "error": None if error == float("inf") else error, "threshold": r.threshold,
        "exceeded": r.exceeded,
    }  # fmt: skip


def recovered_document(r: Recovered) -> dict[str, Any]:
    """Bytes; errors are few / all annotations − 1."""
    rows = [(key, [_row(row) for row in rows])
            for key, rows in (("quantities", r.rows), ("collectives", r.collectives))]  # fmt: skip
    for _, shown in rows:
        for row in shown:
            row["few"], row["all"] = row.pop("predicted"), row.pop("compiled")
    return {
        "schema_version": 1, "model": r.model, "mesh": r.mesh, "backend": r.few.backend,
        "versions": dict(r.few.versions), "annotations": as_lists(r.found.annotations),
        "of": r.found.count, "status": {"few": r.few.status, "all": r.every.status}, "ok": r.ok,
        **dict(rows),
    }  # fmt: skip


def recovered_text(r: Recovered) -> str:
    """What the compiler makes of few annotations and of all, the verdict last."""
    names = r.found.annotations
    lines = [
        r.mesh,
        f"{r.model}: {len(names)} of {r.found.count} annotations, and all of them, "
        f"through the {r.few.backend} compiler ({_versions(r.few)})",
        "",
        *(f"  {name}  {partition(Spec(axes))}" for name, axes in names.items()),
        "",
        *_table(("per device", "few", "all", "difference", ""), r.rows),
    ]
    if r.collectives:
        lines += ["", *_table(("collectives, one form", "", "", "", ""), r.collectives)]
    return "\n".join([*lines, "", _recovered_verdict(r)]) + "\n"


def _recovered_verdict(r: Recovered) -> str:
    for which, compiled in (("few", r.few), ("all", r.every)):
        if compiled.status != "compiled":
            return f"verdict: no: with {which} annotations the compiler runs out of memory"
    wrong = [row.name for row in r.judged if row.exceeded]
    if wrong:
        return f"verdict: no: the compiler makes another program of them: {', '.join(wrong)}"
    return "verdict: yes: the compiler recovers the plan from these annotations"


def _versions(compiled: Compiled) -> str:
    return ", ".join(f"{name} {number}" for name, number in compiled.versions.items())


def text(v: Verification) -> str:
    """Everything compared, the verdict last."""
    versions = _versions(v.compiled)
    head = f"{v.model}: predicted against the {v.compiled.backend} compiler ({versions})"
    return "\n".join([v.mesh, head, *_note(v), "", *_tables(v), "", verdict(v)]) + "\n"


def _note(v: Verification) -> list[str]:
    return [f"not as planned: {v.note}"] if v.note else []


def stages_text(v: VerifiedStages) -> str:
    """A block for every kind of stage, the verdict over all last."""
    compiled = v.stages[0].found.compiled
    lines = [
        v.mesh,
        f"{v.model}, {v.schedule}: predicted against the {compiled.backend} compiler "
        f"({_versions(compiled)})",
        "each stage compiled alone on its submesh; in-flight buffers of the schedule are ours and "
        "added",
        f"transfers along {v.axis} are in no stage's program, and not compared",
    ]
    for stage in v.stages:
        lines += ["", *_stage_head(stage), "", *_tables(stage.found)]
    return "\n".join([*lines, "", _stages_verdict(v)]) + "\n"


def _stage_head(s: VerifiedStage) -> list[str]:
    numbers, held = s.alone.numbers, _amount(s.alone.held_bytes, "B")
    which = f"stage {numbers[0]}"
    if len(numbers) > 1:
        which = f"stages {numbers[0]} … {numbers[-1]}, {len(numbers)} equal ones"
    return [
        f"{which}, on {s.found.mesh}: microbatches in flight {s.alone.in_flight}, {held} added to "
        "the compiled peak",
        *_note(s.found),
    ]


def _stages_verdict(v: VerifiedStages) -> str:
    verdicts = [(s.alone.numbers[0], s.found) for s in v.stages]
    wrong = [f"stage {n}: {_reason(found)}" for n, found in verdicts if not found.ok]
    if wrong:
        return f"verdict: no: {'; '.join(wrong)}"
    if any(found.compiled.status == "exhausted" for _, found in verdicts):
        return "verdict: yes: predicted not to fit, and it does not"
    judged = sum(r.threshold is not None for _, found in verdicts for r in found.judged)
    return f"verdict: yes: {judged} figures agree"


def _tables(v: Verification) -> list[str]:
    lines = []
    if v.compiled.status == "exhausted":
        lines += [f"the compiler ran out of memory{_needed(v)}", ""]
    lines += _table(("per device", "predicted", "compiled", "error", ""), v.rows)
    if v.collectives:
        lines += ["", *_table(("collectives, one form", "", "", "", ""), v.collectives)]
        lines += ["", *_table(("collectives as they are", "", "", "", ""), v.raw)]
    return lines


def verdict(v: Verification) -> str:
    if not v.ok:
        return f"verdict: no: {_reason(v)}"
    if v.compiled.status == "exhausted":
        return "verdict: yes: predicted not to fit, and it does not"
    return f"verdict: yes: {sum(r.threshold is not None for r in v.judged)} figures agree"


def _reason(v: Verification) -> str:
    """Why it is not ok."""
    if v.false_fits:
        return "predicted to fit, but the compiler runs out of memory"
    return f"beyond the threshold: {', '.join(r.name for r in v.judged if r.exceeded)}"


def _needed(v: Verification) -> str:
    if v.compiled.needed_bytes is None:
        return ""
    needed, limit = _amount(v.compiled.needed_bytes, "B"), _amount(v.limit_bytes, "B")
    return f": it needs at least {needed} of {limit}"


def _table(head: Sequence[str], rows: Sequence[Row]) -> list[str]:
    cells = [tuple(head), *(_cells(r) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cells(r: Row) -> tuple[str, str, str, str, str]:
    error = r.error
    shown = "-" if error is None else f"{error:+.1%}"
    if error == float("inf"):
        shown = "only predicted"
    mark = "" if r.threshold is None else ("> " if r.exceeded else "≤ ") + f"{r.threshold:.0%}"
    return r.name, _amount(r.predicted, r.unit), _amount(r.compiled, r.unit), shown, mark


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    for name, scale in _SCALES[unit]:
        if abs(value) >= scale:
            return f"{value / scale:.3f} {name}" if scale != 1 or unit == "s" else f"{value:.0f} B"
    return f"0 {unit}"
