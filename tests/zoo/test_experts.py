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
from planner.graph.flops import FlopCount, count_flops
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
        out = [shared_expert(jax, p, row) if s.shared_experts else jnp.zeros(D) for row in x]
        for token, expert in route:
            top = jnp.sort(likely[token])[::-1][: s.top_k]
            chosen_by_token = s.top_k > 1 and s.routing != "expert_choice"
            gate = likely[token, expert] / (top.sum() if chosen_by_token else 1.0)
            h = jax.nn.gelu(x[token] @ p["expert_w_gate"][expert], approximate=True)
            h = h * (x[token] @ p["expert_w_in"][expert])
            out[token] += gate * (h @ p["expert_w_out"][expert])
        rows += out
    y = jnp.stack(rows).reshape(B, S, D)
    weight = 1 + np.arange(S)[:, None] + 0.3 * np.arange(D)
    return (jnp.tanh(y) * weight).sum()


def shared_expert(jax: Any, p: dict[str, Any], x: Any) -> Any:
    h = jax.nn.gelu(x @ p["shared_w_gate"], approximate=True) * (x @ p["shared_w_in"])
    return h @ p["shared_w_out"]


@pytest.mark.parametrize(
    ("given", "slots", "dropped"),
    [
        ({"capacity_factor": 3.0}, 6, False),  # no expert gets a token twice
        ({"capacity_factor": 0.5}, 2, True),
        ({"top_k": 1, "capacity_factor": 0.5}, 1, True),
        ({"capacity_factor": 0.5, "group_size": 3}, 1, True),
        ({"capacity_factor": 0.5, "group_size": 12}, 4, True),
        ({"top_k": 3, "capacity_factor": 1.0}, 6, False),
        ({"routing": "dropless", "load_imbalance": 1.5}, 6, False),
        ({"capacity_factor": 0.5, "shared_experts": 2}, 2, True),
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


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_experts_choose_the_tokens_that_score_best(jax: Any, factor: float) -> None:
    s = settings(gated=True, routing="expert_choice", capacity_factor=factor)
    slots = s.capacity(S)
    step = training_step(Model("m", layer_graph(s), Training(1, "sgd", remat="none"), 1))
    inputs = reference.random_inputs(step, 0)
    scores = np.asarray(jax.nn.softmax((inputs["x"] @ inputs["router"]).reshape(-1, S, E)))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :slots]
    routes = [[(int(t), e) for e in range(E) for t in group[:, e]] for group in best]
    value, gradient = jax.value_and_grad(lambda p: loss_by_token(jax, p, s, routes))(inputs)
    found = reference.evaluate(step, inputs)
    assert found[step.outputs[0]] == pytest.approx(float(value), rel=1e-9)
    for new, old in step.aliases.items():
        ours = (inputs[old] - found[new]) / RATE
        np.testing.assert_allclose(ours, gradient[old], rtol=1e-6, atol=1e-9, err_msg=old)


def test_without_dropping_neither_empty_slots_nor_gathers_are_hardware_work() -> None:
    def flops(**given: Any) -> FlopCount:
        s = settings(sequence=12, **given)
        graph = build(s, B, Training(B))
        return count_flops(training_step(Model("m", graph, Training(B, remat="full"), B * 12)))

    even, uneven = (flops(routing="dropless", load_imbalance=i) for i in (1.0, 1.5))
    assert uneven == even
    assert even.model == flops(capacity_factor=1.0).model
    outside = 6 * B * 12 * D * 7  # the output projection is not recomputed
    assert even.hardware == pytest.approx((even.model - outside) * 4 / 3 + outside)


def test_the_busiest_expert_holds_up_the_others() -> None:
    def slots(imbalance: float) -> int:
        return settings(routing="dropless", load_imbalance=imbalance).capacity(60)

    assert [slots(i) for i in (1.0, 1.25, 1.5, 9.0)] == [40, 50, 60, 60]


def test_flops_count_k_experts_per_token_and_slack_as_hardware_work() -> None:
    s = settings(capacity_factor=2.0, sequence=12)
    step = training_step(
        Model("m", build(s, B, Training(B)), Training(B, "sgd", remat="none"), B * 12)
    )
    tokens, slots = B * 12, s.capacity(12)
    assert slots == 12
    attention = 4 * D * D + 2 * 12 * D
    per_token = attention + D * E + 2 * (2 * D * F) + D * 7
    assert count_flops(step).model == 6 * tokens * per_token
    idle = B * E * slots - 2 * tokens  # slots without a token
    moved = 2 * tokens * E * slots * D  # dispatch and combine, in multiply-adds
    extra = 6 * (idle * 2 * D * F + moved)
    assert count_flops(step).hardware == pytest.approx(6 * tokens * per_token + extra)
