"""Why nothing fits, in the user's words: what fills the memory, what could be relaxed."""

from __future__ import annotations

from planner.model import RECOMPUTES_ALL, Inference
from planner.report import amounts
from planner.result import Result


def explain(result: Result) -> tuple[str, ...]:
    """`result`: the plan of least memory that was found."""
    memory = result.memory
    need = memory.peak_bytes * (1 + result.headroom)
    limit = result.limit_bytes
    lines = [
        f"does not fit: the plan of least memory found needs {amounts.size(need)} per device "
        f"(headroom {result.headroom:.0%} included), the limit is {amounts.size(limit)}"
    ]
    parts = sorted(memory.parts.items(), key=lambda kv: -kv[1])
    lines.append(
        "memory at the peak: "
        + ", ".join(f"{name.replace('_', ' ')} {amounts.size(n)}" for name, n in parts if n)
    )
    lines.append(
        "largest tensors: " + ", ".join(f"{t} {amounts.size(n)}" for t, _, n in memory.largest[:5])
    )
    relax = ["more devices", *_relaxed(result)]
    if result.model.constraints:
        relax.append("fewer constraints")
    lines.append("what could be relaxed: " + "; ".join(relax))
    return tuple(lines)


def _relaxed(result: Result) -> list[str]:
    """What of the workload could ask for less memory."""
    memory, workload = result.memory, result.model.workload
    large = memory.peak_bytes / 4
    working = memory.parts["activations"] + memory.parts["temporaries"]
    found = []
    if isinstance(workload, Inference):
        if working + memory.parts["kv_cache"] > large:
            found.append("a smaller inference.batch or inference.context")
        return found
    if working > large:
        if workload.remat not in RECOMPUTES_ALL:
            found.append("training.remat: full")
        found.append("a smaller training.batch, or more training.accumulation_steps")
    if memory.parts["optimizer"] > large and workload.optimizer != "adafactor":
        found.append("an optimizer with smaller states (adafactor)")
    return found
