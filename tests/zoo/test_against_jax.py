"""Losses and gradients of decoder and encoder-decoder against a JAX program written apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from planner.architectures import ARCHITECTURES, build  # noqa: E402
from planner.graph.derive import training_step  # noqa: E402
from planner.graph.optimizers import RATE  # noqa: E402
from planner.model import Model, Training  # noqa: E402
from planner.values import reference  # noqa: E402

Params = dict[str, Any]
EPSILON = 1e-6


def norm(x: Any, p: Params, name: str, rms: bool) -> Any:
    mean = 0.0 if rms else x.mean(-1, keepdims=True)
    unit = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON)
    return unit * p[name] + p.get(f"{name}_bias", 0.0)


def attend(x: Any, memory: Any, p: Params, causal: bool, prefix: str = "") -> Any:
    """Keys and values are repeated for the query heads that share them."""
    q = jnp.einsum("bsd,dnh->bsnh", x, p[f"{prefix}wq"]) + p.get(f"{prefix}bq", 0.0)

    def shared(name: str) -> Any:
        w = p[f"{prefix}w{name}"]
        w = w[:, None] if w.ndim == 2 else w
        bias = p.get(f"{prefix}b{name}", jnp.zeros(w.shape[1:]))
        y = jnp.einsum("btd,dkh->btkh", memory, w) + bias
        return jnp.repeat(y, q.shape[2] // y.shape[2], axis=2)

    scores = jnp.einsum("bsnh,btnh->bnst", q, shared("k")) / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:])) > 0, scores, -jnp.inf)
    mixed = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores), shared("v"))
    return jnp.einsum("bsnh,nhd->bsd", mixed, p[f"{prefix}wo"]) + p.get(f"{prefix}bo", 0.0)


def feed(x: Any, p: Params, act: Any) -> Any:
    inner = x @ p["w_in"] + p.get("b_in", 0.0)
    gated = "w_gate" in p
    h = act(x @ p["w_gate"] + p.get("b_gate", 0.0)) * inner if gated else act(inner)
    return h @ p["w_out"] + p.get("b_out", 0.0)


def loop(params: Params, name: str, x: Any, body: Any) -> Any:
    stacked = {k.removeprefix(f"{name}."): v for k, v in params.items() if k.startswith(f"{name}.")}
    for i in range(next(iter(stacked.values())).shape[0]):
        x = body(x, {k: v[i] for k, v in stacked.items()})
    return x


def cross_entropy(x: Any, p: Params, table: Any, targets: Any, rms: bool) -> Any:
    x = norm(x, p, "ln_f", rms)
    logits = x @ p["unembed"] if "unembed" in p else x @ table.T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()


def embed(p: Params, table: str, ids: Any, positions: str) -> Any:
    return p[table][ids] + p.get(positions, 0.0)


ACTS = {
    "gelu": lambda v: jax.nn.gelu(v, approximate=True), "silu": jax.nn.silu, "relu": jax.nn.relu,
}  # fmt: skip


def decoder_loss(p: Params, data: Params, s: Any) -> Any:
    rms, act = s.norm == "rms", ACTS[s.activation]

    def body(x: Any, q: Params) -> Any:
        h = norm(x, q, "ln1", rms)
        a = attend(h, h, q, s.kind != "encoder")
        if s.parallel_block:
            return x + a + feed(h, q, act)
        return x + a + feed(norm(x + a, q, "ln2", rms), q, act)

    x = loop(p, "layers", embed(p, "embed", data["tokens"], "positions"), body)
    return cross_entropy(x, p, p["embed"], data["targets"], rms)


def encoder_decoder_loss(p: Params, data: Params, s: Any) -> Any:
    rms, act = s.norm == "rms", ACTS[s.activation]

    def inward(x: Any, q: Params) -> Any:
        h = norm(x, q, "ln1", rms)
        x = x + attend(h, h, q, False)
        return x + feed(norm(x, q, "ln2", rms), q, act)

    memory = loop(p, "encoder", embed(p, "embed", data["sources"], "source_positions"), inward)
    memory = norm(memory, p, "encoder_ln", rms)

    def outward(x: Any, q: Params) -> Any:
        h = norm(x, q, "ln1", rms)
        x = x + attend(h, h, q, True)
        x = x + attend(norm(x, q, "cross_ln", rms), memory, q, False, "cross_")
        return x + feed(norm(x, q, "ln2", rms), q, act)

    table = p.get("target_embed", p["embed"])
    start = table[data["tokens"]] + p.get("positions", 0.0)
    return cross_entropy(loop(p, "decoder", start, outward), p, table, data["targets"], rms)


SMALL = {"d_model": 8, "d_ff": 12, "heads": 4, "vocab": 11, "sequence": 5}
STACKS = {"encoder_layers": 2, "decoder_layers": 2, "target_sequence": 3}
LLAMA = {"kv_heads": 2, "gated": True, "activation": "silu", "norm": "rms"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {"layers": 3}),
    ("decoder", {"layers": 2, **LLAMA, "tied_embeddings": False}),
    ("decoder", {"layers": 2, "biases": True, "positions": "learned", "kv_heads": 2}),
    ("decoder", {"layers": 2, "kv_heads": 1, "parallel_block": True, "gated": True}),
    ("encoder", {"layers": 2, "activation": "relu", "head_dim": 3}),
    ("encoder-decoder", {**STACKS, "positions": "learned", "biases": True}),
    ("encoder-decoder", {**STACKS, **LLAMA, "target_vocab": 7}),
]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients(kind: str, settings: dict[str, Any], remat: str) -> None:
    s = ARCHITECTURES[kind](**SMALL, **settings)
    graph = build(s, 2, Training(2))
    step = training_step(Model(kind, graph, Training(2, "sgd", remat=remat), 1))
    inputs = reference.random_inputs(step)
    found = reference.evaluate(step, inputs)
    params = {p.name: inputs[p.name] for p in graph.parameters()}
    data = {n: v for n, v in inputs.items() if n not in params}
    loss = encoder_decoder_loss if kind == "encoder-decoder" else decoder_loss
    value, gradient = jax.value_and_grad(loss)(
        {n: jnp.asarray(v) for n, v in params.items()}, data, s
    )
    assert found[step.outputs[0]] == pytest.approx(float(value), rel=1e-9)
    for new, old in step.aliases.items():
        ours = (params[old] - found[new]) / RATE
        np.testing.assert_allclose(ours, gradient[old], rtol=1e-6, atol=1e-9, err_msg=old)
