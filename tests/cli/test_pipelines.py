"""Pipelined models through the commands: planned, stored, priced again, traced, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import plan

MODEL = """
mesh: {topology: "dgx-a100-80gb:1x4", shape: {pipe: 2, data: 2}}
training: {batch: 64, pipeline_microbatches: 8, optimizer: adamw}
pipeline: {axis: pipe, schedule: SCHEDULE}
architecture: {kind: decoder, layers: 8, d_model: 512, heads: 8, vocab: 1024, sequence: 256}
"""


@pytest.fixture(params=["1f1b", "interleaved", "gpipe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.replace("SCHEDULE", request.param), encoding="utf-8")
    return path


def test_a_stored_plan_is_priced_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    planned = plan(capsys, model, "--format", "json", "-o", folder)
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)
    assert found["time"]["bubble_s"] > 0
    assert sum(found["time"].values()) == pytest.approx(found["step_time_s"])
    memory = found["memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "temporaries",
             "collective_buffers")  # fmt: skip
    assert sum(memory[f"{p}_bytes"] for p in parts) == memory["peak_bytes"]
    assert "collective-permute" in {c["kind"] for c in found["collectives"]}
    again = plan(capsys, "simulate", model, "--plan", folder, "--format", "json")
    assert again.code == 0, again.err
    repriced = json.loads(again.out)
    for key in ("step_time_s", "memory", "time", "collectives", "annotations"):
        assert repriced[key] == found[key]


@pytest.mark.parametrize(("asked", "each"), [((), False), (("reduce_once=false",), True)])
def test_stages_reduce_gradients_once_unless_asked_for_every_part(
    asked: tuple[str, ...], each: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.replace("SCHEDULE", "1f1b"), encoding="utf-8")
    options = [part for a in asked for part in ("--set", f"training.{a}")]
    found = json.loads(plan(capsys, path, *options, "--format", "json").out)
    reduced = [c["count"] for c in found["collectives"] if c["kind"] == "reduce-scatter"]
    assert reduced
    assert all((count % 8 == 0) is each for count in reduced)


def test_annotations_come_back(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan's own annotations are priced as given."""
    folder, trace = tmp_path / "out", tmp_path / "trace.json"
    planned = json.loads(plan(capsys, model, "--format", "json", "-o", folder).out)
    annotations = folder / "annotations.json"
    given = plan(
        capsys, "simulate", model, "--annotations", annotations, "--trace", trace,
        "--format", "json",
    )  # fmt: skip
    assert given.code == 0, given.err
    assert json.loads(given.out)["annotations"] == planned["annotations"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"pipe 00", "pipe 01"}


@pytest.mark.parametrize(("schedule", "share"), [("gpipe", 1 / 9), ("circular", 1 / 17)])
def test_a_pipeline_in_one_program(
    schedule: str, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The axis splits stages in the layers, and is free outside of them; p - 1 of m v + p - 1
    ticks are bubbles."""
    path, folder = tmp_path / "model.yaml", tmp_path / "out"
    path.write_text(MODEL.replace("SCHEDULE", f"{schedule}, inside: false"), encoding="utf-8")
    planned = plan(capsys, path, "--format", "json", "-o", folder)
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)
    assert share / 2 < found["time"]["bubble_s"] / found["step_time_s"] <= share
    assert ["pipe"] in [c["axes"] for c in found["collectives"] if "permute" in c["kind"]]
    annotations = found["annotations"]
    assert "pipe" not in str([annotations[t] for t in annotations if t.startswith("layers.w")])
    assert "pipe" in str(annotations["logits"])
    again = json.loads(plan(capsys, "simulate", path, "--plan", folder, "--format", "json").out)
    for key in ("step_time_s", "memory", "time", "collectives", "annotations"):
        assert again[key] == found[key]
    given = plan(
        capsys, "simulate", path, "--annotations", folder / "annotations.json", "--format", "json"
    )
    assert given.code == 0, given.err
    assert json.loads(given.out)["annotations"] == annotations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "data=4"], "no axis 'pipe'"),
        (["--set", "pipeline.schedule=interleaved", "--set", "architecture.layers=1"],
         "cannot be cut into 4 stages"),
        (["--set", "pipeline.schedule=gpipe", "--set", "pipeline.inside=false",
          "--set", "architecture.layers=3"], "the model has layers 3"),
        (["--set", "pipeline.schedule=circular", "--set", "pipeline.inside=false",
          "--set", "architecture.layers=6"], "divide into 2 × 2 stages; the model has layers 6"),
        (["--set", "pipeline.schedule=circular", "--set", "pipeline.inside=false",
          "--set", "training.pipeline_microbatches=1"],
         "raise training.pipeline_microbatches to 2 or more"),
        (["--set", "pipeline.schedule=circular", "--set", "pipeline.inside=false",
          "--set", "architecture={kind: conformer, layers: 4, d_model: 64, heads: 4}"],
         "(conv) cannot be stacked for a pipeline"),
        (["--set", "pipeline.schedule=interleaved", "--set", "training.pipeline_microbatches=1"],
         "groups of 2 microbatches"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(
    options: list[str], words: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.replace("SCHEDULE", "1f1b"), encoding="utf-8")
    failed = plan(capsys, path, *options)
    assert failed.code == 2
    assert words in failed.err
    assert "model.yaml:4: " in failed.err or "axis" in words
    assert "Traceback" not in failed.err
