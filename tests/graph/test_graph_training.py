"""The training step as a whole: remat policies, accumulation, optimizers, composite layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from graph_support import CASES, Arrays, gradients, model, step_of, transformer

from planner.graph import expr as ex
from planner.graph import layers
from planner.graph import optimizers as opt
from planner.graph.builder import Builder, contraction_sizes
from planner.graph.core import Graph, Loop
from planner.graph.derive import training_step
from planner.model import REMAT_POLICIES, Model
from planner.values import reference


def results(step: Graph, inputs: Arrays) -> Arrays:
    out = reference.evaluate(step, inputs)
    return {name: out[name] for name in step.outputs}


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-11, err_msg=name)


LOOPS = ["conv blocks", "nested loops", "shared by two loops", "swapped carries"]


# ---- rematerialisation ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [p for p in REMAT_POLICIES if p != "none"])
@pytest.mark.parametrize("case", ["transformer", *LOOPS])
def test_remat_changes_no_value(case: str, policy: str) -> None:
    def step(remat: str) -> Graph:
        if case == "transformer":
            return training_step(transformer(remat=remat))
        return step_of(CASES[case], remat=remat)

    plain, again = step("none"), step(policy)
    assert len(plain.parameters()) + 1 == len(plain.outputs)
    inputs = reference.random_inputs(plain)
    assert_same(results(again, inputs), results(plain, inputs))


def backward_loop(step: Graph) -> Loop:
    (loop,) = (n for n in step.nodes if isinstance(n, Loop) and n.phase == "backward")
    return loop


def recomputed(step: Graph) -> set[str]:
    return {op.origin for op, _ in step.walk() if op.phase == "recompute"}


def saved(step: Graph) -> set[str]:
    return {n for n, t in step.tensors.items() if t.role == "residual"}


def test_policies_save_what_they_say() -> None:
    steps = {p: training_step(transformer(remat=p)) for p in REMAT_POLICIES}
    products = {
        op.name: op for op, _ in steps["none"].walk()
        if op.phase == "forward" and contraction_sizes(op) is not None
    }  # fmt: skip
    inside = {n for n in products if n.startswith("layers.")}
    # Nothing is computed twice except casts of parameters, which cost no activations.
    assert all(name.endswith(".cast") for name in recomputed(steps["none"]))
    assert len(saved(steps["full"])) == 1  # only what enters the body
    assert recomputed(steps["full"]) & inside
    with_weights = {f"layers.{n}" for n in ("q", "k", "v", "h")}
    assert with_weights <= {s.removesuffix(".saved") for s in saved(steps["dots"])}
    assert not recomputed(steps["dots"]) & with_weights
    assert recomputed(steps["attention"]) & inside <= {"layers.attn.scores", "layers.attn.mix"}
    assert saved(steps["checkpoint"]) == saved(steps["full"])
    assert recomputed(steps["checkpoint"]) - recomputed(steps["full"]) == {"layers.x", "layers.y"}
    sizes = {p: len(saved(s)) for p, s in steps.items()}
    assert sizes["full"] < sizes["dots"] < sizes["none"]


@pytest.mark.parametrize("policy", REMAT_POLICIES)
@pytest.mark.parametrize("case", ["transformer", *LOOPS])
def test_names_are_unique_over_all_loops(case: str, policy: str) -> None:
    if case == "transformer":
        step = training_step(transformer(remat=policy, accumulation_steps=2))
    else:
        step = step_of(CASES[case], remat=policy, accumulation_steps=2)
    assert [n for n, count in Counter(op.name for op, _ in step.walk()).items() if count > 1] == []
    tensors = Counter(name for graph in bodies(step) for name in graph.tensors)
    assert [n for n, count in tensors.items() if count > 1] == []
    loops = Counter(n.name for g in bodies(step) for n in g.nodes if isinstance(n, Loop))
    assert [n for n, count in loops.items() if count > 1] == []


def bodies(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node in graph.nodes:
        if isinstance(node, Loop):
            yield from bodies(node.body)


@pytest.mark.parametrize("policy", ["none", "dots", "attention"])
def test_inner_loops_are_recomputed_only_if_nothing_is_saved(policy: str) -> None:
    step = step_of(CASES["nested loops"], remat=policy)
    loops = [n.name for g in bodies(step) for n in g.nodes if isinstance(n, Loop)]
    assert loops == ["outer", "outer.bwd", "outer.inner", "outer.inner.bwd"]
    full = step_of(CASES["nested loops"], remat="full")
    assert "outer.inner~" in [
        n.name for g in bodies(full) for n in g.nodes if isinstance(n, Loop)
    ]


def test_recomputed_ops_name_their_original() -> None:
    step = training_step(transformer(remat="full"))
    forward = {op.name for op, _ in step.walk() if op.phase == "forward"}
    assert recomputed(step) <= forward


def test_backward_products_cost_twice_the_forward_ones() -> None:
    """Model FLOPs: every product of the forward pass gives two of the same size."""
    step = training_step(transformer(remat="none"))
    flops = {"forward": 0.0, "backward": 0.0}
    for op, times in step.walk():
        sizes = contraction_sizes(op)
        if sizes is not None and op.phase in flops and not op.attrs.get("onehot"):
            flops[op.phase] += 2.0 * np.prod(sizes) * times
    assert flops["backward"] == 2 * flops["forward"]


# ---- accumulation ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
def test_accumulation_equals_one_big_batch(optimizer: str) -> None:
    whole = training_step(transformer(4, optimizer=optimizer))
    parts = training_step(transformer(4, optimizer=optimizer, accumulation_steps=2))
    inputs = reference.random_inputs(whole)
    stacked = {
        name: array.reshape(2, 2, *array.shape[1:]) if name in ("ids", "targets") else array
        for name, array in inputs.items()
    }
    stacked = {n if n in parts.inputs else f"{n}.all": a for n, a in stacked.items()}
    assert set(stacked) == set(parts.inputs)
    expected, found = results(whole, inputs), results(parts, stacked)
    assert_same(
        {whole.outputs[0]: found.pop(parts.outputs[0]), **found}, expected
    )


# ---- optimizers against their formulas ---------------------------------------------------------


def linear(rows: int = 3, cols: int = 4) -> Model:
    def build(b: Builder) -> str:
        x = b.input("x", (2, rows), ("B", "I"), "f32")
        w = b.param("w", (rows, cols), ("I", "O"))
        y = b.einsum("B I, I O -> B O", x, w)
        return b.map("loss", [(y, ("B", "O"))], (), ex.square(ex.x(0)), dtype="f32")

    return model(build)


def trained(optimizer: str, rows: int = 3, cols: int = 4) -> tuple[Arrays, Arrays, np.ndarray]:
    """(inputs, outputs by what they replace, gradient of w)."""
    plain = linear(rows, cols)
    step = training_step(
        Model("m", plain.graph, type(plain.training)(1, optimizer, accumulation_steps=1), 1)
    )
    inputs = reference.random_inputs(step)
    base = training_step(plain)
    gradient = gradients(base, {n: inputs[n] for n in base.inputs})["w"]
    out = reference.evaluate(step, inputs)
    return inputs, {old: out[new] for new, old in step.aliases.items()}, gradient


def test_sgd_by_hand() -> None:
    step = training_step(linear(1, 1))
    out = reference.evaluate(step, {"x": np.array([[1.0], [2.0]]), "w": np.array([[3.0]])})
    # loss = 9 + 36, d/dw Σ (x·w)² = 2·w·Σ x² = 30
    assert out[step.outputs[0]] == pytest.approx(45)
    assert out[step.outputs[1]] == pytest.approx(3 - opt.RATE * 30)


def test_momentum() -> None:
    old, new, g = trained("momentum")
    m = 0.9 * old["w.m"] + g
    np.testing.assert_allclose(new["w.m"], m)
    np.testing.assert_allclose(new["w"], old["w"] - 0.01 * m)


@pytest.mark.parametrize(("optimizer", "decay"), [("adam", 0.0), ("adamw", 0.01)])
def test_adam(optimizer: str, decay: float) -> None:
    old, new, g = trained(optimizer)
    m, v = 0.9 * old["w.m"] + 0.1 * g, 0.99 * old["w.v"] + 0.01 * g**2
    np.testing.assert_allclose(new["w.m"], m)
    np.testing.assert_allclose(new["w.v"], v)
    expected = old["w"] - 0.01 * (m / (np.sqrt(v) + 1e-8) + decay * old["w"])
    np.testing.assert_allclose(new["w"], expected)


def clipped(old: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return old - 0.01 * unit / max(1.0, np.sqrt(np.mean(unit**2)))


def test_adafactor_of_a_small_matrix_is_not_factored() -> None:
    old, new, g = trained("adafactor")
    v = 0.99 * old["w.v"] + 0.01 * (g**2 + 1e-30)
    np.testing.assert_allclose(new["w.v"], v)
    np.testing.assert_allclose(new["w"], clipped(old["w"], g / np.sqrt(v)), rtol=1e-6)


def test_adafactor_of_a_large_matrix_keeps_rows_and_columns() -> None:
    old, new, g = trained("adafactor", 128, 130)
    row = 0.99 * old["w.vr"] + 0.01 * (g**2).mean(axis=1)
    col = 0.99 * old["w.vc"] + 0.01 * (g**2).mean(axis=0)
    np.testing.assert_allclose(new["w.vr"], row)
    np.testing.assert_allclose(new["w.vc"], col)
    v = np.outer(row, col) / row.mean()
    np.testing.assert_allclose(new["w"], clipped(old["w"], g / np.sqrt(v)), rtol=1e-6)


# ---- composite layers against their formulas -----------------------------------------------------


RNG = np.random.default_rng(3)


def test_norms() -> None:
    b = Builder()
    x = b.input("x", (2, 3, 5, 4), ("B", "H", "W", "C"), "f32")
    scale, bias = (b.input(n, (4,), ("C",), "f32") for n in ("scale", "bias"))
    names = [
        layers.layer_norm(b, x, scale, bias),
        layers.rms_norm(b, x, scale),
        layers.batch_norm(b, x, scale, bias),
        layers.group_norm(b, x, scale, bias, 2),
    ]
    a, s, c = RNG.normal(size=(2, 3, 5, 4)), RNG.normal(size=4), RNG.normal(size=4)

    def standard(v: np.ndarray, *axes: int) -> np.ndarray:
        mean, var = v.mean(axes, keepdims=True), v.var(axes, keepdims=True)
        return (v - mean) / np.sqrt(var + 1e-6)

    out = reference.evaluate(b.graph(names), {"x": a, "scale": s, "bias": c})
    expected = [
        standard(a, 3) * s + c,
        a / np.sqrt((a**2).mean(3, keepdims=True) + 1e-6) * s,
        standard(a, 0, 1, 2) * s + c,
        standard(a.reshape(2, 3, 5, 2, 2), 1, 2, 4).reshape(a.shape) * s + c,
    ]
    for name, array in zip(names, expected, strict=True):
        np.testing.assert_allclose(out[name], array, rtol=1e-9, atol=1e-12, err_msg=name)
        assert b.lookup(name).dims == ("B", "H", "W", "C")


def softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_causal_attention() -> None:
    b = Builder()
    q = b.input("q", (2, 4, 3, 5), ("B", "S", "N", "H"), "f32")
    k, v = (b.input(n, (2, 4, 3, 5), ("B", "T", "N", "H"), "f32") for n in "kv")
    out = layers.attention(b, q, k, v, causal=True)
    arrays = {n: RNG.normal(size=(2, 4, 3, 5)) for n in "qkv"}
    scores = np.einsum("bsnh,btnh->bnst", arrays["q"], arrays["k"]) / np.sqrt(5)
    scores[..., np.triu(np.ones((4, 4)), 1) > 0] = -np.inf
    expected = np.einsum("bnst,btnh->bsnh", softmax(scores), arrays["v"])
    np.testing.assert_allclose(reference.evaluate(b.graph([out]), arrays)[out], expected)


def test_cross_entropy_and_embedding() -> None:
    b = Builder()
    table = b.input("table", (6, 3), ("V", "D"), "f32")
    ids = b.input("ids", (2, 4), ("B", "S"), "i32")
    rows = layers.embedding(b, table, ids, ("B", "S", "D"))
    logits = b.input("logits", (2, 4, 6), ("B", "S", "V"), "f32")
    loss = layers.cross_entropy(b, logits, ids)
    arrays = {
        "table": RNG.normal(size=(6, 3)), "ids": RNG.integers(0, 6, (2, 4)),
        "logits": 50 * RNG.normal(size=(2, 4, 6)),
    }  # fmt: skip
    out = reference.evaluate(b.graph([rows, loss]), arrays)
    np.testing.assert_allclose(out[rows], arrays["table"][arrays["ids"]])
    picked = np.take_along_axis(softmax(arrays["logits"]), arrays["ids"][..., None], -1)
    assert out[loss] == pytest.approx(-np.log(picked).mean())
