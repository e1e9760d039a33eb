"""Suites as files: what ships can be read, wrong files say where, rows mean what they say."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from planner.errors import InputError
from planner.pins import PinError
from planner.validation import suitefile, vtrain
from planner.validation.predict import load, predict, simulate_run

HEADER = ",".join((*vtrain.COLUMNS, vtrain.TIME))
ROW = "8,32,4,1024,16,24,1024,2,2,2,219.732754"

SUITE = """
layouts:
  data: {activations: {B: x}, literal: true}
runs:
  - id: one
    source: nobody
    model:
      mesh: {topology: "dgx-a100-80gb:1x2", shape: {x: 2}}
      training: {batch: 4, compute: bf16}
      architecture: {kind: decoder, layers: 1, d_model: 64, heads: 4, sequence: 16, vocab: 64}
    layout: data
    measured: {step_time_s: 1e-3}
"""


@pytest.mark.parametrize("name", suitefile.names())
def test_what_ships_is_a_model_with_a_mesh_and_a_source(name: str) -> None:
    suite = suitefile.load(name)
    for run in suite.runs:
        model = load(run)
        assert model.mesh, run.id
        assert len(run.source) > 20, run.id  # not only a short name
        measured = run.measured
        assert measured.out_of_memory or measured.step_time_s or measured.mfu or measured.hfu


def test_a_suite_of_ones_own() -> None:
    suite = suitefile.from_text(SUITE, "mine", "mine.yaml")
    result = simulate_run(suite.runs[0])
    assert result.timing.step_time_s > 0
    assert result.specs["layers.q"].axes == ("x",)


def test_states_of_stacked_layers_lie_as_the_rules_say() -> None:
    mixed = "compute: f16, params: f16, master: true, optimizer: adam"
    text = SUITE.replace("compute: bf16", mixed)
    text = text.replace("layers: 1", "layers: 3").replace("{B: x}", "{B: x}, states: {D: x}")
    suite = suitefile.from_text(text, "mine", "mine.yaml")
    specs = simulate_run(suite.runs[0]).specs
    assert specs["layers.w_in.master.m"].dims == ((), ("x",), ())  # layers, D, F


def test_wrong_annotations_are_reported_from_other_processes_too() -> None:
    sent = pickle.loads(pickle.dumps(PinError("w", "2 dimensions annotated, it has 1")))
    assert (sent.tensor, str(sent)) == ("w", "'w': 2 dimensions annotated, it has 1")


def test_a_run_is_simulated_with_the_software_it_had() -> None:
    """Op by op the host is a bound; without overlap or with a slow network a step takes longer."""
    text = SUITE.replace("1x2", "2x1").replace("d_model: 64", "d_model: 1024")

    def seconds(extra: str) -> float:
        suite = suitefile.from_text(text.replace("    measured", f"{extra}    measured"), "m", "m")
        return simulate_run(suite.runs[0]).timing.step_time_s

    plain = seconds("")
    assert seconds("    eager: true\n") > plain
    assert seconds("    overlap: []\n") > plain
    assert seconds("    network_bytes_per_s: 1e9\n") > plain


def test_gradients_that_are_summed_at_the_end_lie_whole_until_then() -> None:
    text = SUITE.replace("{B: x}, literal: true", "{B: x}, states: {D: x, F: x}")
    text = text.replace("d_model: 64", "d_model: 512, biases: false")
    combined = text.replace("    measured", "    combined_sums: true\n    measured")
    (least, most), stored = (
        [predict(suitefile.from_text(t, "m", "m").runs[0]).peak_bytes for t in (text, combined)],
        simulate_run(suitefile.from_text(text, "m", "m").runs[0]).memory.parts["parameters"],
    )
    # The other half of every gradient; they are as large as the parameters.
    assert most - least == pytest.approx(stored / 2, rel=0.01)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layout: data", "layout: dat", "no layout 'dat'"),
        ("layout: data", "layout: published", "only models of the zoo"),
        ("step_time_s: 1e-3", "step_time_s: -1", r"runs.0.measured.step_time_s"),
        ("source: nobody", "sauce: nobody", r"runs.0.s"),
        ("layout: data", "layout: data\n    overlap: [gathers]", r"runs.0.overlap.0"),
        ("id: one", "id: [", "mine.yaml:"),
    ],
)
def test_a_wrong_suite_says_where(old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        suitefile.from_text(SUITE.replace(old, new), "mine", "mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: 1", "layers: 0", "one: .*layers"),
        ("{B: x}", "{B: y}", "no axis 'y'"),
        (', shape: {x: 2}', "", "needs a mesh with a shape"),
    ],
)
def test_a_run_that_cannot_be_simulated_says_why(old: str, new: str, message: str) -> None:
    suite = suitefile.from_text(SUITE.replace(old, new), "mine", "mine.yaml")
    with pytest.raises(InputError, match=message):
        simulate_run(suite.runs[0])


def test_unknown_suites_have_hints() -> None:
    with pytest.raises(InputError, match="did you mean 'megatron'"):
        suitefile.load("megatrn")


def test_a_row_of_vtrain() -> None:
    suite = vtrain.from_text(f"{HEADER}\r\n{ROW}\r\n", "runs.csv")
    assert suite.name == vtrain.SINGLE
    (run,) = suite.runs
    assert run.id == ROW
    assert run.measured.step_time_s == pytest.approx(0.219732754)
    model = load(run)
    assert model.shape == {"pipe": 2, "data": 2, "model": 2}
    assert model.training.pipeline_microbatches == 4
    assert model.training.batch == 32
    vocab = model.graph.tensors["embed"].shape[0]
    assert vocab % (128 * 2) == 0
    assert 0 <= vocab - 50257 < 128 * 2


def test_the_file_of_several_nodes_is_known_by_its_first_column() -> None:
    text = f"{vtrain.PARAMETERS},{HEADER}\n3.6,64,512,8,3072,32,30,2048,1,64,1,3566.5\n"
    suite = vtrain.from_text(text, "runs.csv")
    assert suite.name == vtrain.MULTI
    assert load(suite.runs[0]).mesh == "dgx-a100-80gb:8x8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", r"x.csv:1: no column '# GPUs'"),
        (f"{HEADER}\n", "no rows"),
        (f"{HEADER}\n{ROW}\n8,32\n", r"x.csv:3: every column needs a number"),
        (f"{HEADER}\n{ROW.replace('8,32', '8,31')}\n", r"x.csv:2: the degrees of parallelism"),
        (f"{HEADER}\n{ROW.replace('219', '-219')}\n", r"x.csv:2: numbers must be positive"),
    ],
)
def test_a_wrong_file_of_vtrain_says_where(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vtrain.from_text(text, "x.csv")


def test_a_csv_is_read_by_its_ending(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"{HEADER}\n{ROW}\n")
    assert suitefile.load(str(path)).name == vtrain.SINGLE
