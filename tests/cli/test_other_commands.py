"""Listings, starters, explain, diff."""

import json

import pytest
from cli_support import TINY, plan

from planner import starters, zoo
from planner.modelfile import load_model


@pytest.mark.parametrize("kind", starters.kinds())
def test_every_starter_loads(capsys, kind):
    ran = plan(capsys, "init", kind)
    if ran.code == 2:  # a kind that no built-in model has yet
        assert "no built-in model" in ran.err
        return
    model = load_model(ran.out, "starter.yaml")
    assert model.graph.parameter_count > 0
    assert model.mesh


def test_models_are_listed_and_printed_to_copy(capsys):
    listed = plan(capsys, "models").out
    assert [line.split()[0] for line in listed.splitlines()] == list(zoo.names())
    assert plan(capsys, "models", "lamda-137b").out == zoo.text("lamda-137b")


def test_machines(capsys):
    assert "tpu-v3 " in plan(capsys, "meshes").out
    assert "hbm_bytes" in plan(capsys, "meshes", "tpu-v3").out
    assert plan(capsys, "meshes", "tpu-v3:4x4").out.startswith("tpu-v3:4x4: 16 chips, 32 devices")


def test_schema_is_json(capsys):
    assert "properties" in json.loads(plan(capsys, "schema").out)


def test_explain(planned, capsys):
    assert "costliest ops" in plan(capsys, "explain", planned).out
    ran = plan(capsys, "explain", planned, "layers.w_in")
    assert "layers.w_in: parameter" in ran.out
    ran = plan(capsys, "explain", planned, "layers.w_inn")
    assert ran.code == 2
    assert "layers.w_in" in ran.err


def test_diff(planned, capsys, tmp_path):
    assert "all tensors lie the same" in plan(capsys, "diff", planned, planned).out
    assert plan(capsys, TINY, "--shape", "x=8", "-o", tmp_path / "b").code == 0
    ran = plan(capsys, "diff", planned, tmp_path / "b")
    assert ran.code == 0
    assert "mesh x=8" in ran.out
    assert "step time" in ran.out
