"""Inference: any plan computes what the step computes, and decoding is what a model trained
without a cache would say next."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from random_plans import PlanDrawer, UnevenDrawer, expected, padded_ops, run_plan
from scaled_zoo import TINY

from planner import zoo
from planner.graph.core import Graph
from planner.graph.derive import step_of
from planner.model import Model
from planner.modelfile import load_model
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

AXES = (("x", 2), ("y", 4))
DRAWS = 20
BATCH, CONTEXT = 4, 8
NO_DROPS = "architecture.load_imbalance=8", "architecture.group_size=4"
MODELS: dict[str, tuple[str, ...]] = {
    "llama3-70b": (),  # grouped queries
    "deepseek-v3": NO_DROPS,  # latent attention, experts, two stacks of layers
    "glam-1.2t": (
        "architecture.routing=dropless", "architecture.load_imbalance=8",
        "architecture.capacity_factor=8",
    ),  # experts in every second layer
    "gpt3-175b": (),  # as many heads of keys, learned positions, biases
    "lamda-137b": ("architecture.kv_heads=1",),  # one head of keys
}  # fmt: skip


def tiny(name: str, phase: str, context: int = CONTEXT, batch: int = BATCH) -> Model:
    settings = {k: v for k, v in TINY[name].items() if not k.startswith("training.")}
    asked = {"phase": phase, "batch": batch, "context": context}
    return load_model(
        zoo.text(name), f"{name}.yaml",
        [
            *(f"architecture.{k}={v}" for k, v in settings.items()), *MODELS.get(name, ()),
            *(f"inference.{k}={v}" for k, v in asked.items()),
        ],
    )  # fmt: skip


@cache
def prepared(name: str, phase: str) -> tuple[Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    step = step_of(tiny(name, phase))
    inputs = reference.random_inputs(step)
    return build_flow(step, {}), inputs, expected(step, inputs)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_any_plan_computes_what_the_step_computes(name: str, phase: str) -> None:
    flow, inputs, wanted = prepared(name, phase)
    drawer = PlanDrawer(flow, AXES)
    for seed in range(DRAWS):
        found = run_plan(flow, drawer.draw(seed), inputs)
        assert found.keys() == wanted.keys()
        for tensor, array in wanted.items():
            np.testing.assert_allclose(found[tensor], array, rtol=1e-7, atol=1e-9, err_msg=tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding cast to positions
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name: str, phase: str) -> None:
    step = step_of(tiny(name, phase, context=6, batch=12))
    inputs = reference.random_inputs(step)
    wanted, flow = expected(step, inputs), build_flow(step, {}, uneven=True)
    drawer = UnevenDrawer(flow, AXES)
    for seed in range(3):
        plan = drawer.draw(seed)
        assert padded_ops(flow, plan)
        found = run_plan(flow, plan, inputs)
        for tensor, array in wanted.items():
            np.testing.assert_allclose(found[tensor], array, rtol=1e-7, atol=1e-9, err_msg=tensor)


def prefilled(
    name: str, tokens: np.ndarray, parameters: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits after the last of `tokens`, and the caches, without any cache to start from."""
    batch, count = tokens.shape
    step = tiny(name, "prefill", count, batch).graph
    values = reference.evaluate(step, {**parameters, "tokens": tokens})
    logits, *caches = step.outputs
    return values[logits], {c: values[c] for c in caches}


def parameters_of(graph: Graph) -> dict[str, np.ndarray]:
    inputs = reference.random_inputs(graph)
    return {t.name: inputs[t.name] for t in graph.parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_the_last_position_of_the_whole_pass(name: str) -> None:
    """Sequences of different lengths, and a cache that holds garbage beyond them."""
    step = tiny(name, "decode").graph
    parameters = parameters_of(step)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 16, (BATCH, CONTEXT))
    filled = np.array([CONTEXT - 1, 1, 3, 0])
    old = {t.name: rng.normal(size=t.shape) for t in caches_of(step)}
    whole = [prefilled(name, tokens[[i], : n + 1], parameters) for i, n in enumerate(filled)]
    for i, n in enumerate(filled):
        for cache_name, after in whole[i][1].items():
            old[cache_name][:, i, :n] = after[:, 0, :n]
    now = tokens[np.arange(BATCH), filled][:, None]
    values = reference.evaluate(step, {**parameters, **old, "tokens": now, "filled": filled})
    assert len(step.aliases) == len(old) > 0
    for i, n in enumerate(filled):
        logits, after = whole[i]
        np.testing.assert_allclose(values[step.outputs[0]][i], logits[0], rtol=1e-9)
        for new, cache_name in step.aliases.items():
            row = values[new][:, i]
            np.testing.assert_allclose(row[:, n], after[cache_name][:, 0, n], rtol=1e-9)
            np.testing.assert_array_equal(  # nothing else has changed
                np.delete(row, n, axis=1), np.delete(old[cache_name][:, i], n, axis=1)
            )


def caches_of(graph: Graph) -> list:
    return [graph.tensors[n] for n in graph.inputs if graph.tensors[n].role == "cache"]


def test_the_last_position_is_that_of_training() -> None:
    """Without a cache the prefill's logits are those that training compares with its targets."""
    prefill = tiny("llama3-8b", "prefill").graph
    trained = load_model(
        zoo.text("llama3-8b"), "m.yaml",
        [
            *(f"architecture.{k}={v}" for k, v in TINY["llama3-8b"].items() if "." not in k),
            f"architecture.sequence={CONTEXT}", f"training.batch={BATCH}",
            "training.accumulation_steps=1",
        ],
    ).graph  # fmt: skip
    inputs = reference.random_inputs(trained)
    values = reference.evaluate(trained, inputs)
    asked = {n: inputs[n] for n in prefill.inputs}
    found = reference.evaluate(prefill, asked)[prefill.outputs[0]]
    np.testing.assert_allclose(found[:, 0], values["logits"][:, -1], rtol=1e-9)
