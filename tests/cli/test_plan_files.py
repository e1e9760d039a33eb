"""Plan files and annotations: round trips, atomic writing, staleness, exports."""

import json
from pathlib import Path

import pytest
from cli_support import TINY, plan

from planner.errors import InputError
from planner.export import files, planfile
from planner.request import read_plan


def test_a_plan_file_round_trips(planned):
    text = (planned / "plan.json").read_text(encoding="utf-8")
    assert planfile.dump(planfile.load(planned)) == text


def test_a_plan_file_rebuilds_the_whole_result(planned):
    stored = planfile.load(planned / "plan.json")
    again = read_plan(stored).result
    assert again.plan == stored.plan
    assert again.timing.step_time_s == stored.predicted["step_time_s"]
    assert again.memory.peak_bytes == stored.predicted["memory"]["peak_bytes"]


def test_files_can_be_read_elsewhere(planned, tmp_path, capsys, monkeypatch):
    """On a machine without the model file."""
    (tmp_path / "plan.json").write_bytes((planned / "plan.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    ran = plan(capsys, "export", "plan.json", "--format", "json")
    assert ran.code == 0
    assert ran.out == (planned / "annotations.json").read_text(encoding="utf-8")


def test_a_mesh_file_travels_inside_the_plan(on_cpus):
    result = read_plan(planfile.load(on_cpus)).result
    assert result.mesh.topology.name == "eight-cpus"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("choices"), "choices"),
        (lambda d: d.update(format="other"), "no plan file"),
        (lambda d: d.update(schema_version=9), "another version"),
        (lambda d: d["proof"].update(gap="much"), "proof.gap"),
        (lambda d: d["choices"].popitem(), "does not belong"),
        (lambda d: d["homes"].popitem(), "does not belong"),
        (lambda d: d["homes"]["tokens"]["dims"].pop(), "does not belong"),
        (lambda d: d["model"].update(text="training: {}"), "architecture"),
    ],
)
def test_a_mangled_plan_file_is_2(planned, tmp_path, capsys, change, said):
    document = json.loads((planned / "plan.json").read_text(encoding="utf-8"))
    change(document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    ran = plan(capsys, "export", path, "--format", "jax")
    assert ran.code == 2, ran
    assert said in ran.err


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "[" * 100_000])
def test_what_is_no_json_is_2(tmp_path, capsys, content):
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    assert plan(capsys, "export", path, "--format", "jax").code == 2


@pytest.mark.parametrize("form", ["jax", "jax-program", "json", "flax", "maxtext", "shardy"])
def test_every_format_is_written_and_replaced(planned, tmp_path, capsys, form):
    target = tmp_path / "out"
    for _ in range(2):  # the second time replaces our own file
        assert plan(capsys, "export", planned, "--format", form, "-o", target).code == 0
    assert target.read_text(encoding="utf-8") == plan(
        capsys, "export", planned, "--format", form
    ).out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_unknown_format_is_2(planned, capsys):
    ran = plan(capsys, "export", planned, "--format", "jaxx")
    assert (ran.code, ran.out) == (2, "")
    assert "jax" in ran.err


def test_python_exports_compile(planned, capsys):
    for form in ("jax", "jax-program", "flax"):
        compile(plan(capsys, "export", planned, "--format", form).out, form, "exec")


def test_files_of_others_stay_unless_forced(tmp_path, capsys):
    (tmp_path / "annotations.py").write_text("mine")
    ran = plan(capsys, TINY, "-o", tmp_path)
    assert ran.code == 2
    assert "--force" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["annotations.py"]
    assert (tmp_path / "annotations.py").read_text() == "mine"
    assert plan(capsys, TINY, "-o", tmp_path, "--force").code == 0
    assert (tmp_path / "annotations.py").read_text() != "mine"


