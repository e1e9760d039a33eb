"""`plan sweep`: rows, what is made of them, resuming, exit codes, and a Dask cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_support import TINY, plan

from planner import sweeping
from planner.errors import InputError
from planner.export import sweepfile
from planner.request import Request
from planner.source import find
from planner.sweeping import FITS, TOO_LARGE, Row, Run, price_list

MACHINES = ("--mesh", "tpu-v4:1x1x1", "--mesh", "tpu-v4:2x1x1")
ROW = Row("tpu-v4:2x1x1", "tpu-v4", 2, FITS, {"x": 2}, 2.0, 1000.0, 0.5, 2**30)


def test_a_sweep_agrees_with_planning_each_machine(capsys, tmp_path):
    state = tmp_path / "sweep.json"
    words = ("sweep", TINY, *MACHINES, "--tokens", "1e9", "--price", "3.6", "--resume", state)
    ran = plan(capsys, *words, "--format", "json")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert found["smallest"] == "tpu-v4:1x1x1"
    assert [row["devices"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        alone = json.loads(plan(capsys, TINY, "--mesh", row["mesh"], "--format", "json").out)
        assert row["step_time_s"] == alone["step_time_s"]
        assert row["run_s"] == pytest.approx(1e9 / alone["tokens_per_s"])
        assert row["cost"] == pytest.approx(row["run_s"] * row["devices"] * 3.6 / 3600)


def test_resumes_without_planning_again(capsys, tmp_path, monkeypatch):
    state = tmp_path / "sweep.json"
    first = plan(capsys, "sweep", TINY, *MACHINES[:2], "--resume", state)

    planned = []
    plan_row = sweeping.plan_row
    monkeypatch.setattr(sweeping, "plan_row", lambda r: planned.append(r.mesh) or plan_row(r))
    more = plan(capsys, "sweep", TINY, *MACHINES, "--resume", state)
    assert (first.code, more.code, planned) == (0, 0, ["tpu-v4:2x1x1"])
    again = plan(capsys, "sweep", TINY, *MACHINES, "--resume", state)
    assert again.out == more.out
    assert len(planned) == 1
    plan(capsys, "sweep", TINY, *MACHINES[:2], "--resume", state, "--set", "training.batch=32")
    assert planned[1:] == ["tpu-v4:1x1x1"]


def test_nothing_fits_is_a_no(capsys):
    ran = plan(capsys, "sweep", TINY, *MACHINES, "--memory", "2MiB")
    assert ran.code == 1
    assert ran.out.count("does not fit") == 2
    assert "none of 2 machines fits" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "tpu-v9:2"], "tpu-v9"),
        (["--mesh", "tpu-v4:2x1x1", "--deadline", "3d"], "--deadline needs --tokens"),
        (["--mesh", "tpu-v4:2x1x1", "--price", "v4=cheap"], "no price"),
        (["--mesh", "tpu-v4:2x1x1", "--tokens", "many"], "300e9"),
        ([], "--mesh"),
    ],
)
def test_bad_input(capsys, words, message):
    ran = plan(capsys, "sweep", TINY, *words)
    assert ran.code == 2
    assert message in ran.err


def test_a_file_of_another_kind_is_not_overwritten(capsys, tmp_path):
    other = tmp_path / "notes.json"
    other.write_text('{"mine": 1}')
    ran = plan(capsys, "sweep", TINY, *MACHINES, "--resume", other)
    assert ran.code == 2
    assert other.read_text() == '{"mine": 1}'


def test_deadline_and_prices():
    run = Run(1e6, 999.0, price_list(["1", "tpu-v4=3.6"]))
    assert run.seconds(ROW) == 1000.0
    assert run.cost(ROW) == pytest.approx(2.0)
    assert not run.passes(ROW)
    fast = replace(ROW, devices=4, tokens_per_s=2000.0)
    assert run.smallest([ROW, fast]) is fast
    assert Run(1e6).smallest([fast, ROW]) is ROW
    assert run.cost(replace(ROW, outcome=TOO_LARGE)) is None


@pytest.mark.parametrize("text", ["x=", "-1", "tpu-v4=nan", "inf"])
def test_prices_are_numbers(text):
    with pytest.raises(InputError):
        price_list([text])


def test_rows_are_read_as_written(tmp_path):
    rows = {"a": ROW, "b": Row("dgx-h100:1x8", "h100", 8, TOO_LARGE)}
    path = tmp_path / "sweep.json"
    sweepfile.save(path, rows)
    assert sweepfile.load(path) == rows


def test_dask_is_asked_for_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    ran = plan(capsys, "sweep", TINY, *MACHINES, "--scheduler", "tcp://127.0.0.1:1")
    assert ran.code == 2
    assert "shardplan[dask]" in ran.err


@pytest.mark.slow
def test_a_dask_cluster_finds_the_same() -> None:
    distributed = pytest.importorskip("distributed")
    request = Request(find(str(Path(TINY))))
    names = MACHINES[1::2]
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        found = sweeping.sweep(request, names, scheduler=cluster.scheduler_address)
    assert found == [sweeping.plan_row(replace(request, mesh=name)) for name in names]
