"""The JSON document: keys that other programs rely on, what they mean, and determinism."""

import json
import re

import pytest
from cli_support import DATA, TINY, plan

KEYS = {
    "": "schema_version model parameters mesh solver step_time_s tokens_per_s utilization "
    "flops_per_step memory time collectives annotations",
    "mesh": "name chip devices axes",
    "solver": "status objective_s bound_s gap seconds",
    "utilization": "mfu hfu",
    "memory": "limit_bytes peak_bytes fits parameters_bytes gradients_bytes optimizer_bytes "
    "activations_bytes temporaries_bytes collective_buffers_bytes",
    "time": "compute_s exposed_communication_s bubble_s",
}
PARTS = [k for k in KEYS["memory"].split() if k not in ("limit_bytes", "peak_bytes", "fits")]


@pytest.fixture(scope="module")
def document():
    import contextlib
    import io

    import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.run([TINY, "--format", "json", "--quiet"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("where", KEYS)
def test_all_keys_are_there(document, where):
    inner = document[where] if where else document
    assert set(KEYS[where].split()) <= set(inner)


def test_collectives_have_all_keys(document):
    assert document["collectives"]
    wanted = {"kind", "axes", "bytes", "seconds", "count", "tensor"}
    assert all(set(c) == wanted for c in document["collectives"])


def test_parts_sum_up(document):
    memory, time = document["memory"], document["time"]
    assert sum(memory[k] for k in PARTS) == memory["peak_bytes"]
    assert sum(time.values()) == pytest.approx(document["step_time_s"])


def test_utilization_follows_its_definition(document):
    # 61.5 TFLOP/s: one core of a TPU v3 chip of 123.
    capacity = document["step_time_s"] * 8 * 61.5e12
    assert document["utilization"]["mfu"] == pytest.approx(document["flops_per_step"] / capacity)
    assert document["tokens_per_s"] == pytest.approx(16 * 128 / document["step_time_s"])


def test_parameters_are_counted_by_hand(document):
    # embed, 4 × (q, k, v, o, in, out, two norms), final norm
    by_hand = 1024 * 256 + 4 * (4 * 256 * 256 + 2 * 256 * 1024 + 2 * 256) + 256
    assert document["parameters"] == by_hand


def test_annotations_name_axes_once_per_tensor(document):
    for dims in document["annotations"].values():
        axes = [a for d in dims for a in d]
        assert len(set(axes)) == len(axes)
        assert set(axes) <= {"x", "y"}
    assert len(document["annotations"]["layers.w_in"]) == 2  # no stacked dimension
    assert not any("[" in name for name in document["annotations"])


def _without_seconds(text):
    return re.sub(r'"seconds": [0-9.e+-]+', "", text)


def test_same_input_same_bytes(capsys):
    first, again = (plan(capsys, TINY, "--format", "json", "--seed", 3).out for _ in range(2))
    assert _without_seconds(first) == _without_seconds(again)


def test_same_input_same_report_and_files(capsys, tmp_path):
    reports = [plan(capsys, TINY, "-o", tmp_path / name).out for name in "ab"]
    assert reports[0] == reports[1]
    for file in ("plan.json", "annotations.py", "annotations.json"):
        texts = [(tmp_path / name / file).read_bytes() for name in "ab"]
        assert texts[0] == texts[1]
        assert str(DATA.parent).encode() not in texts[0]  # no paths of this machine


def test_what_does_not_fit_has_all_keys_too(capsys):
    ran = plan(capsys, TINY, "--shape", "x=8", "--format", "json", "--memory", "4MiB")
    document = json.loads(ran.out)
    assert ran.code == 1
    assert set(KEYS[""].split()) <= set(document)
    assert document["memory"]["fits"] is False
    assert document["memory"]["limit_bytes"] == 4 * 2**20
    assert document["explanation"]
    assert document["solver"]["status"] == "infeasible"
    assert document["solver"]["objective_s"] is None


def test_no_shape_means_the_best_candidate_and_says_so(capsys):
    ran = plan(capsys, TINY, "--mesh", "tpu-v3:2x1", "--format", "json")
    document = json.loads(ran.out)
    assert any("automatic" in note for note in document["notes"])
    assert len(document["mesh_shapes"]) > 1


def test_shape_auto_ranks_all_shapes(capsys):
    place = ("--mesh", "tpu-v3:2x1", "--shape", "auto")
    document = json.loads(plan(capsys, TINY, *place, "--format", "json").out)
    ranking = document["mesh_shapes"]
    assert {len(entry["axes"]) for entry in ranking} == {1, 2}
    assert ranking[0]["axes"] == document["mesh"]["axes"]
    assert ranking[0]["step_time_s"] == document["step_time_s"]
    assert ranking[0]["front"]
    report = plan(capsys, TINY, *place).out
    assert "front: no other is both faster and smaller" in report


def test_overrides_change_the_model(capsys):
    ran = plan(capsys, TINY, "--set", "training.batch=32", "--format", "json")
    twice = json.loads(ran.out)
    once = json.loads(plan(capsys, TINY, "--format", "json").out)
    assert twice["flops_per_step"] == 2 * once["flops_per_step"]


def _shape_of(report):
    """The report without its figures: words, layout and shardings."""
    return re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "#", report))


def test_report_reads_as_before(capsys):
    """To renew after a wanted change: write the two outputs below by hand into golden/."""
    expected = (DATA.parent / "golden" / "tiny.txt").read_text(encoding="utf-8")
    report = plan(capsys, TINY).out.replace(TINY, "tiny.yaml")
    assert _shape_of(report) == _shape_of(expected)
