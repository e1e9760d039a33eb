"""The files that `plan MODEL -o DIR` writes, and the formats of `plan export`.

A table from format to function; the formats themselves are modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.annotations import Axes, axes_by_name
from planner.errors import InputError, nearest
from planner.export import annotationfile, jax_annotations, logical_rules, planfile, shardy
from planner.export.jax_program import jax_program, result_program
from planner.export.placement import only
from planner.export.planfile import PlanFile
from planner.export.stamp import signature
from planner.minimal import Minimal
from planner.minimal import minimal as fewest
from planner.pins import Meaning
from planner.progress import Progress
from planner.report.document import prediction
from planner.request import Planned


def plan_file(planned: Planned) -> PlanFile:
    """What plan.json holds: nothing of the machine that planned, no paths."""
    result, machine, options = planned.result, planned.machine, planned.options
    return PlanFile(
        planfile.FILE_NAME, planned.stamp, planned.source.portable(), machine.portable_argument,
        machine.text, machine.layout, options.memory_bytes, result.headroom, options.seed,
        {name: tuple(map(tuple, dims)) for name, dims in planned.annotation.items()},
        prediction(planned), result.plan,
    )  # fmt: skip


def files(planned: Planned) -> dict[str, str]:
    """Text by file name."""
    return {
        planfile.FILE_NAME: planfile.dump(plan_file(planned)),
        "annotations.py": jax_annotations.dump(planned.result),
        "annotations.json": _json(planned),
    }


def _json(planned: Planned) -> str:
    return annotationfile.dump(planned.stamp, axes_by_name(planned.result))


FORMATS: dict[str, Callable[[Planned], str]] = {
    "jax": lambda planned: jax_annotations.dump(planned.result),
    "jax-program": lambda planned: f"# {signature()}\n{result_program(planned.result)}",
    "json": _json,
    "flax": lambda planned: logical_rules.flax(planned.result),
    "maxtext": lambda planned: logical_rules.maxtext(planned.result),
    "shardy": lambda planned: shardy.dump(planned.result),
}


def exporter(form: str) -> Callable[[Planned], str]:
    """The function of a format; InputError with the known ones."""
    if form not in FORMATS:
        near = nearest(form, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"formats: {', '.join(FORMATS)}"
        raise InputError(f"no export format {form!r}", hint)
    return FORMATS[form]


def _apart(found: Minimal) -> dict[str, Axes]:
    """What holds for like layers, for each of them."""
    members = found.result.model.members
    return {
        member: axes
        for name, axes in found.annotations.items()
        for member in members.get(name, (name,))
    }


def minimal(planned: Planned, form: str, progress: Progress | None = None) -> tuple[str, str]:
    """The fewest annotations that stand for the plan, and a remark about them."""
    if form not in ("json", "jax-program"):
        raise InputError(f"--minimal has no format {form!r}", "formats: json, jax-program")
    found = fewest(planned.result, planned.options, progress)
    after, before = found.result.timing.step_time_s, planned.result.timing.step_time_s
    remark = (
        f"{len(found.annotations)} of {found.count} annotations: {', '.join(found.annotations)}; "
        f"step time {after / before - 1:+.1%} from the plan's"
    )
    if form == "json":
        return annotationfile.dump(planned.stamp, _apart(found), Meaning.PROGRAM), remark
    place = only(found.result, found.annotations)
    program = jax_program(found.result.model, found.result.mesh, place)
    return f"# {signature()}\n{program}", remark
