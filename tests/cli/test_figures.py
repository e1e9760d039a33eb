"""The figures of docs/figures.md are what the commands there print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_support import plan

DOCS = Path(__file__).parents[2] / "docs"


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
