"""The figures of docs/figures.md are what the commands there print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_support import plan

DOCS = Path(__file__).parents[2] / "docs"


def test_nested_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One axis is a pipeline in the stacks and splits the batch outside; pinned and found."""
    figure = DOCS / "figures" / "nested-4x4.yaml"
    pinned = json.loads(plan(capsys, figure, "--format", "json", "-o", tmp_path / "out").out)
    explained = plan(capsys, "explain", tmp_path / "out").out
    page = (DOCS / "figures.md").read_text(encoding="utf-8")
    shown = re.findall(r"```\n(collectives.*?)```", page, re.DOTALL)
    assert explained.endswith(shown[1])
    rows = {(line.split()[0], line.split()[1]) for line in shown[1].splitlines()}
    assert {("collective-permute", "x"), ("all-to-all", "y")} <= rows
    assert pinned["annotations"]["logits"] == [["x"], [], ["y"]]
    free = tmp_path / "free.yaml"
    free.write_text(figure.read_text(encoding="utf-8").partition("constraints:")[0], "utf-8")
    found = plan(capsys, free, "--format", "json")
    step_s = json.loads(found.out)["step_time_s"]
    assert 0.98 * pinned["step_time_s"] < step_s <= pinned["step_time_s"] * 1.001
    assert json.loads(found.out)["annotations"]["encoder.expert_w_in"] == [["y"], [], []]


def test_ring_attention(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, DOCS / "figures" / "ring-attention.yaml")
    assert report.code == 0
    assert "pattern: ring attention over context" in report.out


def test_feed_forward_on_two_by_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = DOCS / "figures" / "feed-forward-2x2.yaml"
    assert plan(capsys, figure, "-o", tmp_path / "out").code == 0
    explained = plan(capsys, "explain", tmp_path / "out")
    page = (DOCS / "figures.md").read_text(encoding="utf-8")
    shown = re.search(r"```\n(collectives.*?)```", page, re.DOTALL)
    assert shown is not None
    assert explained.out.endswith(shown[1])
    rows = {(line.split()[0], line.split()[-1]) for line in shown[1].splitlines()}
    forward = {("all-gather", "x"), ("all-gather", "w_in.cast"), ("all-gather", "w_out.cast"),
               ("reduce-scatter", "y")}  # fmt: skip
    assert forward <= rows
