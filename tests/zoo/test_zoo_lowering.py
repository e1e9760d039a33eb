"""Every architecture lowered under random plans computes what its graph computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from random_plans import PlanDrawer, expected, run_plan

from planner.architectures import ARCHITECTURES, build
from planner.graph.derive import training_step
from planner.model import Model, Training
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

BLOCK = {"d_model": 8, "d_ff": 16, "heads": 4}
TEXT = {**BLOCK, "vocab": 16, "sequence": 8}
CASES: dict[str, dict[str, Any]] = {
    "decoder": {**TEXT, "layers": 2, "kv_heads": 2, "gated": True, "tied_embeddings": False},
    "encoder": {**TEXT, "layers": 2, "kv_heads": 1, "biases": True, "positions": "learned"},
    "encoder-decoder": {**TEXT, "encoder_layers": 2, "decoder_layers": 2},
    "moe-decoder": {**TEXT, "layers": 2, "experts": 4, "moe_every": 2, "group_size": 4},
    "moe-encoder-decoder": {
        **TEXT, "encoder_layers": 1, "decoder_layers": 1, "experts": 8, "capacity_factor": 0.5,
    },
    "vit": {**BLOCK, "layers": 2, "image": 8, "patch": 4, "classes": 8, "parallel_block": True},
    "conformer": {**BLOCK, "layers": 2, "kernel": 3, "frames": 16, "features": 8, "vocab": 8},
    "resnet": {"blocks": [2, 1], "width": 4, "image": 16, "classes": 8},
    "unet": {"image": [4, 4], "width": 4, "levels": 2},
}  # fmt: skip
AXES = (("x", 2), ("y", 2), ("z", 2))
DRAWS = 3
SLOW_DRAWS = 20


@cache
def prepared(kind: str) -> tuple[Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    how = Training(8, "sgd", remat="full")
    model = Model(kind, build(ARCHITECTURES[kind](**CASES[kind]), 8, how), how, 8)
    graph = training_step(model)
    inputs = reference.random_inputs(graph)
    return build_flow(graph, {}), inputs, expected(graph, inputs)


def test_every_kind_is_lowered() -> None:
    assert set(CASES) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", CASES)
def test_random_plans_compute_what_the_graph_computes(kind: str) -> None:
    check_plans(kind, range(DRAWS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_random_plans_compute_what_the_graph_computes(kind: str) -> None:
    check_plans(kind, range(DRAWS, SLOW_DRAWS))


def check_plans(kind: str, seeds: range) -> None:
    flow, inputs, wanted = prepared(kind)
    drawer = PlanDrawer(flow, AXES)
    for seed in seeds:
        found = run_plan(flow, drawer.draw(seed), inputs)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-7, atol=1e-9, err_msg=name)
