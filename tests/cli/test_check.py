"""`plan check`: verdicts, formats, stale exports, regressions."""

import json
from pathlib import Path

import pytest
from cli_support import TINY, plan

from planner import verify
from planner.export import planfile
from planner.request import Request
from planner.request import plan as plan_request
from planner.source import find
from planner.verify import BackendError, Compiled
from planner.verify.stages import stages_alone


def _step(planned):
    return planfile.load(planned).predicted["step_time_s"]


def test_yes_is_0_no_is_1(planned, capsys):
    assert plan(capsys, "check", TINY, "--plan", planned).code == 0
    ran = plan(capsys, "check", TINY, "--plan", planned, "--memory", "4MiB")
    assert ran.code == 1
    assert "FAIL" in ran.out


@pytest.mark.parametrize(("factor", "code"), [(1.01, 0), (0.99, 1)])
def test_step_time_and_utilization_are_limits(planned, capsys, factor, code):
    predicted = planfile.load(planned).predicted
    step = f"{predicted['step_time_s'] * factor}s"
    assert plan(capsys, "check", TINY, "--plan", planned, "--max-step-time", step).code == code
    mfu = f"{predicted['utilization']['mfu'] / factor * 100}%"
    assert plan(capsys, "check", TINY, "--plan", planned, "--min-utilization", mfu).code == code


def test_headroom_counts(planned, capsys):
    predicted = planfile.load(planned).predicted["memory"]
    limit = str(int(predicted["peak_bytes"] * 1.3))
    arguments = ["check", TINY, "--plan", planned, "--memory", limit]
    assert plan(capsys, *arguments, "--headroom", "20%").code == 0
    assert plan(capsys, *arguments, "--headroom", "40%").code == 1


def test_regressions(planned, capsys, tmp_path):
    """The baseline was faster by 5 %: beyond a tolerance of 2 %, within one of 10 %."""
    document = json.loads((planned / "plan.json").read_text(encoding="utf-8"))
    document["predicted"]["step_time_s"] *= 0.95
    baseline = tmp_path / "before.json"
    baseline.write_text(json.dumps(document), encoding="utf-8")
    arguments = ["check", TINY, "--plan", planned, "--baseline", baseline]
    ran = plan(capsys, *arguments)
    assert ran.code == 1
    assert "+5.3%" in ran.out
    assert plan(capsys, *arguments, "--tolerance", "10%").code == 0
    assert plan(capsys, *arguments[:-1], planned).code == 0


@pytest.mark.parametrize("option", ["--plan", "--annotations"])
def test_a_stale_export_is_called_out_with_the_command(planned, capsys, tmp_path, option):
    model = tmp_path / "model.yaml"
    text = Path(TINY).read_text(encoding="utf-8")
    file = planned / ("plan.json" if option == "--plan" else "annotations.json")
    model.write_text(f"# another comment\n{text}", encoding="utf-8")
    assert plan(capsys, "check", model, option, file).code == 0
    model.write_text(text.replace("d_ff: 1024", "d_ff: 2048"), encoding="utf-8")
    ran = plan(capsys, "check", model, option, file)
    assert ran.code == 1
    assert "stale" in ran.out
    assert f"plan {model} -o {planned}" in ran.out
    other = plan(capsys, "check", TINY, option, file, "--shape", "x=4,y=2")
    assert other.code == 1
    assert "x=2,y=4" in other.out


def test_json_and_github(planned, capsys):
    arguments = ["check", TINY, "--plan", planned, "--memory", "4MiB", "--format"]
    ran = plan(capsys, *arguments, "json")
    document = json.loads(ran.out)
    assert (ran.code, document["ok"]) == (1, False)
    finding = document["checks"][0]["findings"][0]
    assert (finding["rule"], finding["limit"]) == ("memory", 4 * 2**20)
    assert document["checks"][0]["result"]["memory"]["fits"] is False
    lines = plan(capsys, *arguments, "github").out.splitlines()
    assert lines[0].startswith(f"::error file={TINY},line=1,col=1,title=memory::does not fit")


def test_several_models(capsys):
    ran = plan(capsys, "check", TINY, TINY, "--format", "json")
    assert len(json.loads(ran.out)["checks"]) == 2
    assert plan(capsys, "check", TINY, TINY, "--plan", "x").code == 2


