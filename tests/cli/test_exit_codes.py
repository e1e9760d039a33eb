"""Exit codes, and where output goes: data to stdout, everything else to stderr."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import TINY, plan

import cli

ROOT = Path(cli.__file__).parent


def test_a_plan_that_fits_is_0_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = plan(capsys, TINY)
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.startswith("4 chips, 8 devices, mesh x=2 × y=4\n")
    assert f"plan {TINY} -o tiny" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_the_command_it_prints_works(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = plan(capsys, TINY).out.rstrip().splitlines()[-1].split()
    assert command[0] == "plan"
    assert plan(capsys, *command[1:]).code == 0
    written = sorted(p.name for p in (tmp_path / "tiny").iterdir())
    assert written == ["annotations.json", "annotations.py", "plan.json"]


def test_what_cannot_fit_is_1_after_the_verdict(capsys):
    ran = plan(capsys, TINY, "--shape", "x=8", "--memory", "4MiB")
    assert ran.code == 1
    assert ran.out.startswith("4 chips, 8 devices")
    assert "DOES NOT FIT" in ran.out
    assert "largest tensors" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "no command, file or built-in model"),
        (["modles"], "command 'models'"),
        (["lamda-137"], "model 'lamda-137b'"),
        (["pkg.mod:function"], "not supported yet"),
        (["missing.yaml"], "no such file"),
        ([TINY, "--shape", "x=3"], "tpu-v3:2x2 has 8"),
        ([TINY, "--shape", "x=two"], "cannot read 'x=two'"),
        ([TINY, "--mesh", "tpu-v9:2x2"], "no mesh called"),
        ([TINY, "--memory", "5s"], "expected bytes"),
        ([TINY, "--headroom", "lots"], "such as 5%"),
        ([TINY, "--time-limit", "soon"], "expected a time"),
        ([TINY, "--format", "xml"], "xml"),
        ([TINY, "--bogus"], "--bogus"),
        ([TINY, "extra"], "extra"),
        ([TINY, "--set", "training.batch=-1"], "--set"),
        ([TINY, "--set", "nothing"], "--set"),
        (["simulate", TINY], "--plan or --annotations"),
        (["check", TINY, "--plan", "nowhere.json"], "cannot read nowhere.json"),
        (["export", "nowhere.json", "--format", "jax"], "cannot read nowhere.json"),
        (["solve", "nowhere.json"], "nowhere.json"),
        (["models", "lamda"], "lamda-137b"),
        (["meshes", "tpu-v33"], "tpu-v3"),
        (["init", "decodr"], "decoder"),
    ],
)
def test_bad_input_is_2_with_a_hint_and_nothing_on_stdout(capsys, arguments, said):
    ran = plan(capsys, *arguments)
    assert ran.code == 2, ran
    assert said in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_usage_leaves_out_the_name_of_the_default_command(capsys):
    said = plan(capsys, TINY, "--bogus").err
    assert said.startswith("Usage: plan [OPTIONS] MODEL\nTry 'plan --help'")
    assert "Usage: plan check [OPTIONS]" in plan(capsys, "check", "--bogus").err


def test_no_mesh_anywhere_gives_three_suggestions(capsys, tmp_path):
    model = tmp_path / "m.yaml"
    text = Path(TINY).read_text(encoding="utf-8")
    model.write_text("\n".join(x for x in text.splitlines() if not x.startswith("mesh")))
    ran = plan(capsys, model)
    assert ran.code == 2
    assert ran.err.count("--mesh ") >= 3


def test_a_broken_model_file_says_where(capsys, tmp_path):
    model = tmp_path / "m.yaml"
    model.write_text(Path(TINY).read_text(encoding="utf-8").replace("batch: 16", "batchh: 16"))
    ran = plan(capsys, model)
    assert ran.code == 2
    assert "m.yaml:4:12:" in ran.err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x: \x00", b"a" * 50_000_000])
def test_what_is_no_text_is_2(capsys, tmp_path, content):
    model = tmp_path / "m.yaml"
    model.write_bytes(content)
    ran = plan(capsys, model)
    assert ran.code == 2
    assert "m.yaml" in ran.err


def test_what_is_not_foreseen_is_3_without_a_traceback(capsys, monkeypatch):
    import planner.request

    def fail(*_):
        raise RuntimeError("surprise")

    monkeypatch.setattr(planner.request, "plan", fail)
    monkeypatch.delenv("SHARDPLAN_DEBUG", raising=False)
    ran = plan(capsys, TINY)
    assert (ran.code, ran.out) == (3, "")
    assert "RuntimeError: surprise" in ran.err
    assert "Traceback" not in ran.err
    monkeypatch.setenv("SHARDPLAN_DEBUG", "1")
    assert "Traceback" in plan(capsys, TINY).err


def test_a_time_limit_without_a_plan_is_3(capsys, monkeypatch):
    import planner.request
    from planner.planning import Unsolved

    def give_up(*_):
        raise Unsolved("no plan found")

    monkeypatch.setattr(planner.request, "plan_model", give_up)
    ran = plan(capsys, TINY)
    assert ran.code == 3
    assert "--time-limit" in ran.err


def test_interrupted_is_130(capsys, monkeypatch):
    import planner.request

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(planner.request, "plan", interrupt)
    assert plan(capsys, TINY).code == 130


def test_a_closed_pipe_ends_quietly():
    shell = f"{sys.executable} cli.py meshes | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "0"
    assert ran.stderr == ""


def test_a_model_on_standard_input():
    ran = subprocess.run(
        [sys.executable, "cli.py", "-", "--quiet"], cwd=ROOT, capture_output=True, text=True,
        input=Path(TINY).read_text(encoding="utf-8"), env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert ran.stdout.startswith("4 chips, 8 devices")
    assert "plan - -o tiny" in ran.stdout


def test_command_words_win_over_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meshes").write_text(Path(TINY).read_text(encoding="utf-8"))
    assert "tpu-v3" in plan(capsys, "meshes").out
    assert plan(capsys, "./meshes").out.startswith("4 chips")


def test_help_begins_with_the_default_command(capsys):
    text = plan(capsys, "--help").out
    assert text.index("--shape") < text.index("Commands:")
    assert "  plan " not in text[text.index("Commands:") :]


def test_colour_only_where_asked_for(capsys, monkeypatch):
    assert "\x1b[" not in plan(capsys, TINY).out
    assert "\x1b[" in plan(capsys, TINY, "--color", "always").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in plan(capsys, TINY, "--color", "auto").out


def test_the_version_is_known_without_an_installation(capsys):
    ran = plan(capsys, "--version")
    assert ran.code == 0
    assert ran.out.startswith("plan, version ")
    assert ran.err == ""
