"""The JSON document of a result: the keys that other programs rely on, always all of them.

SI units, bytes, seconds, fractions; what is not known is null. Only `seconds` depends on the
machine that planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from costmodels.summary import beyond_fit, collectives
from planner.annotations import as_lists, axes_by_name
from planner.export.jsontext import finite
from planner.graph.core import Loop
from planner.model import Inference, Model, Remat
from planner.report.padding import padding_notes
from planner.request import Planned
from planner.result import Result
from planner.search.candidates import Trial, front

SCHEMA_VERSION = 1
WORTH_SAYING = 0.1  # of computing time beyond what efficiencies were fitted to


def document(planned: Planned) -> dict[str, Any]:
    result = planned.result
    timing = result.timing
    return {
        "schema_version": SCHEMA_VERSION,
        "model": result.model.name,
        "parameters": result.graph.parameter_count,
        "mesh": _mesh(result),
        "solver": _solver(result),
        "step_time_s": timing.step_time_s, "step_time_range_s": result.step_time_range_s,
        "tokens_per_s": result.tokens_per_s,
        "utilization": {"mfu": result.mfu, "hfu": result.hfu},
        "flops_per_step": result.flops.model,
        "memory": _memory(result),
        "time": {
            "compute_s": timing.compute_s,
            "exposed_communication_s": timing.exposed_communication_s,
            "bubble_s": timing.bubble_s,
        },
        "collectives": [
            {
                "kind": t.kind, "axes": list(t.axes), "bytes": t.bytes, "seconds": t.seconds,
                "count": t.count, "tensor": t.tensor,
            }
            for t in collectives(result.program, result.mesh)
        ],
        "annotations": as_lists(axes_by_name(result)),
        "assumed": [
            {"key": a.key, "value": a.value, "low": a.low, "high": a.high, "why": a.why}
            for a in result.model.assumed
        ],
        "mesh_shapes": [
            {
                "axes": dict(t.mesh.axes), "layout": t.mesh.assignment(),
                "settings": list(t.settings), **figures,
            }
            for t, figures in _trials(planned.shapes)
        ],
        "inference": _inference(result),
        "remat": _remat(result),
        "remat_choices": [
            {"remat": _saved(t.remat), **figures} for t, figures in _trials(planned.savings)
        ],
        "notes": list(notes(planned)),
        "explanation": list(planned.explanation),
    }  # fmt: skip


def as_json(value: Any) -> str:
    """JSON for stdout."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def prediction(planned: Planned) -> dict[str, Any]:
    """What a plan file remembers for later comparison: the figures, nothing of the machine."""
    whole = document(planned)
    kept = ("step_time_s", "tokens_per_s", "utilization", "flops_per_step", "memory", "time")
    return {key: whole[key] for key in kept}


def notes(planned: Planned) -> tuple[str, ...]:
    """What a reader of the figures should know."""
    result = planned.result
    found = list(result.notes)
    if planned.machine.shape is None and not planned.machine.every:
        found.append(
            f"no mesh shape was given: this is the best of {max(1, len(planned.shapes))} automatic "
            "ones; --shape auto tries all"
        )
    found += [*_loops(result.model), *padding_notes(result)]
    if result.step_time_range_s is None:
        found.append("step time: no run on this chip has been compared with its prediction")
    beyond = beyond_fit(result.program, result.mesh)
    if beyond >= WORTH_SAYING:
        found.append(
            f"step time: {beyond:.0%} of its computing is in products smaller or larger than those "
            "that efficiencies were fitted to"
        )
    published = result.model.published_parameters
    if published is not None:
        off = result.graph.parameter_count / published - 1
        found.append(f"parameters: {off:+.1%} from the published {published / 1e9:g}e9")
    return tuple(found)


def _loops(model: Model) -> Iterator[str]:
    """What has become of layers that are written out."""
    for node in model.graph.nodes:
        stacks = [s.outer for s in node.reads] if isinstance(node, Loop) else []
        if isinstance(node, Loop) and stacks and stacks[0] in model.members:
            more = ", …" if len(stacks) > 1 else ""
            yield (
                f"{node.times} like layers are planned as one: figures are given under the names "
                f"of the first ({stacks[0]}{more})"
            )


def _mesh(result: Result) -> dict[str, Any]:
    mesh = result.mesh
    return {
        "name": mesh.topology.name, "chip": mesh.chip.name, "chips": mesh.topology.chips,
        "devices": mesh.devices, "axes": dict(mesh.axes),
    }  # fmt: skip


def _trials(trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """The candidates of a search with their figures, the best first."""
    best = front(trials)
    for t in trials:
        yield t, {
            "outcome": t.outcome, "step_time_s": finite(t.step_time_s),
            "peak_bytes": t.peak_bytes, "bound_s": finite(t.bound_s), "front": t in best,
        }  # fmt: skip


def _inference(result: Result) -> dict[str, Any] | None:
    """What inference is about; null for a training step."""
    inference = result.model.inference
    if inference is None:
        return None
    return {
        "phase": inference.phase, "batch": inference.batch, "context": inference.context,
        "latency_s": result.timing.step_time_s,
        "tokens_per_s_per_device": result.tokens_per_s / result.mesh.devices,
        "bandwidth_utilization": result.bandwidth_utilization,
        "kv_cache_bytes": result.cache_bytes,
    }  # fmt: skip


def _remat(result: Result) -> str | list[str] | None:
    workload = result.model.workload
    return None if isinstance(workload, Inference) else _saved(workload.remat)


def _saved(remat: Remat | None) -> str | list[str] | None:
    """A policy's name, or the values that are saved for the backward pass."""
    return list(remat) if isinstance(remat, tuple) else remat


def _solver(result: Result) -> dict[str, Any]:
    proof = result.plan.proof
    return {
        "status": proof.status, "objective_s": finite(proof.objective_s),
        "bound_s": finite(proof.bound_s), "gap": finite(proof.gap), "seconds": proof.seconds,
    }  # fmt: skip


def _memory(result: Result) -> dict[str, Any]:
    parts = {f"{part}_bytes": size for part, size in result.memory.parts.items()}
    return {
        "limit_bytes": result.limit_bytes, "peak_bytes": result.memory.peak_bytes,
        "fits": result.fits, "headroom": result.headroom, **parts,
    }  # fmt: skip
