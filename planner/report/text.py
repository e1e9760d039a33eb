"""The report that people read: verdicts first, then why, then what to paste.

From a planned result to rich renderables, top to bottom in the order of `report`. Figures come
from the result; nothing is computed here but layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from costmodels.summary import collectives
from planner.annotations import Annotated, annotated
from planner.model import Inference, Training, remat_text
from planner.report import amounts
from planner.report.document import notes
from planner.report.patterns import patterns
from planner.report.tables import table
from planner.request import Planned, Sensitivity
from planner.result import Result
from planner.search.candidates import FITS, Trial, front

TOP_COLLECTIVES = 8
MAIN_ACTIVATIONS = 12
LARGEST_TENSORS = 8
TOP_TRIALS = 12


def report(planned: Planned, command: str | None, sensitivity: Sequence[Sensitivity] = ()) -> Group:
    """The whole report. `command`: what writes this plan's files, None once they are written."""
    return Group(*_parts(planned, command, sensitivity))


def _parts(
    planned: Planned, command: str | None, sensitivity: Sequence[Sensitivity]
) -> Iterator[RenderableType]:
    result = planned.result
    yield Text(result.mesh.describe())
    yield Text(_about(result))
    yield Text()
    yield from _verdict(planned)
    yield Text()
    yield _memory(result)
    yield Text()
    yield _time(result)
    yield Text()
    yield from _shardings(result)
    yield Text()
    yield _collectives(result)
    if planned.shapes:
        yield Text()
        yield from _trials("mesh shapes", planned.shapes)
    if planned.savings:
        yield Text()
        yield from _trials("saved for the backward pass", planned.savings)
    if result.model.assumed:
        yield Text()
        yield from _assumed(result, sensitivity)
    for note in notes(planned):
        yield Text(f"note: {note}")
    if command is not None:
        yield Text()
        yield Text(f"write plan.json, annotations.py and annotations.json:\n  {command}")


def _about(result: Result) -> str:
    words = [
        f"{result.model.name}: {amounts.count(result.graph.parameter_count)} parameters",
        *_workload(result.model.workload),
    ]
    pipeline = result.model.pipeline
    if pipeline is not None and result.model.training.pipeline_microbatches > 1:
        count = result.model.training.pipeline_microbatches
        words.append(f"{pipeline.schedule} with {count} microbatches")
    return ", ".join(words)


def _workload(workload: Training | Inference) -> Iterator[str]:
    if isinstance(workload, Inference):
        yield f"{workload.phase} of batch {workload.batch}"
        yield f"context {workload.context}"
        yield workload.compute
        return
    yield f"batch {workload.batch}"
    yield workload.optimizer
    yield workload.compute
    yield f"remat {remat_text(workload.remat)}"
    if workload.accumulation_steps > 1:
        yield f"{workload.accumulation_steps} accumulation steps"


def _verdict(planned: Planned) -> Iterator[Text]:
    result, memory = planned.result, planned.result.memory
    mark = Text("fits", "bold green") if result.fits else Text("DOES NOT FIT", "bold red")
    mark.append(
        f": {amounts.size(memory.peak_bytes)} of {amounts.size(result.limit_bytes)} per device at "
        f"the peak, {amounts.share(result.headroom)} headroom asked for",
        "default",
    )
    yield mark
    for line in planned.explanation:
        yield Text(f"  {line}")
    if not result.fits and not planned.explanation:
        yield Text("  largest tensors at the peak:")
        for tensor, category, size in memory.largest[:LARGEST_TENSORS]:
            yield Text(f"    {amounts.size(size):>11}  {tensor} ({category.replace('_', ' ')})")
    yield Text(
        f"step {amounts.seconds(result.timing.step_time_s)}{_range(result)}, "
        f"{amounts.count(result.tokens_per_s)} tokens/s; "
        f"utilization: MFU {amounts.share(result.mfu)}, HFU {amounts.share(result.hfu)}"
    )
    if result.model.inference is not None:
        yield Text(_serving(result))
    yield Text(_proof(result))
    known = patterns(result)
    if known:
        yield Text(f"pattern: {', '.join(known)}")


def _serving(result: Result) -> str:
    """What inference is about, beyond the time of the step, which is its latency."""
    text = f"{amounts.count(result.tokens_per_s / result.mesh.devices)} tokens/s per device"
    if result.bandwidth_utilization is not None:
        text += f"; memory bandwidth utilization {amounts.share(result.bandwidth_utilization)}"
    if result.cache_bytes:
        text += f"; KV cache {amounts.size(result.cache_bytes)} per device"
    return text


def _range(result: Result) -> str:
    """Where four of five measured steps would lie, if known."""
    if result.step_time_range_s is None:
        return ""
    low, high = map(amounts.seconds, result.step_time_range_s)
    return f" ({low} to {high})"


def _proof(result: Result) -> str:
    proof = result.plan.proof
    text = f"solver: {proof.status}"
    for name, value in (("objective", proof.objective_s), ("bound", proof.bound_s)):
        text += f", {name} {amounts.seconds(value)}" if value < float("inf") else ""
    return text + (f", gap {amounts.share(proof.gap)}" if proof.gap < float("inf") else "")


