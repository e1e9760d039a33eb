"""`inference:` in model files and by --set: what replaces what, and what it means."""

from __future__ import annotations

import pytest
from test_good_files import mismatch

from meshes.yamltree import parse
from planner import zoo
from planner.model import Inference, Training
from planner.modelfile import ModelErrors, load_model, schema
from planner.modelfile.scalars import plain_data

TEXT = """\
dims: {B: 8, T: 512}
inference: {phase: decode, batch: B, context: T}
architecture: {kind: decoder, layers: 2, d_model: 256, vocab: 128}
constraints: {layers.k_cache: [x, null, null, null]}
"""
ASKED = ("inference.phase=prefill", "inference.batch=4", "inference.context=64")


def codes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ModelErrors) as error:
        load_model(text, "m.yaml", overrides)
    return [d.code for d in error.value.diagnostics]


def test_a_file_with_inference() -> None:
    model = load_model(TEXT, "m.yaml")
    assert model.workload == Inference("decode", 8, 512)
    assert model.tokens == 8
    assert {t.dtype for t in model.graph.parameters()} == {"bf16"}
    assert model.graph.tensors["layers.k_cache"].shape == (2, 8, 512, 2, 128)
    assert dict(model.graph.aliases) == {
        "layers.k_cache.new": "layers.k_cache", "layers.v_cache.new": "layers.v_cache",
    }  # fmt: skip
    with pytest.raises(ValueError, match="planned for inference"):
        _ = model.training


def test_prefill_counts_all_tokens_and_hands_out_the_cache() -> None:
    model = load_model(TEXT, "m.yaml", ["inference.phase=prefill", "inference.compute=f32"])
    assert model.tokens == 8 * 512
    logits, *caches = (model.graph.tensors[name] for name in model.graph.outputs)
    assert logits.shape == (8, 1, 128)
    assert [(c.name, c.shape, c.dtype) for c in caches] == [
        (f"layers.{n}_cache", (2, 8, 512, 2, 128), "f32") for n in "kv"
    ]
    assert not model.graph.aliases


@pytest.mark.parametrize("name", ["llama3-70b", "deepseek-v3", "bert-480b", "mixtral-8x7b"])
def test_set_replaces_the_training_of_a_built_in_model(name: str) -> None:
    """What the file assumes of its training is no longer assumed."""
    model = load_model(zoo.text(name), name, ASKED)
    assert model.workload == Inference("prefill", 4, 64)
    assert not any(a.key.startswith("training") for a in model.assumed)
    trained = load_model(zoo.text(name), name)
    assert isinstance(trained.workload, Training)
    assert trained.digest != model.digest != load_model(
        zoo.text(name), name, [*ASKED, "inference.batch=8"]
    ).digest  # fmt: skip


def test_set_replaces_inference_by_training() -> None:
    model = load_model(TEXT.replace("layers.k_cache", "layers.wk").replace("[x, null, ", "[x, "),
                       "m.yaml", ["training.batch=16"])  # fmt: skip
    assert model.workload == Training(16)


def test_a_pipeline_goes_with_the_training() -> None:
    text = TEXT.replace("inference: {phase: decode, batch: B, context: T}",
                        "training: {batch: B, pipeline_microbatches: 2}\npipeline: {axis: x}")
    text = text.replace("constraints: {layers.k_cache: [x, null, null, null]}", "")
    assert load_model(text, "m.yaml").pipeline is not None
    assert load_model(text, "m.yaml", ASKED).pipeline is None
    both = codes(text, *ASKED, "pipeline.axis=y")
    assert both == ["conflicting-keys", "conflicting-keys"]


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("inference.context=null", "wrong-type"), ("inference.batch=1.5", "wrong-type"),
        ("inference.cache=bf16", "unknown-key"), ("training.batch=8", "unknown-tensor"),
        ("constraints.layers.v_cache=[x, null]", "wrong-rank"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be(override: str, code: str) -> None:
    assert code in codes(TEXT, override)


def test_the_schema_knows_inference() -> None:
    found = schema()
    data = plain_data(parse(TEXT, "m.yaml").root)
    assert mismatch(found, data, found) == ""
    data["inference"]["phase"] = "decoding"
    assert mismatch(found, data, found)
