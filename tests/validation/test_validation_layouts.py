"""Rules of dimension and axis against annotations written by hand."""

from __future__ import annotations

import json
from importlib.resources import files

from planner import zoo
from planner.modelfile import load_model
from planner.validation.layouts import Layout, laid, lay
from planner.validation.vtrain import MEGATRON

SIZES = {"data": 4, "model": 2}
MODEL = """
training: {batch: 8, optimizer: adam, compute: f16, params: f16, master: true}
architecture:
  {kind: decoder, layers: 2, d_model: 64, heads: 4, sequence: 32, vocab: 256, biases: true}
"""


def test_tensor_parallelism_splits_heads_feed_forward_and_vocabulary() -> None:
    found = lay(load_model(MODEL, "gpt"), MEGATRON, SIZES)
    expected = {
        "embed": (("model",), ()), "layers.wq": ((), ("model",), ()),
        "layers.wo": (("model",), (), ()), "layers.w_in": ((), ("model",)),
        "layers.w_out": (("model",), ()), "layers.bo": ((),), "layers.b_in": (("model",),),
        "layers.q": (("data",), (), ("model",), ()), "layers.out": (("data",), (), ()),
        "layers.wq.master": ((), ("model",), ()),
        "layers.wq.master.m": ((), ("model",), ()),
    }  # fmt: skip
    assert {name: found.annotation[name] for name in expected} == expected
    assert {"layers.q", "layers.wq.master.v"} <= found.as_laid
    assert "layers.wq" not in found.as_laid  # weights are read by what their layout leads to


def test_a_sequence_that_is_split_is_gathered_before_products() -> None:
    rules = {**MEGATRON.activations, "S": ("model",)}
    layout = Layout(MEGATRON.parameters, rules, literal=True)
    found = lay(load_model(MODEL, "gpt"), layout, SIZES)
    assert found.annotation["layers.ln1.out"] == (("data",), ("model",), ())
    assert found.annotation["layers.q"] == (("data",), (), ("model",), ())
    assert "layers.ln1.out" not in found.as_laid


def test_an_axis_splits_one_dimension_and_only_evenly() -> None:
    graph = load_model(MODEL, "gpt").graph
    tensor = graph.tensors["layers.w_in"]
    rules = {"D": ("data",), "F": ("data", "model")}
    assert laid(tensor, rules, SIZES) == (("data",), ("model",))
    assert laid(tensor, rules, {"data": 7, "model": 2}) == ((), ("model",))


def test_two_dimensional_rules_are_the_published_annotation() -> None:
    """GSPMD's 2-D layout of LaMDA by rules against the annotation that its source publishes."""
    layout = Layout(
        {"N": ("y",), "F": ("y",), "V": ("y",), "D": ("x",)},
        {"B": ("x",), "N": ("y",), "F": ("y",), "V": ("y",), "D": ("y",)},
    )
    found = lay(load_model(zoo.text("lamda-137b"), "lamda-137b"), layout, {"x": 32, "y": 64})
    text = (files("planner.zoo") / "published" / "lamda-137b.json").read_text(encoding="utf-8")
    published = {k: tuple(map(tuple, axes)) for k, axes in json.loads(text).items()}
    weights = {"layers.wq", "layers.wo", "layers.w_in", "layers.w_gate", "layers.w_out"}
    activations = {"x", "layers.q", "layers.h", "layers.mid", "layers.out", "logits"}
    for name in weights | activations:
        assert found.annotation[name] == published[name], name
