"""`remat: auto` is never slower than a fixed policy that fits, and can be read again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from planner.export import bundle, files, planfile
from planner.model import FIXED_POLICIES
from planner.planning import Options
from planner.request import Request, plan, read_plan
from planner.search import candidates
from planner.search.candidates import FITS, SAME
from planner.search.pool import in_turn
from planner.source import Source

TEXT = """\
mesh: {topology: "tpu-v3:2x1", shape: {x: 4}}
training: {batch: 64, optimizer: adafactor, remat: REMAT}
architecture:
  {kind: decoder, layers: 32, d_model: 512, d_ff: 2048, heads: 8, vocab: 1024, sequence: 512}
"""
TIGHT = Options(memory_bytes=4_000 * 2**20)


def request(remat: str) -> Request:
    return Request(Source("deep.yaml", "deep.yaml", TEXT.replace("REMAT", remat)), options=TIGHT)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "processes", lambda _: nullcontext(in_turn))


def test_auto_beats_every_fixed_policy_where_memory_is_tight(tmp_path: Path) -> None:
    found = plan(request("auto"))
    assert found.result.fits
    fixed = [plan(request(policy)).result for policy in FIXED_POLICIES]
    best = min(r.timing.step_time_s for r in fixed if r.fits)
    step_s = found.result.timing.step_time_s
    assert step_s < best * (1 - SAME)
    assert not all(r.fits for r in fixed)
    assert isinstance(found.result.model.training.remat, tuple)
    assert found.savings[0].outcome == FITS

    files.write_files(tmp_path / "out", bundle.files(found), False)
    again = read_plan(planfile.load(tmp_path / "out"))
    assert again.result.timing == found.result.timing
    assert again.result.memory == found.result.memory
