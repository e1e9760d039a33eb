"""plan.json: everything needed to lower and price a plan again, without the model file.

It keeps the text of the model (and of a mesh file), the choice of every op and the spec of
every home, and the figures that were predicted, for comparison with later plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from planner.annotations import Axes, as_lists
from planner.errors import InputError
from planner.export.annotationfile import StampDocument
from planner.export.jsontext import checked, finite, pretty, read_json, read_text
from planner.export.stamp import Stamp, signature
from planner.plan import Plan, Proof
from planner.sharding.choices import Choice
from planner.sharding.spec import Spec
from planner.source import Source

FORMAT = "shardplan-plan"
VERSION = 2
FILE_NAME = "plan.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(_Strict):
    argument: str
    file: str
    text: str
    overrides: tuple[str, ...]


class _Mesh(_Strict):
    argument: str
    text: str | None
    layout: dict[str, dict[str, int]] | None = None


class _Options(_Strict):
    memory_bytes: int | None
    headroom: float
    seed: int


class _Choice(_Strict):
    split: tuple[tuple[str, ...], ...]
    passed: tuple[tuple[int, tuple[str, ...]], ...] = ()


class _Home(_Strict):
    dims: tuple[tuple[str, ...], ...]
    partial: tuple[str, ...] = ()


class _Proof(_Strict):
    status: str
    objective_s: float | None
    bound_s: float | None
    gap: float | None


class _Piece(_Strict):
    choices: dict[str, _Choice]
    homes: dict[str, _Home]


class _Document(_Strict):
    format: Literal["shardplan-plan"]
    schema_version: Literal[2]
    generator: str
    made_for: StampDocument
    model: _Model
    mesh: _Mesh
    options: _Options
    constraints: dict[str, tuple[tuple[str, ...], ...]]
    predicted: dict[str, Any]
    proof: _Proof
    remat: str | tuple[str, ...] | None = None
    choices: dict[str, _Choice]
    homes: dict[str, _Home]
    pieces: tuple[_Piece, ...] = ()  # of a pipeline: every kind of stage, over the other axes
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanFile:
    """What plan.json says. `predicted` is the report's document without the annotations.

    `memory_bytes` is None where the chip's own limit holds; `constraints` is the annotation
    that the plan was made under.
    """

    file: str
    stamp: Stamp
    source: Source
    mesh_argument: str
    mesh_text: str | None
    layout: Mapping[str, Mapping[str, int]] | None
    memory_bytes: int | None
    headroom: float
    seed: int
    constraints: Mapping[str, Axes]
    predicted: Mapping[str, Any]
    plan: Plan


def dump(stored: PlanFile) -> str:
    source, plan, proof = stored.source, stored.plan, stored.plan.proof
    pieces = {"pieces": [_decisions(p) for p in plan.pieces], "starts": list(plan.starts)}
    return pretty(
        {
            "format": FORMAT, "schema_version": VERSION, "generator": signature(),
            "made_for": StampDocument.of(stored.stamp).model_dump(),
            "model": {
                "argument": source.argument, "file": source.file,
                "overrides": list(source.overrides), "text": source.text,
            },
            "mesh": {
                "argument": stored.mesh_argument, "text": stored.mesh_text,
                "layout": _layout(stored),
            },
            "options": {
                "memory_bytes": stored.memory_bytes, "headroom": stored.headroom,
                "seed": stored.seed,
            },
            "constraints": as_lists(stored.constraints),
            "predicted": dict(stored.predicted),
            "proof": {
                "status": proof.status, "objective_s": finite(proof.objective_s),
                "bound_s": finite(proof.bound_s), "gap": finite(proof.gap),
            },
            "remat": plan.remat,
            **_decisions(plan if not plan.pieces else replace(plan, choices={})),
            **(pieces if plan.pieces else {}),
        }
    )  # fmt: skip


def _decisions(plan: Plan) -> dict[str, Any]:
    return {
        "choices": {name: _choice(c) for name, c in plan.choices.items()},
        "homes": {tensor: _home(spec) for tensor, spec in plan.homes.items()},
    }


def _layout(stored: PlanFile) -> dict[str, dict[str, int]] | None:
    if stored.layout is None:
        return None
    return {axis: dict(parts) for axis, parts in stored.layout.items()}


def _choice(choice: Choice) -> dict[str, Any]:
    found: dict[str, Any] = {"split": [list(axes) for axes in choice.split]}
    if choice.passed:
        found["passed"] = [[group, list(axes)] for group, axes in choice.passed]
    return found


def _home(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = {"dims": [list(axes) for axes in spec.dims]}
    if spec.partial:
        found["partial"] = list(spec.partial)
    return found


def load(path: Path) -> PlanFile:
    """The plan in a file, or in the plan.json of a folder. Raises InputError."""
    path = path / FILE_NAME if path.is_dir() else path
    value = read_json(read_text(path), str(path))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} is no plan file", "`plan MODEL -o DIR` writes DIR/plan.json")
    if value.get("schema_version") != VERSION:
        raise InputError(
            f"{path}: schema_version {value.get('schema_version')!r} is not known",
            "another version of this program wrote it: plan the model again",
        )
    return _plan_file(checked(_Document, value, str(path)), str(path))


def _plan_file(d: _Document, file: str) -> PlanFile:
    stamp = d.made_for.stamp()
    proof = Proof(
        d.proof.status, _infinite(d.proof.objective_s), _infinite(d.proof.bound_s),
        _infinite(d.proof.gap),
    )  # fmt: skip
    pieces = tuple(_plan(piece, stamp.axes, proof) for piece in d.pieces)
    plan = replace(_plan(d, stamp.axes, proof), pieces=pieces, starts=d.starts, remat=d.remat)
    source = Source(d.model.argument, d.model.file, d.model.text, d.model.overrides)
    return PlanFile(
        file, stamp, source, d.mesh.argument, d.mesh.text, d.mesh.layout,
        d.options.memory_bytes, d.options.headroom, d.options.seed, d.constraints, d.predicted,
        plan,
    )  # fmt: skip


def _plan(d: _Document | _Piece, axes: tuple[tuple[str, int], ...], proof: Proof) -> Plan:
    choices = {name: Choice(c.split, c.passed) for name, c in d.choices.items()}
    homes = {tensor: Spec(h.dims, h.partial) for tensor, h in d.homes.items()}
    return Plan(axes, choices, homes, proof)


def _infinite(number: float | None) -> float:
    return float("inf") if number is None else number
