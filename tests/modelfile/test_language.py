"""The op language: every function and operator against NumPy, and its gradient by differences."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.graph.derive import training_step
from planner.graph.optimizers import RATE
from planner.modelfile import ModelErrors, load_model
from planner.modelfile.functions import FUNCTIONS
from planner.modelfile.language import OpSyntax, parse_statement
from planner.modelfile.sizes import Dims, SizeError, declaration, evaluate, resolve
from planner.values import reference

FILE = """
dims: {B: 2, S: 3, T: 3, D: 4, N: 2, H: 5, V: 7, X: 6, C: 4, G: 2}
training: {batch: B, optimizer: sgd, compute: f32, remat: none}
graph:
  inputs: {ids: "i32[B, S]", given: "f32[B, S, D]"}
  params:
    x: "[B, S, D]"
    y: "[B, S, D]"
    p: "[D]"
    r: "[D]"
    table: "[V, D]"
    w: "[D, H]"
    q: "[B, S, N, H]"
    k: "[B, T, N, H]"
    v: "[B, T, N, H]"
    q5: "[B, S, N, G, H]"
    image: "[B, X, X, C]"
    kernel: "[3, 3, C, 8]"
    half: "[3, 3, 2, C]"
    back: "[3, 3, C, 2]"
    c1: "[C]"
    c2: "[C]"
  ops:
    - %s
    - loss = mean(square(out)) + mean(given)