def test_solving_and_pricing_agree(planned, capsys):
    solved = json.loads(plan(capsys, "check", TINY, "--format", "json").out)
    assert solved["checks"][0]["result"]["step_time_s"] == _step(planned)


def _compiler(peak_bytes, status="compiled"):
    memory = {"argument_bytes": peak_bytes, "output_bytes": 0, "alias_bytes": 0, "temp_bytes": 0}
    needed = peak_bytes if status == "exhausted" else None
    return lambda result, python=None: Compiled("tpu", status, {}, memory, needed)


@pytest.mark.parametrize(
    ("peak", "status", "code"),
    [
        (2**20, "compiled", 0),
        (8 * 2**20, "compiled", 0),  # exactly the limit: a compiler needs no headroom
        (8 * 2**20 + 1, "compiled", 1),
        (9 * 2**20, "exhausted", 1),
        (None, "exhausted", 1),  # without a figure it still does not fit
    ],
)
def test_a_compiler_decides_whether_it_fits(planned, capsys, monkeypatch, peak, status, code):
    """The prediction says no to 8 MiB; with --compiled only the compiler is asked."""
    arguments = ["check", TINY, "--plan", planned, "--memory", "8MiB"]
    assert plan(capsys, *arguments).code == 1
    monkeypatch.setattr(verify, "compile_result", _compiler(peak, status))
    ran = plan(capsys, *arguments, "--compiled", "--format", "json")
    finding = json.loads(ran.out)["checks"][0]["findings"][0]
    assert (ran.code, finding["ok"]) == (code, code == 0)
    assert (finding["rule"], finding["value"]) == ("memory", peak)
    assert "by the tpu compiler" in finding["message"]


STAGED = """
mesh: {topology: "dgx-a100-80gb:1x8", shape: {pipe: 4, data: 2}}
training: {batch: 32, pipeline_microbatches: 4, optimizer: adamw}
pipeline: {axis: pipe, schedule: 1f1b}
architecture: {kind: decoder, layers: 8, d_model: 128, heads: 2, vocab: 512, sequence: 64}
"""


@pytest.mark.parametrize(("failing", "code"), [(None, 0), (1, 1)])
def test_every_kind_of_stage_has_to_fit(tmp_path, capsys, monkeypatch, failing, code):
    """The first holds most microbatches: it needs most of equal programs, with what is added."""
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED, encoding="utf-8")
    result = plan_request(Request(find(str(path)))).result
    added = [alone.held_bytes for alone in stages_alone(result)]
    assert len(added) > 1
    assert max(added) == added[0] > 0
    asked = []

    def compiled(*_):
        asked.append("exhausted" if len(asked) == failing else "compiled")
        return _compiler(2**20, asked[-1])(None)

    monkeypatch.setattr(verify, "compile_program", compiled)
    ran = plan(capsys, "check", path, "--compiled", "--format", "json")
    finding = json.loads(ran.out)["checks"][0]["findings"][0]
    assert (ran.code, len(asked)) == (code, len(added))
    assert finding["value"] == 2**20 + added[0]
    assert "of microbatches in flight" in finding["message"]


@pytest.mark.parametrize(("hint", "code"), [("pip install it", 2), ("", 3)])
def test_without_a_compiler_there_is_no_verdict(planned, capsys, monkeypatch, hint, code):
    def missing(result, python=None):
        raise BackendError("no compiler", hint)

    monkeypatch.setattr(verify, "compile_result", missing)
    ran = plan(capsys, "check", TINY, "--plan", planned, "--compiled")
    assert (ran.code, ran.out) == (code, "")
    assert "no compiler" in ran.err


def test_an_interpreter_is_of_use_only_with_a_compiler(capsys):
    assert plan(capsys, "check", TINY, "--python", "python3").code == 2
    ran = plan(capsys, "check", TINY, "--compiled", "--python", "/no/such/python")
    assert ran.code == 2
    assert "--python" in ran.err


@pytest.mark.compiler
def test_the_tpu_compiler_decides(planned, capsys):
    pytest.importorskip("libtpu")
    ran = plan(capsys, "check", TINY, "--plan", planned, "--compiled")
    assert ran.code == 0
    assert "fits" in ran.out
    assert "by the tpu compiler" in ran.out
    ran = plan(capsys, "check", TINY, "--plan", planned, "--compiled", "--memory", "64KiB")
    assert ran.code == 1
