"""`--shape auto` of a model with a pipeline: ranked, planned, stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_support import plan

from meshes import LogicalMesh
from planner.model import Model
from planner.search import staging

MODEL = """
mesh: "v100-8:2x2"
training: {batch: 16, optimizer: sgd, compute: f16}
pipeline: {axis: pipe, schedule: 1f1b}
architecture: {kind: decoder, layers: 4, d_model: 256, heads: 8, vocab: 512, sequence: 64}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL, encoding="utf-8")
    return path


def test_pipelines_are_ranked_among_the_shapes(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the ranking says of a pipeline is what planning it by hand gives."""
    found = json.loads(plan(capsys, path, "--shape", "auto", "--format", "json").out)
    trials = found["mesh_shapes"]
    assert {t["axes"]["pipe"] for t in trials} == {1, 2, 4}
    best = min(t["step_time_s"] for t in trials if t["outcome"] == "fits")
    assert found["step_time_s"] == best
    staged = next(t for t in trials if t["settings"] and t["outcome"] == "fits")
    shape = ",".join(f"{axis}={size}" for axis, size in staged["axes"].items())
    settings = [word for s in staged["settings"] for word in ("--set", s)]
    again = json.loads(plan(capsys, path, "--shape", shape, *settings, "--format", "json").out)
    assert again["step_time_s"] == pytest.approx(staged["step_time_s"])
    assert again["time"]["bubble_s"] > 0


def test_the_plan_file_of_a_pipeline_found_stands_alone(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Model, found: Sequence[LogicalMesh]) -> list[LogicalMesh]:
        return list(found)[:0]

    monkeypatch.setattr(staging, "unstaged", none)
    folder = tmp_path / "out"
    planned = plan(capsys, path, "--shape", "auto", "--format", "json", "-o", folder)
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)
    assert found["mesh"]["axes"]["pipe"] > 1
    read = plan(capsys, "explain", folder)
    assert read.code == 0, read.err
    stored = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    settings = found["mesh_shapes"][0]["settings"]
    assert stored["model"]["overrides"] == settings