def _listing(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failure_half_way_leaves_the_folder_as_it_was(tmp_path, monkeypatch, failing):
    before = {"a": "written by shardplan 1", "b": "written by shardplan 1"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    real, calls = files.os.replace, []

    def replace(source, target):
        if str(source).endswith(".tmp"):
            calls.append(source)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(InputError, match="No space left"):
        files.write_files(tmp_path, {"a": "new", "b": "new", "c": "new"})
    assert _listing(tmp_path) == before


def test_writing_leaves_nothing_but_the_files(tmp_path):
    texts = {"a": "written by shardplan 2", "b": "written by shardplan 2"}
    files.write_files(tmp_path / "deep" / "er", texts)
    files.write_files(tmp_path / "deep" / "er", texts)
    assert _listing(tmp_path / "deep" / "er") == texts


def test_a_folder_that_cannot_be_made_is_2(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    ran = plan(capsys, TINY, "-o", tmp_path / "file" / "out")
    assert ran.code == 2
    assert "cannot write" in ran.err


# ---- simulate -----------------------------------------------------------------------------------


def test_simulate_prices_the_plan_it_is_given(planned, capsys):
    ran = plan(capsys, "simulate", TINY, "--plan", planned, "--format", "json")
    stored = planfile.load(planned)
    assert ran.code == 0
    assert json.loads(ran.out)["step_time_s"] == stored.predicted["step_time_s"]


def test_simulate_completes_and_keeps_annotations(tmp_path, capsys):
    pins = {"layers.w_in": [None, "y"], "layers.w_out": [["y"], []]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(pins))
    ran = plan(capsys, "simulate", TINY, "--annotations", path, "--format", "json")
    annotations = json.loads(ran.out)["annotations"]
    assert annotations["layers.w_in"] == [[], ["y"]]
    assert annotations["layers.w_out"] == [["y"], []]


def test_own_annotations_price_like_the_plan(planned, capsys):
    ran = plan(
        capsys, "simulate", TINY, "--annotations", planned / "annotations.json", "--format", "json"
    )
    assert ran.code == 0
    stored = planfile.load(planned).predicted["step_time_s"]
    # Annotated activations take their cotangents along, which the plan may lay otherwise.
    assert json.loads(ran.out)["step_time_s"] == pytest.approx(stored, rel=0.1)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"nope": [[]]}, "nope"),
        ({"layers.w_in": [["z"], []]}, "'z'"),
        ({"layers.w_in": [["x"]]}, "layers.w_in"),
        ({"layers.w_in": [["x"], ["x"]]}, "layers.w_in"),
        ({"layers.w_in": [[1], []]}, "axis names"),
        ({"layers.w_in": "x"}, "one entry per dimension"),
        ([], "expected an object"),
    ],
)
def test_wrong_annotations_are_2(tmp_path, capsys, pins, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(pins))
    ran = plan(capsys, "simulate", TINY, "--annotations", path)
    assert ran.code == 2, ran
    assert said in ran.err


def test_a_file_says_whether_a_plan_or_a_program_lies_so(planned, tmp_path, capsys):
    document = json.loads((planned / "annotations.json").read_text(encoding="utf-8"))
    assert document["of"] == "plan"
    few = json.loads(plan(capsys, "export", planned, "--format", "json", "--minimal").out)
    assert few["of"] == "program"
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({**document, "of": "plam"}), encoding="utf-8")
    ran = plan(capsys, "simulate", TINY, "--annotations", path)
    assert ran.code == 2
    assert "plan or program" in ran.err


def test_a_trace_covers_the_step(planned, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert plan(capsys, "simulate", TINY, "--plan", planned, "--trace", trace).code == 0
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    end_s = max(e["ts"] + e["dur"] for e in events) / 1e6
    assert end_s == pytest.approx(planfile.load(planned).predicted["step_time_s"], rel=1e-6)


def test_minimal_annotations_are_some_of_all(planned, capsys):
    every = json.loads((planned / "annotations.json").read_text(encoding="utf-8"))
    ran = plan(capsys, "export", planned, "--format", "json", "--minimal")
    assert ran.code == 0
    few = json.loads(ran.out)
    assert few["made_for"] == every["made_for"]
    # Names only: they may be of a plan that is about as fast and leaves less to be settled.
    assert few["annotations"].keys() < every["annotations"].keys()
    assert f"{len(few['annotations'])} of {len(every['annotations'])} annotations" in ran.err
    program = plan(capsys, "export", planned, "--format", "jax-program", "--minimal").out
    compile(program, "program.py", "exec")
    activations = program.split("ACTIVATIONS = {", 1)[1].split("}", 1)[0]
    assert all(line.split('"')[1] in few["annotations"] for line in activations.splitlines()[1:-1])


@pytest.mark.parametrize("form", ["jax", "flax", "maxtext", "shardy"])
def test_minimal_is_not_for_every_format(planned, capsys, form):
    ran = plan(capsys, "export", planned, "--format", form, "--minimal")
    assert (ran.code, ran.out) == (2, "")
    assert "jax-program" in ran.err
