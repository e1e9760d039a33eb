"""Mixture of experts against loops over tokens: who gets a slot, values, gradients, FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from planner.architectures import ARCHITECTURES, build
from planner.architectures.experts import experts
from planner.architectures.settings import Experts
from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.graph.flops import count_flops
from planner.graph.optimizers import RATE
from planner.model import Model, Training
from planner.values import reference

B, S, D, F, E = 2, 6, 4, 5, 3


def settings(**given: Any) -> Experts:
    numbers = {
        "layers": 1, "d_model": D, "d_ff": F, "heads": 2, "vocab": 7, "sequence": S, "experts": E,
        **given,
    }  # fmt: skip
    found = ARCHITECTURES["moe-decoder"](**numbers)
    assert isinstance(found, Experts)
    return found


def layer_graph(s: Experts) -> Graph:
    """One layer of experts over random activations, all of which count differently."""
    b = Builder()
    x = b.param("x", (B, S, D), ("B", "S", "D"))
    y = experts(b, b.use(x), s)
    dims = ("B", "S", "D")
    weight = ex.add(ex.c(1), ex.add(ex.index("S"), ex.mul(ex.c(0.3), ex.index("D"))))
    loss = b.map("loss", [(y, dims)], (), ex.mul(("tanh", ex.x(0)), weight), dtype="f32")
    return b.graph([loss])


def assignments(likely: np.ndarray, k: int, slots: int) -> list[tuple[int, int]]:
    """(token, expert) pairs of a group that found a slot: first choices before second ones."""
    taken = [0] * likely.shape[1]
    found = []
    for choice in range(k):
        for token, row in enumerate(likely):
            expert = sorted(range(len(row)), key=lambda e: (-row[e], e))[choice]
            if taken[expert] < slots:
                found.append((token, expert))
            taken[expert] += 1
    return found


@pytest.fixture(scope="module")
def jax() -> Iterator[Any]:
    module = pytest.importorskip("jax")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", before)


def loss_by_token(jax: Any, p: dict[str, Any], s: Experts, routes: list[Any]) -> Any:
    """The same loss, token by token; `routes` are decided beforehand, as they have no slope."""
    jnp = jax.numpy
    groups = p["x"].reshape(len(routes), -1, D)
    rows = []
    for x, route in zip(groups, routes, strict=True):
        likely = jax.nn.softmax(x @ p["router"])
        out = [jnp.zeros(D) for _ in x]
        for token, expert in route:
            top = jnp.sort(likely[token])[::-1][: s.top_k]
            gate = likely[token, expert] / (top.sum() if s.top_k > 1 else 1.0)
            h = jax.nn.gelu(x[token] @ p["expert_w_gate"][expert], approximate=True)
            h = h * (x[token] @ p["expert_w_in"][expert])
            out[token] += gate * (h @ p["expert_w_out"][expert])
        rows += out
    y = jnp.stack(rows).reshape(B, S, D)
    weight = 1 + np.arange(S)[:, None] + 0.3 * np.arange(D)
    return (jnp.tanh(y) * weight).sum()


@pytest.mark.parametrize(
    ("given", "slots", "dropped"),
    [
        ({"capacity_factor": 3.0}, 12, False),
        ({"capacity_factor": 0.5}, 2, True),
        ({"top_k": 1, "capacity_factor": 0.5}, 1, True),
        ({"capacity_factor": 0.5, "group_size": 3}, 1, True),
        ({"capacity_factor": 0.5, "group_size": 12}, 4, True),
        ({"top_k": 3, "capacity_factor": 1.0}, 6, False),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients(
    jax: Any, given: dict[str, Any], slots: int, dropped: bool, seed: int
) -> None:
    s = settings(gated=True, **given)
    size = s.group_size or S
    assert s.capacity(size) == slots
    graph = layer_graph(s)
    step = training_step(Model("experts", graph, Training(1, "sgd", remat="none"), 1))
    inputs = reference.random_inputs(step, seed)
    scores = (inputs["x"] @ inputs["router"]).reshape(-1, size, E)
    routes = [assignments(group, s.top_k, slots) for group in scores]
    assert (sum(map(len, routes)) < B * S * s.top_k) == dropped
    value, gradient = jax.value_and_grad(lambda p: loss_by_token(jax, p, s, routes))(inputs)
    found = reference.evaluate(step, inputs)
    assert found[step.outputs[0]] == pytest.approx(float(value), rel=1e-9)
    for new, old in step.aliases.items():
        ours = (inputs[old] - found[new]) / RATE
        np.testing.assert_allclose(ours, gradient[old], rtol=1e-6, atol=1e-9, err_msg=old)


def test_flops_count_k_experts_per_token_and_slack_as_hardware_work() -> None:
    s = settings(capacity_factor=2.0, sequence=12)
    step = training_step(
        Model("m", build(s, B, Training(B)), Training(B, "sgd", remat="none"), B * 12)
    )
    tokens, slots = B * 12, s.capacity(12)
    assert slots == 16
    attention = 4 * D * D + 2 * 12 * D
    per_token = attention + D * E + 2 * (2 * D * F) + D * 7
    assert count_flops(step).model == 6 * tokens * per_token
    idle = B * E * slots - 2 * tokens  # slots without a token
    moved = 2 * tokens * E * slots * D  # dispatch and combine, in multiply-adds
    extra = 6 * (idle * 2 * D * F + moved)
    assert count_flops(step).hardware == pytest.approx(6 * tokens * per_token + extra)
