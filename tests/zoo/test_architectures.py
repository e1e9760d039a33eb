"""Every architecture scaled down: derives under all remat policies, and counts its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from planner.architectures import ARCHITECTURES, build
from planner.graph.builder import GraphError
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.model import REMAT_POLICIES, Model, Training
from planner.values import reference

SMALL = {"d_model": 8, "d_ff": 12, "heads": 4}
TEXT = {**SMALL, "vocab": 11, "sequence": 6}
D, F, H, V, S = 8, 12, 2, 11, 6
LAYER = 4 * D * 4 * H + 2 * D * F + 2 * D  # four projections, two of the feed-forward, two norms

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "decoder": ("decoder", {**TEXT, "layers": 3}, 3 * LAYER + V * D + D),
    "decoder as in Llama": (
        "decoder",
        {**TEXT, "layers": 3, "kv_heads": 2, "gated": True, "activation": "silu", "norm": "rms",
         "tied_embeddings": False, "positions": "rotary"},
        3 * (LAYER - 2 * D * 2 * H + D * F) + 2 * V * D + D,
    ),
    "decoder as in GPT-3": (
        "decoder",
        {**TEXT, "layers": 3, "biases": True, "positions": "learned"},
        3 * (LAYER + 4 * D + F + D + 2 * D) + V * D + S * D + 2 * D,
    ),
    "decoder as in PaLM": (
        "decoder",
        {**TEXT, "layers": 3, "kv_heads": 1, "gated": True, "parallel_block": True},
        3 * (LAYER - 2 * D * 3 * H + D * F - D) + V * D + D,
    ),
    "encoder": ("encoder", {**TEXT, "layers": 2, "activation": "relu"}, 2 * LAYER + V * D + D),
    "encoder-decoder": (
        "encoder-decoder",
        {**TEXT, "encoder_layers": 2, "decoder_layers": 3, "target_sequence": 4, "norm": "rms"},
        5 * LAYER + 3 * (4 * D * 4 * H + D) + V * D + 2 * D,
    ),
    "encoder-decoder, two vocabularies": (
        "encoder-decoder",
        {**TEXT, "encoder_layers": 1, "decoder_layers": 1, "target_vocab": 7,
         "tied_embeddings": False, "activation": "squared_relu"},
        2 * LAYER + (4 * D * 4 * H + D) + V * D + 2 * 7 * D + 2 * D,
    ),
    "moe-decoder as in Mixtral": (
        "moe-decoder",
        {**TEXT, "layers": 2, "experts": 3, "gated": True, "expert_d_ff": 5},
        2 * (LAYER - 2 * D * F + 3 * (3 * D * 5) + 3 * D) + V * D + D,
    ),
    "moe-decoder as in GLaM": (
        "moe-decoder",
        {**TEXT, "layers": 6, "experts": 4, "moe_every": 3, "gated": True, "expert_gated": False,
         "group_size": 3},
        6 * LAYER + 4 * D * F + 2 * (3 * 2 * D * F + 4 * D) + V * D + D,
    ),
    "moe-decoder as in DeepSeek-V3": (
        "moe-decoder",
        {**TEXT, "layers": 3, "dense_first": 1, "experts": 4, "expert_d_ff": 5, "gated": True,
         "shared_experts": 2, "tied_embeddings": False, "norm": "rms",
         "q_rank": 6, "kv_rank": 3, "rope_dim": 2},
        3 * (
            D * 6 + 6 + 6 * 4 * (H + 2)            # queries: down, norm, up
            + D * 3 + 3 + 2 * 3 * 4 * H + D * 2    # keys and values, the keys' positions
            + 4 * H * D + 2 * D                    # output, norms
        )
        + 3 * D * F + 2 * (4 * 3 * D * 5 + 3 * D * 10 + 4 * D) + 2 * V * D + D,
    ),
    "decoder with latent keys and values only": (
        "decoder",
        {**TEXT, "layers": 1, "kv_rank": 3},
        LAYER - 2 * D * 4 * H + D * 3 + 3 + 2 * 3 * 4 * H + V * D + D,
    ),
    "moe-encoder-decoder as in GShard": (
        "moe-encoder-decoder",
        {**TEXT, "encoder_layers": 2, "decoder_layers": 2, "experts": 3, "top_k": 1,
         "moe_every": 2, "group_size": 12},
        4 * LAYER + 2 * (4 * D * 4 * H + D) + 2 * (2 * 2 * D * F + 3 * D) + V * D + 2 * D,
    ),
    "vit": (
        "vit",
        {**SMALL, "layers": 2, "image": 8, "patch": 4, "classes": 5, "qk_norm": True,
         "parallel_block": True},
        2 * (LAYER - D + 2 * H) + 16 * 3 * D + 4 * D + D + (D + 1) * 5,
    ),
    "conformer": (
        "conformer",
        {**SMALL, "layers": 2, "kernel": 3, "frames": 16, "features": 8, "vocab": 5},
        2 * (
            4 * D * D + 4 * D                     # attention and its biases
            + 2 * (2 * D * F + F + D)             # two feed-forward layers
            + 5 * 2 * D                           # norms
            + 3 * (D * D + D) + 3 * D + 2 * D     # convolution module
        ) + (9 * D + D) + (9 * D * D + D) + (2 * D * D + D) + 5 * D,
    ),
    "resnet": (
        "resnet",
        {"blocks": [1, 2], "width": 4, "image": 16, "classes": 5},
        (49 * 3 * 4 + 8)
        + (4 * 4 + 8 + 9 * 16 + 8 + 4 * 16 + 32 + 4 * 16 + 32)
        + (16 * 8 + 16 + 9 * 64 + 16 + 8 * 32 + 64 + 16 * 32 + 64)
        + (32 * 8 + 16 + 9 * 64 + 16 + 8 * 32 + 64)
        + 32 * 5 + 5,
    ),
    "unet": (
        "unet",
        {"image": [4, 8], "width": 4, "levels": 2, "classes": 3},
        (9 * 4 + 4) + (9 * 16 + 4) + (9 * 32 + 8) + (9 * 64 + 8)
        + (4 * 8 * 4 + 4) + (9 * 8 * 4 + 4) + (9 * 16 + 4) + 4 * 3 + 3,
    ),
    "unet in three dimensions": (
        "unet",
        {"image": [4, 4, 8], "width": 4, "levels": 2, "widen": "second", "batch_norm": True,
         "channels": 3},
        (27 * 3 * 2 + 6) + (27 * 8 + 12) + (27 * 16 + 12) + (27 * 32 + 24)
        + (8 * 64 + 8) + (27 * 12 * 4 + 12) + (27 * 16 + 12) + 4 * 2 + 2,
    ),
}  # fmt: skip


def graph_of(case: str, batch: int = 2) -> Graph:
    kind, settings, _ = CASES[case]
    return build(ARCHITECTURES[kind](**settings), batch, Training(batch))


def step_of(case: str, remat: str) -> Graph:
    return training_step(Model(case, graph_of(case), Training(2, "sgd", remat=remat), 1))


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, _, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_parameters_by_hand(case: str) -> None:
    assert graph_of(case).parameter_count == CASES[case][2]


def cancelled(parameter: str, graph: Graph) -> bool:
    """Whether no bias of this kind can matter: one that a softmax or batch norm takes out."""
    normed = parameter.replace("b_", "bn_", 1)
    return parameter.endswith("bk") or (normed != parameter and normed in graph.inputs)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_an_update_and_remat_changes_no_value(case: str) -> None:
    steps = {policy: step_of(case, policy) for policy in REMAT_POLICIES}
    plain = steps["none"]
    inputs = reference.random_inputs(plain)
    expected = reference.evaluate(plain, inputs)
    assert np.isfinite(expected[plain.outputs[0]])
    for new, old in plain.aliases.items():
        if not cancelled(old, plain):
            assert not np.allclose(expected[new], inputs[old], rtol=0, atol=1e-12), old
    assert set(plain.aliases.values()) == {p.name for p in plain.parameters()}
    for step in steps.values():
        found = reference.evaluate(step, inputs)
        for name in step.outputs:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_starts_near_that_of_guessing(case: str) -> None:
    """With all parameters zero every class is equally likely: loss = log(classes)."""
    graph = graph_of(case)
    inputs = reference.random_inputs(graph)
    zeros = {p.name: np.zeros(p.shape) for p in graph.parameters()}
    _, settings, _ = CASES[case]
    classes = settings.get("classes") or settings.get("target_vocab") or settings.get("vocab", 2)
    loss = reference.evaluate(graph, {**inputs, **zeros})[graph.outputs[0]]
    assert loss == pytest.approx(np.log(classes))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("decoder", {"layers": 1, "d_model": 100}, "does not divide into heads of 128"),
        ("decoder", {"layers": 1, "d_model": 100, "heads": 3}, "does not divide into 3 heads"),
        ("decoder", {"layers": 1, "d_model": 128, "heads": 8, "kv_heads": 3}, "kv_heads 3"),
        ("decoder", {"layers": 0, "d_model": 128}, "greater than 0"),
        ("decoder", {"layers": 1, "d_model": 128, "d_fff": 3}, "Extra inputs"),
        ("decoder", {"layers": "1", "d_model": 128}, "valid integer"),
        ("decoder", {"layers": 1, "d_model": 128, "kind": "encoder"}, "'decoder'"),
        ("encoder-decoder",
         {"encoder_layers": 1, "decoder_layers": 1, "d_model": 128, "parallel_block": True},
         "parallel_block"),
        ("moe-decoder", {"layers": 3, "d_model": 128, "experts": 4, "moe_every": 2},
         "does not divide layers 3"),
        ("moe-decoder", {"layers": 1, "d_model": 128, "experts": 2, "top_k": 3}, "top_k 3"),
        ("moe-encoder-decoder",
         {"encoder_layers": 2, "decoder_layers": 3, "d_model": 128, "experts": 4, "moe_every": 2},
         "does not divide decoder_layers 3"),
        ("vit", {"layers": 1, "d_model": 128, "image": 225}, "patches of 16"),
        ("conformer", {"layers": 1, "d_model": 128, "frames": 6}, "frames 6"),
        ("moe-decoder", {**TEXT, "layers": 2, "experts": 4, "dense_first": 2}, "leaves none"),
        ("decoder", {**TEXT, "layers": 1, "rope_dim": 2}, "give kv_rank"),
        ("decoder", {**TEXT, "layers": 1, "kv_rank": 2, "kv_heads": 1}, "has no kv_heads"),
        ("resnet", {"blocks": []}, "at least 1 item"),
        ("unet", {"image": [16]}, "at least 2 items"),
        ("unet", {"image": [24, 16]}, "divisible by 16, not 24"),
    ],
)  # fmt: skip
def test_inconsistent_numbers_are_errors(kind: str, settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ARCHITECTURES[kind](**settings)


def test_groups_that_do_not_divide_the_tokens_are_an_error() -> None:
    s = ARCHITECTURES["moe-decoder"](**TEXT, layers=1, experts=2, group_size=5)
    with pytest.raises(GraphError, match="groups of 5 do not divide 2 × 6 tokens"):
        build(s, 2, Training(2))


def test_defaults_follow_from_the_width() -> None:
    s = ARCHITECTURES["decoder"](layers=1, d_model=1024)
    parameters = {p.name: p.shape for p in build(s, 1, Training(1)).parameters()}
    assert parameters["layers.wq"] == (1, 1024, 8, 128)
    assert parameters["layers.w_in"] == (1, 1024, 4096)


def test_every_setting_is_described() -> None:
    for settings in ARCHITECTURES.values():
        for name, field in settings.model_fields.items():
            assert field.description or name == "kind", (settings, name)