def _memory(result: Result) -> Table:
    found = table("memory", "per device", "share", right=("per device", "share"))
    peak = result.memory.peak_bytes
    for part, size in result.memory.parts.items():
        if part == "kv_cache" and result.model.inference is None:
            continue
        share = amounts.share(size / peak) if peak else ""
        found.add_row(part.replace("_", " "), amounts.size(size), share)
    found.add_row("peak", amounts.size(peak), "", style="bold")
    return found


def _time(result: Result) -> Table:
    timing = result.timing
    found = table("time", "per step", "share", right=("per step", "share"))
    for name, part in (
        ("compute", timing.compute_s),
        ("exposed communication", timing.exposed_communication_s),
        ("bubble", timing.bubble_s),
    ):
        found.add_row(name, amounts.seconds(part), amounts.share(part / timing.step_time_s))
    found.add_row("step", amounts.seconds(timing.step_time_s), "", style="bold")
    return found


def _shardings(result: Result) -> Iterator[RenderableType]:
    tensors = annotated(result)
    given = [a for a in tensors if a.role in ("parameter", "input", "cache")]
    cached = any(a.role == "cache" for a in given)
    title = "parameters, inputs and caches" if cached else "parameters and inputs"
    yield _sharding_table(title, given)
    activations = [a for a in tensors if a not in given]
    if activations:
        largest = sorted(activations, key=lambda a: -_elements(a))[:MAIN_ACTIVATIONS]
        yield Text()
        left = len(activations) - len(largest)
        title = "largest activations" if left else "activations"
        yield _sharding_table(title, [a for a in activations if a in largest])
        if left:
            yield Text(f"and {left} more in annotations.json")


def _elements(a: Annotated) -> int:
    total = 1
    for n in a.shape:
        total *= n
    return total


def _sharding_table(title: str, tensors: Sequence[Annotated]) -> Table:
    found = table(title, "sharding", "shape")
    for a in tensors:
        stacked = f"{'×'.join(map(str, a.stacked))} × " if a.stacked else ""
        shape = ", ".join(f"{d} {n}" for d, n in zip(a.dims, a.shape, strict=True))
        found.add_row(Text(a.title), Text(axes_text(a)), Text(f"{stacked}[{shape}]"))
    return found


def axes_text(a: Annotated) -> str:
    """`[x+y, ·]`: the axes of every dimension."""
    return f"[{', '.join('+'.join(d) if d else '·' for d in a.axes)}]"


def _collectives(result: Result) -> Table:
    rows = collectives(result.program, result.mesh)
    title = "collectives" if len(rows) <= TOP_COLLECTIVES else f"top {TOP_COLLECTIVES} collectives"
    found = table(title, "axes", "payload", "times", "each", "total", "tensor",
                   right=("payload", "times", "each", "total"))  # fmt: skip
    for t in rows[:TOP_COLLECTIVES]:
        found.add_row(
            t.kind, "+".join(t.axes), amounts.size(t.bytes), str(t.count),
            amounts.seconds(t.seconds), amounts.seconds(t.total_s), Text(t.tensor),
        )  # fmt: skip
    return found


def _trials(title: str, trials: Sequence[Trial]) -> Iterator[RenderableType]:
    """Candidates, those marked that no other beats in both step time and memory."""
    best = front(trials)
    found = table(title, "step", "peak", "", "which is", right=("step", "peak"))
    for t in trials[:TOP_TRIALS]:
        step = amounts.seconds(t.step_time_s) if t.plan else f"≥ {amounts.seconds(t.bound_s)}"
        found.add_row(
            Text(t.name), step if t.plan or _bounds_step(t) else "",
            "" if t.peak_bytes is None else amounts.size(t.peak_bytes),
            "front" if t in best else "" if t.outcome == FITS else t.outcome,
            Text(t.mesh.assignment() if t.remat is None else remat_text(t.remat)),
        )  # fmt: skip
    yield found
    yield Text("front: no other is both faster and smaller")
    outcomes = Counter(t.outcome for t in trials[TOP_TRIALS:])
    if outcomes:
        yield Text("and " + ", ".join(f"{n} more {what}" for what, n in outcomes.items()))


def _bounds_step(t: Trial) -> bool:
    """Whether its bound is one of the step time: it is one of the serial time."""
    return not t.mesh.chip.overlap and 0 < t.bound_s < float("inf")


def _assumed(result: Result, sensitivity: Sequence[Sensitivity]) -> Iterator[Text]:
    """What the model's source leaves open, and what it means for the utilization."""
    ends = {s.key: s for s in sensitivity}
    yield Text("assumed", "bold")
    for a in result.model.assumed:
        found = ends.get(a.key)
        hfu = f", HFU {_hfu(found.low_hfu)} … {_hfu(found.high_hfu)}" if found else ""
        yield Text(f"  {a.key} = {a.value} of {a.low} … {a.high}{hfu}: {a.why}")


def _hfu(value: float | None) -> str:
    return "no plan" if value is None else amounts.share(value)
