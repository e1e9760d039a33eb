"""What `plan check` asks of a result, and the answers: one Finding per question.

Judging only; how findings are shown is for `report.findings`. Whether it fits is answered by the
prediction, or by a compiler if one is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from planner.errors import InputError
from planner.export.planfile import PlanFile
from planner.export.stamp import Stale
from planner.report import amounts
from planner.request import Planned
from planner.result import Result
from planner.verify.compile import Compiled

# The compiler's word on every program, and bytes to add to its peak.
Compiler = Callable[[Result], Iterable[tuple[Compiled, int]]]


@dataclass(frozen=True)
class Limits:
    """`min_utilization` concerns MFU. `tolerance`: how far above the baseline is still equal."""

    max_step_time_s: float | None = None
    min_utilization: float | None = None
    baseline: PlanFile | None = None
    tolerance: float = 0.02


@dataclass(frozen=True)
class Finding:
    """`rule` is a stable word for machines; `value` and `limit` in SI units, where there are
    any."""

    rule: str
    ok: bool
    message: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Check:
    """All findings about one model. `planned` is None where it could not be priced (stale)."""

    file: str
    findings: tuple[Finding, ...]
    planned: Planned | None = field(default=None, compare=False)

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)


def check(
    file: str, price: Callable[[], Planned], limits: Limits, compiler: Compiler | None = None
) -> Check:
    """Judges what `price` returns; a stale file is a finding, not an error. What `compiler` says
    of the memory counts instead of the prediction."""
    try:
        planned = price()
    except Stale as stale:
        text = f"{stale}; refresh with: {stale.refresh}"
        return Check(file, (Finding("stale", False, text),))
    memory = _memory(planned) if compiler is None else _compiled(planned.result, compiler)
    return Check(file, (memory, *_budgets(planned, limits)), planned)


def _budgets(planned: Planned, limits: Limits) -> Iterator[Finding]:
    result = planned.result
    step_s = result.timing.step_time_s
    if limits.max_step_time_s is not None:
        ok = step_s <= limits.max_step_time_s
        text = f"step time {amounts.seconds(step_s)}, " + (
            f"{'within' if ok else 'over'} {amounts.seconds(limits.max_step_time_s)}"
        )
        yield Finding("step-time", ok, text, step_s, limits.max_step_time_s)
    if limits.min_utilization is not None:
        ok = result.mfu >= limits.min_utilization
        text = f"MFU {amounts.share(result.mfu)}, {'at least' if ok else 'below'} " + (
            amounts.share(limits.min_utilization)
        )
        yield Finding("utilization", ok, text, result.mfu, limits.min_utilization)
    if limits.baseline is not None:
        before = limits.baseline
        peak = float(result.memory.peak_bytes)
        old_peak = _recorded(before, "memory", "peak_bytes")
        yield _regression("peak-memory", peak, old_peak, limits, amounts.size)
        old_step = _recorded(before, "step_time_s")
        yield _regression("step-time", step_s, old_step, limits, amounts.seconds)


def _memory(planned: Planned) -> Finding:
    result = planned.result
    peak, limit = result.memory.peak_bytes, result.limit_bytes
    text = f"{'fits' if result.fits else 'does not fit'}: {amounts.size(peak)} of " + (
        f"{amounts.size(limit)} per device, headroom {amounts.share(result.headroom)}"
    )
    if planned.explanation:
        text = planned.explanation[0]
    return Finding("memory", result.fits, text, float(peak), float(limit))


def _compiled(result: Result, compiler: Compiler) -> Finding:
    """The compiler's verdict: no headroom, because nothing is predicted but what waits for other
    stages of a pipeline."""
    parts, limit = list(compiler(result)), result.limit_bytes
    compiled, added = max(parts, key=_needed)
    whole = all(c.status == "compiled" for c, _ in parts)
    peak = None if compiled.peak_bytes is None else compiled.peak_bytes + added
    fits = whole and peak is not None and peak <= limit
    least = "" if whole else "at least "
    needed = "more than there is" if peak is None else f"{least}{amounts.size(peak)}"
    text = f"{'fits' if fits else 'does not fit'}: {needed} of {amounts.size(limit)} per device "
    text += f"by the {compiled.backend} compiler"
    text += f" with {amounts.size(added)} of microbatches in flight" if added else ""
    text += f", {amounts.size(result.memory.peak_bytes)} predicted"
    return Finding("memory", fits, text, None if peak is None else float(peak), float(limit))


def _needed(part: tuple[Compiled, int]) -> float:
    """Bytes; most where the compiler ran out of memory without a figure."""
    compiled, added = part
    return inf if compiled.peak_bytes is None else compiled.peak_bytes + added


def _regression(
    what: str, now: float, before: float, limits: Limits, show: Callable[[float], str]
) -> Finding:
    limit = before * (1 + limits.tolerance)
    change = f"{now / before - 1:+.1%}" if before else "from nothing"
    text = f"{what.replace('-', ' ')} {show(now)}, {change} against the baseline's {show(before)}"
    text += f" (tolerance {amounts.share(limits.tolerance)})"
    return Finding(f"regression-{what}", now <= limit, text, now, limit)


def _recorded(baseline: PlanFile, *path: str) -> float:
    """A figure that the baseline predicted."""
    value: Any = baseline.predicted
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{baseline.file}: predicted.{'.'.join(path)} is no number")
    return float(value)
