"""Experts under every routing, latent and ring attention: any plan computes what the graph
computes; ring attention computes what attention does."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from random_plans import PlanDrawer, expected, run_plan

from planner.architectures import ARCHITECTURES, build
from planner.graph.derive import training_step
from planner.graph.flops import count_flops
from planner.model import Model, Training
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

AXES = (("x", 2), ("y", 4))
DRAWS = 20
BATCH = 4
SIZES: dict[str, Any] = {
    "d_model": 8, "d_ff": 8, "heads": 4, "head_dim": 2, "vocab": 8, "sequence": 4, "layers": 1,
}  # fmt: skip
MOE: dict[str, Any] = {**SIZES, "experts": 8, "group_size": 8, "expert_d_ff": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "top 1": ("moe-decoder", {**MOE, "top_k": 1}),
    "top 2": ("moe-decoder", {**MOE, "top_k": 2, "capacity_factor": 1.0}),
    "top 4": ("moe-decoder", {**MOE, "top_k": 4}),
    "expert choice": ("moe-decoder", {**MOE, "routing": "expert_choice"}),
    "dropless": ("moe-decoder", {**MOE, "routing": "dropless", "load_imbalance": 4.0}),
    "shared expert": ("moe-decoder", {**MOE, "shared_experts": 1, "layers": 2, "dense_first": 1}),
    "latent attention": (
        "decoder", {**SIZES, "kv_rank": 4, "q_rank": 4, "rope_dim": 2, "norm": "rms"}
    ),
    "ring attention": ("decoder", {**SIZES, "sequence": 8, "attention_blocks": 4}),
    "ring attention, grouped": (
        "decoder", {**SIZES, "sequence": 16, "attention_blocks": 8, "kv_heads": 2, "layers": 2}
    ),
}  # fmt: skip


@cache
def prepared(name: str) -> tuple[Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    kind, numbers = CASES[name]
    settings = ARCHITECTURES[kind](**numbers)
    training = Training(BATCH, "sgd", remat="full")
    step = training_step(Model(name, build(settings, BATCH, training), training, 1))
    inputs = reference.random_inputs(step)
    return build_flow(step, {}), inputs, expected(step, inputs)


@pytest.mark.parametrize("heads", [None, 2, 1])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_ring_attention_is_attention(kind: str, heads: int | None) -> None:
    """Loss and updates in one turn and in four, and with all scores at once."""
    training = Training(BATCH, "sgd", remat="full")
    steps = []
    for blocks in (None, 1, 4):
        numbers = {**SIZES, "sequence": 8, "kv_heads": heads, "attention_blocks": blocks}
        settings = ARCHITECTURES[kind](**numbers)
        steps.append(training_step(Model("m", build(settings, BATCH, training), training, 1)))
    inputs = reference.random_inputs(steps[0])
    wanted = expected(steps[0], inputs)
    for step in steps[1:]:
        for tensor, array in expected(step, inputs).items():
            np.testing.assert_allclose(array, wanted[tensor], rtol=1e-9, atol=1e-12)
        assert count_flops(step).model == count_flops(steps[0]).model


@pytest.mark.parametrize("name", CASES)
def test_any_plan_computes_what_the_graph_computes(name: str) -> None:
    flow, inputs, wanted = prepared(name)
    drawer = PlanDrawer(flow, AXES)
    for seed in range(DRAWS):
        found = run_plan(flow, drawer.draw(seed), inputs)
        assert found.keys() == wanted.keys()
        for tensor, array in wanted.items():
            np.testing.assert_allclose(found[tensor], array, rtol=1e-7, atol=1e-9, err_msg=tensor)