"""

Arrays = dict[str, Any]


def softmax(a: Any) -> Any:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(a: Any, axes: Any) -> Any:
    return (a - a.mean(axes, keepdims=True)) / np.sqrt(a.var(axes, keepdims=True) + 1e-6)


def attended(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    scores = np.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return np.einsum("bnst,btnh->bsnh", softmax(scores), v)


def grouped(a: Arrays) -> Any:
    q = a["q5"]
    heads = [attended(q[:, :, :, g], a["k"], a["v"]) for g in range(q.shape[3])]
    return np.stack(heads, 3)


def cross_entropy(a: Arrays) -> Any:
    logits = a["x"]
    at = np.take_along_axis(np.log(softmax(logits)), a["ids"][..., None], -1)
    return -at.mean()


def conv(a: Any, w: Any, stride: int, pad: int, groups: int = 1) -> Any:
    a = np.pad(a, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    count = (a.shape[1] - w.shape[0]) // stride + 1
    out = np.zeros((a.shape[0], count, count, w.shape[3]))
    each_in, each_out = w.shape[2], w.shape[3] // groups
    for g in range(groups):
        ins, outs = slice(g * each_in, (g + 1) * each_in), slice(g * each_out, (g + 1) * each_out)
        for i in range(count):
            for j in range(count):
                at = a[:, i * stride : i * stride + 3, j * stride : j * stride + 3, ins]
                out[:, i, j, outs] = np.einsum("bijc,ijco->bo", at, w[..., outs])
    return out


def conv_transpose(a: Any, w: Any) -> Any:
    """Every point adds its kernel, two steps apart; "valid" keeps all of it."""
    n = a.shape[1]
    out = np.zeros((a.shape[0], 2 * n + 1, 2 * n + 1, w.shape[3]))
    for i in range(n):
        for j in range(n):
            at = np.einsum("bc,ijco->bijo", a[:, i, j], w)
            out[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += at
    return out


def pooled(a: Any, f: Callable[..., Any]) -> Any:
    b, n, _, c = a.shape
    return f(a.reshape(b, n // 2, 2, n // 2, 2, c), axis=(2, 4))


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def gelu(a: Any) -> Any:
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


# op → its value
CASES: dict[str, Callable[[Arrays], Any]] = {
    'out = einsum("B S D, D H -> B S H", x, w)': lambda a: a["x"] @ a["w"],
    'out = einsum("bsd,dh->bh", x, w)': lambda a: (a["x"] @ a["w"]).sum(1),
    "out = gather(table, ids)": lambda a: a["table"][a["ids"]],
    "out = embedding(table, ids) * x": lambda a: a["table"][a["ids"]] * a["x"],
    "out = x * sum(one_hot(ids, V), over=[B, S, V])": lambda a: a["x"] * a["ids"].size,
    'out = one_hot(ids, "D") * x': lambda a: np.eye(4)[a["ids"]] * a["x"],
    "out = attention(q, k, v)": lambda a: attended(a["q"], a["k"], a["v"]),
    "out = attention(q, k, v, causal=True)": lambda a: attended(a["q"], a["k"], a["v"], True),
    "out = attention(q5, k, v)": grouped,
    "out = attention(q, sum(k, over=N), sum(v, over=N))": lambda a: attended(
        a["q"], *(np.repeat(a[n].sum(2, keepdims=True), 2, 2) for n in "kv")
    ),
    "out = exp(x)": lambda a: np.exp(a["x"]),
    "out = log(1 + square(x))": lambda a: np.log(1 + a["x"] ** 2),
    "out = tanh(x)": lambda a: np.tanh(a["x"]),
    "out = sqrt(x * x + 1)": lambda a: np.sqrt(a["x"] ** 2 + 1),
    "out = rsqrt(1 + x ** 2)": lambda a: 1 / np.sqrt(1 + a["x"] ** 2),
    "out = sigmoid(x)": lambda a: sigmoid(a["x"]),
    "out = gelu(x)": lambda a: gelu(a["x"]),
    "out = silu(x)": lambda a: a["x"] * sigmoid(a["x"]),
    "out = relu(x)": lambda a: np.maximum(a["x"], 0),
    "out = abs(x)": lambda a: np.abs(a["x"]),
    "out = sign(x) * y": lambda a: np.sign(a["x"]) * a["y"],
    "out = floor(10 * x) * y": lambda a: np.floor(10 * a["x"]) * a["y"],
    "out = maximum(x, y)": lambda a: np.maximum(a["x"], a["y"]),
    "out = minimum(x, 0.1)": lambda a: np.minimum(a["x"], 0.1),
    "out = equal(x, x) * y": lambda a: a["y"],
    "out = greater(x, y) * x": lambda a: (a["x"] > a["y"]) * a["x"],
    "out = where(greater(0, x), y, -3)": lambda a: np.where(a["x"] < 0, a["y"], -3),
    'out = cast(x, "f32") / 2': lambda a: a["x"] / 2,
    "out = x - y": lambda a: a["x"] - a["y"],
    "out = 2 - x / D": lambda a: 2 - a["x"] / 4,
    "out = x / (2 + square(y))": lambda a: a["x"] / (2 + a["y"] ** 2),
    "out = -x + p": lambda a: a["p"] - a["x"],
    "out = x * H ** -0.5": lambda a: a["x"] / np.sqrt(5),
    "out = layer_norm(x, p, r)": lambda a: norm(a["x"], -1) * a["p"] + a["r"],
    "out = layer_norm(x, scale=p)": lambda a: norm(a["x"], -1) * a["p"],
    "out = rms_norm(x, p)": lambda a: a["x"]
    / np.sqrt((a["x"] ** 2).mean(-1, keepdims=True) + 1e-6) * a["p"],
    "out = group_norm(image, c1, c2, groups=2)": lambda a: norm(
        a["image"].reshape(2, 36, 2, 2), (1, 3)
    ).reshape(2, 6, 6, 4) * a["c1"] + a["c2"],
    "out = batch_norm(image, c1, c2)": lambda a: norm(a["image"], (0, 1, 2)) * a["c1"] + a["c2"],
    "out = softmax(x) + y": lambda a: softmax(a["x"]) + a["y"],
    "out = softmax(x, over=S)": lambda a: softmax(a["x"].swapaxes(1, 2)).swapaxes(1, 2),
    'out = softmax(einsum("bsd,btd->bst", x, y), t, causal=[s, t])': lambda a: softmax(
        np.where(np.tri(3) > 0, np.einsum("bsd,btd->bst", a["x"], a["y"]), -np.inf)
    ),
    "out = cross_entropy(x, ids)": cross_entropy,
    "out = sum(x, over=S)": lambda a: a["x"].sum(1),
    "out = mean(x, over=[B, D])": lambda a: a["x"].mean((0, 2)),
    "out = mean(x)": lambda a: a["x"].mean(),
    'out = max(x, "S D")': lambda a: a["x"].max((1, 2)),
    'out = reshape(x, "B z=-1 2")': lambda a: a["x"].reshape(2, 6, 2),
    'out = reshape(x, "B S*D")': lambda a: a["x"].reshape(2, 12),
    'out = transpose(x, "D B S")': lambda a: a["x"].transpose(2, 0, 1),
    "out = transpose(x, [1, 0, -1])": lambda a: a["x"].transpose(1, 0, 2),
    "out = concat(x, y, x, dim=S)": lambda a: np.concatenate([a["x"], a["y"], a["x"]], 1),
    "out = slice(x, D, 1, -1)": lambda a: a["x"][..., 1:-1],
    'out = slice(x, -1, 0, D, step=2, label="E")': lambda a: a["x"][..., ::2],
    "out = pad(x, S, 1, 2)": lambda a: np.pad(a["x"], ((0, 0), (1, 2), (0, 0))),
    "out = cumsum(x, S)": lambda a: a["x"].cumsum(1),
    "out = cumsum(x, S, reverse=True, exclusive=True)": lambda a: a["x"][:, ::-1].cumsum(1)[:, ::-1]
    - a["x"],
    "out, places = sort(x)": lambda a: np.sort(a["x"], -1),
    "out, _ = sort(x, S, descending=True)": lambda a: -np.sort(-a["x"], 1),
    "out, _ = top_k(x, k=2)": lambda a: -np.sort(-a["x"], -1)[..., :2],
    "out = conv(image, kernel)": lambda a: conv(a["image"], a["kernel"], 1, 1),
    "out = conv(image, kernel, stride=2, padding=0)": lambda a: conv(a["image"], a["kernel"], 2, 0),
    "out = conv(image, half, padding=[[1, 1], [1, 1]], groups=2)": lambda a: conv(
        a["image"], a["half"], 1, 1, groups=2
    ),
    'out = conv_transpose(image, back, stride=2, padding="valid")': lambda a: conv_transpose(
        a["image"], a["back"]
    ),
    "out = max_pool(image, 2)": lambda a: pooled(a["image"], np.max),
    "out = avg_pool(image, [2, 2])": lambda a: pooled(a["image"], np.mean),
    "out = global_avg_pool(image)": lambda a: a["image"].mean((1, 2)),
    "out = upsample(image, 2)": lambda a: a["image"].repeat(2, 1).repeat(2, 2),
    "out = stop_gradient(x) * y": lambda a: a["x"] * a["y"],
    "out = square(x)": lambda a: a["x"] ** 2,
}  # fmt: skip


def loaded(op: str) -> tuple[Any, Arrays]:
    model = load_model(FILE % f"'{op.replace(chr(39), chr(39) * 2)}'", "m.yaml")
    return model, reference.random_inputs(model.graph)


@pytest.mark.parametrize("op", CASES)
def test_value(op: str) -> None:
    model, inputs = loaded(op)
    values = reference.evaluate(model.graph, inputs)
    expected = CASES[op](inputs)
    assert values["out"].shape == np.shape(expected)
    np.testing.assert_allclose(values["out"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", CASES)
def test_gradient(op: str) -> None:
    """What SGD subtracts from each parameter is the slope of the loss, by finite differences."""
    model, inputs = loaded(op)
    step = training_step(model)
    after = reference.evaluate(step, inputs)
    rng = np.random.default_rng(2)
    assert step.aliases
    for new, old in step.aliases.items():
        direction = rng.normal(size=inputs[old].shape)
        slope = ((inputs[old] - after[new]) / RATE * direction).sum()
        losses = [
            reference.evaluate(step, {**inputs, old: inputs[old] + e * direction})[step.outputs[0]]
            for e in (1e-6, -1e-6)
        ]
        expected = (losses[0] - losses[1]) / 2e-6
        if "stop_gradient" in op and old == "x":
            expected = 0.0
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), old


def test_every_function_has_a_case() -> None:
    called = {
        node.func.id
        for op in CASES
        for node in ast.walk(ast.parse(op))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert set(FUNCTIONS) - called == set()


def test_every_function_is_documented() -> None:
    """The table of docs/model-files.md is what FUNCTIONS says."""
    docs = (Path(__file__).parents[2] / "docs" / "model-files.md").read_text(encoding="utf-8")
    rows = [f"| `{f.signature}` | {f.summary} |" for f in FUNCTIONS.values()]
    assert [row for row in rows if row not in docs] == []
    listed = re.findall(r"^\| `(\w+)\(", docs, re.MULTILINE)
    assert sorted(listed) == sorted(FUNCTIONS)


def test_whole_numbers_stay_whole() -> None:
    source = FILE % "out = gather(table, minimum(ids + 1, V - 1))"
    model = load_model(source, "m.yaml")
    inputs = reference.random_inputs(model.graph)
    values = reference.evaluate(model.graph, inputs)
    np.testing.assert_array_equal(values["out"], inputs["table"][np.minimum(inputs["ids"] + 1, 6)])


@pytest.mark.parametrize(
    "text",
    [
        "x = f(a).b", "x = a[0]", "x = a if b else c", "x = a < b", "x = a and b", "x = {1: 2}",
        "x = lambda: 1", "x = [i for i in a]", "x = f(*a)", "x = f(**a)", "x = a @ b",
        "x = a % b", "x = not a", "x = ~a", "x: int = 3", "del x", "x = f'{a}'", "x = b'a'",
        "x = a; y = b", "if a: x = 1", "x[0] = a", "x.y = a", "x = (yield)", "x = a()()", "x = 1j",
    ],
)  # fmt: skip
def test_nothing_else_of_python(text: str) -> None:
    with pytest.raises(OpSyntax):
        parse_statement(text)


@given(st.text(max_size=60))
def test_any_text_is_an_op_or_an_error(text: str) -> None:
    offset = 0
    try:
        parse_statement(text)
    except OpSyntax as error:
        offset = error.offset
    assert 0 <= offset <= len(text)


# ---- sizes -----------------------------------------------------------------------------------


def test_arithmetic_of_sizes() -> None:
    dims = Dims({"D": 12, "H": 4})
    cases = {"D": 12, "D*H": 48, "D/H": 3, "2*(D+H)-1": 31, "D//5": 2, "H**2": 16, "D*0.5": 6}
    for text, size in cases.items():
        assert evaluate(text, dims) == size


def test_dims_in_any_order() -> None:
    sizes, errors = resolve({"F": "4*D", "D": "N*H", "N": 2, "H": 3})
    assert sizes == {"N": 2, "H": 3, "D": 6, "F": 24}
    assert errors == {}


def test_only_the_culprit_is_named() -> None:
    sizes, errors = resolve({"A": "2*B", "B": "C", "D": 3, "E": "E"})
    assert sizes == {"D": 3}
    assert {name: e.code for name, e in errors.items()} == {"B": "undefined-dim", "E": "cycle"}


def test_declarations() -> None:
    dims = Dims({"B": 2, "D": 12})
    found = declaration(" f32 [B, D, D, 3, D/4] ", dims)
    assert (found.dtype, found.shape) == ("f32", (2, 12, 12, 3, 3))
    assert found.dims == ("B", "D", "D'", "3", "D/4")
    assert declaration("[]", dims).shape == ()
    with pytest.raises(SizeError):
        declaration("[B D]", dims)


def test_names_of_loops_are_kept_free() -> None:
    """A dim called `layers` does not clash with the dimension that a repeat adds."""
    source = FILE.replace("G: 2", "G: 2, layers: 3").replace('c1: "[C]"', 'c1: "[layers]"')
    graph = load_model(source % "out = x", "m.yaml").graph
    assert graph.tensors["c1"].dims == ("layers'",)


def test_names_are_never_dims() -> None:
    with pytest.raises(ModelErrors):
        load_model(FILE % "D = x", "m.yaml")
