"""Shared by the graph tests: small models with every kind of op, and what is checked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from planner.graph import expr as ex
from planner.graph import layers, structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Dims, Graph, Op
from planner.graph.derive import training_step
from planner.graph.optimizers import RATE
from planner.model import Model, Training
from planner.values import kernels, reference

Arrays = dict[str, np.ndarray]


def weighted_sum(b: Builder, x: str) -> str:
    """A scalar loss in which every entry of x counts differently: Σ tanh(x)·(1 + index·0.3…)."""
    dims = b.lookup(x).dims
    weight = ex.c(1.0)
    for i, d in enumerate(dims):
        weight = ex.add(weight, ex.mul(ex.c(0.3 / (i + 1)), ex.index(d)))
    value = ex.mul(("tanh", ex.mul(ex.c(0.5), ex.x(0))), weight)
    return b.map("loss", [(x, dims)], (), value, dtype="f32")


def model(build: Callable[[Builder], str], **training: Any) -> Model:
    """The model whose scalar loss `build` returns."""
    b = Builder()
    loss = build(b)
    settings = {"optimizer": "sgd", **training}
    return Model("case", b.graph([loss]), Training(1, **settings), 1)


def step_of(build: Callable[[Builder], str], **training: Any) -> Graph:
    return training_step(model(build, **training))


SMOOTH: dict[str, Callable[..., Any]] = {
    "tanh": lambda a: ("tanh", a),
    "sigmoid": lambda a: ("sigmoid", a),
    "gelu": lambda a: ("gelu", a),
    "exp": lambda a: ("exp", ("tanh", a)),
    "log": lambda a: ("log", ex.add(ex.c(1), ex.square(a))),
    "sqrt": lambda a: ("sqrt", ex.add(ex.c(1), ex.square(a))),
    "rsqrt": lambda a: ("rsqrt", ex.add(ex.c(1), ex.square(a))),
    "neg": ex.neg,
}
KINKED: dict[str, Callable[..., Any]] = {
    "abs": lambda a: ("abs", a),
    "relu": ex.relu,
    "max": lambda a, b: ("max", a, b),
    "min": lambda a, b: ("min", a, b),
    "where": lambda a, b: ("where", ("ge", a, ex.c(0.1)), a, b),
    "steps": lambda a, b: ex.mul(("floor", a), ("gt", a, b)),
}
BINARY: dict[str, Callable[..., Any]] = {
    "add": ex.add,
    "sub": ex.sub,
    "mul": ex.mul,
    "div": lambda a, b: ex.div(a, ex.add(ex.c(1), ex.square(b))),
}


def expressions(operands: int, factors: Sequence[str], kinks: bool = True) -> st.SearchStrategy:
    """Expressions that are finite everywhere; with `kinks` not differentiable everywhere."""
    return _expressions(operands, tuple(factors), kinks)


@cache  # building a recursive strategy costs more than drawing from it
def _expressions(operands: int, factors: tuple[str, ...], kinks: bool) -> st.SearchStrategy:
    leaves = st.integers(0, operands - 1).map(ex.x) | st.floats(-2, 2).map(ex.c)
    if factors:
        leaves |= st.sampled_from(factors).map(ex.index)
    functions = [*SMOOTH.values(), *BINARY.values(), *(KINKED.values() if kinks else ())]

    def larger(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(*(st.builds(f, *[inner] * _arity(f)) for f in functions))

    return st.recursive(leaves, larger, max_leaves=6)


def _arity(function: Callable[..., Any]) -> int:
    return function.__code__.co_argcount


# ---- models ------------------------------------------------------------------------------------


def on_param(shape: Sequence[int], dims: str, apply: Callable[[Builder, str], str]) -> Any:
    """A model that applies one op to a parameter, so that its gradient is checked too."""

    def build(b: Builder) -> str:
        return weighted_sum(b, apply(b, b.param("p", shape, dims.split())))

    return build


def on_two(shape: Sequence[int], w_shape: Sequence[int], apply: Any, **options: Any) -> Any:
    """The same for an op with a filter [taps…, C, O]."""
    spatial = ["H", "W", "Z"][: len(w_shape) - 2]

    def build(b: Builder) -> str:
        x = b.param("p", shape, ["B", *spatial, "C"])
        w = b.param("w", w_shape, [*(f"k{s}" for s in spatial), "I", "O"])
        return weighted_sum(b, apply(b, x, w, **options))

    return build


def concat_twice(b: Builder) -> str:
    x, y = b.param("x", (2, 3), ("B", "C")), b.param("y", (2, 1), ("B", "C"))
    return weighted_sum(b, structural.concat(b, [x, y, x], "C", label="CC"))


def normed(norm: str) -> Callable[[Builder], str]:
    def build(b: Builder) -> str:
        x = b.param("x", (2, 3, 3, 4), ("B", "H", "W", "C"))
        scale = b.param("scale", (4,), ("C",))
        if norm == "rms":
            return weighted_sum(b, layers.rms_norm(b, x, scale))
        bias = b.param("bias", (4,), ("C",))
        if norm == "group":
            return weighted_sum(b, layers.group_norm(b, x, scale, bias, 2))
        if norm == "batch":
            return weighted_sum(b, layers.batch_norm(b, x, scale, bias))
        return weighted_sum(b, layers.layer_norm(b, x, scale, bias))

    return build


def attention(b: Builder) -> str:
    q = b.param("q", (2, 4, 2, 2, 3), ("B", "S", "K", "G", "H"))
    k = b.param("k", (2, 4, 2, 3), ("B", "T", "K", "H"))
    v = b.param("v", (2, 4, 2, 3), ("B", "T", "K", "H"))
    return weighted_sum(b, layers.attention(b, q, k, v, causal=True, grouped=True))


def classifier(b: Builder) -> str:
    table = b.param("table", (6, 4), ("V", "D"))
    ids = b.input("ids", (2, 3), ("B", "S"), "i32")
    targets = b.input("targets", (2, 3), ("B", "S"), "i32")
    h = layers.embedding(b, table, ids, ("B", "S", "D"))
    logits = b.einsum("B S D, V D -> B S V", h, table)
    return layers.cross_entropy(b, logits, targets)


def maximum(b: Builder) -> str:
    x = b.param("x", (3, 4), ("A", "B"))
    top = b.map("top", [(x, ("A", "B"))], ("A",), ex.mul(ex.x(0), ex.x(0)), combiner="max")
    return weighted_sum(b, top)


def transformer(batch: int = 4, **training: Any) -> Model:
    """Two pre-norm layers in a loop, tied embeddings; `batch` is that of all microbatches."""
    micro = batch // training.get("accumulation_steps", 1)
    b = Builder()
    ids = b.input("ids", (micro, 4), ("B", "S"), "i32")
    targets = b.input("targets", (micro, 4), ("B", "S"), "i32")
    table = b.param("table", (7, 4), ("V", "D"))
    bias = b.param("bias", (4,), ("D",))  # read by every iteration: gradients add up
    x = layers.embedding(b, table, ids, ("B", "S", "D"), name="x")
    r = b.repeat("layers", 3)
    entry = r.enter(x)
    scale = r.param("scale", (4,), ("D",))
    qkv = [r.param(n, (4, 2, 3), ("D", "N", "H")) for n in ("wq", "wk", "wv")]
    wo = r.param("wo", (2, 3, 4), ("N", "H", "D"))
    w1, w2 = r.param("w1", (4, 6), ("D", "F")), r.param("w2", (6, 4), ("F", "D"))
    h = layers.layer_norm(r, entry, scale, bias)
    q = r.einsum("B S D, D N H -> B S N H", h, qkv[0], name="q")
    k = r.einsum("B T D, D N H -> B T N H", h, qkv[1], name="k")
    v = r.einsum("B T D, D N H -> B T N H", h, qkv[2], name="v")
    mixed = layers.attention(r, q, k, v, causal=True)
    h = r.einsum("B S N H, N H D -> B S D", mixed, wo, name="o")
    middle = r.pointwise("middle", ex.add(ex.x(0), ex.x(1)), entry, h)
    h = r.pointwise("act", ("gelu", ex.x(0)), r.einsum("BSD,DF->BSF", middle, w1, name="h"))
    h = r.einsum("BSF,FD->BSD", h, w2, name="y")
    out = r.pointwise("x", ex.add(ex.x(0), ex.x(1)), middle, h)
    (x,) = r.end_repeat([(x, entry, out)])
    loss = layers.cross_entropy(b, b.einsum("BSD,VD->BSV", x, table, name="logits"), targets)
    settings = {"optimizer": "sgd", **training}
    return Model("transformer", b.graph([loss]), Training(batch, **settings), batch * 4)


def conv_blocks(b: Builder) -> str:
    """Residual convolution blocks with group norm in a loop, pooling and upsampling outside."""
    x = b.input("x", (2, 4, 4, 4), ("B", "H", "W", "C"), "f32")
    first = b.param("first", (3, 3, 4, 4), ("kh", "kw", "I", "C"))
    h = windows.conv(b, x, first, name="stem")
    r = b.repeat("blocks", 2)
    entry = r.enter(h)
    w = r.param("w", (3, 3, 4, 4), ("kh", "kw", "I", "C"))
    scale, bias = r.param("scale", (4,), ("C",)), r.param("bias", (4,), ("C",))
    y = layers.group_norm(r, windows.conv(r, entry, w), scale, bias, 2)
    values, _ = structural.sort(r, y, "C")
    out = r.pointwise("out", ex.add(ex.x(0), ex.silu(ex.x(1))), entry, values)
    (h,) = r.end_repeat([(h, entry, out)])
    pooled = windows.max_pool(b, h, window=2)
    up = windows.upsample(b, pooled, factor=2)
    return weighted_sum(b, structural.concat(b, [up, h], "C", label="CC"))


def nested_loops(b: Builder) -> str:
    """A loop in a loop, with activations of both outer scopes read by the inner one."""
    memory = b.pointwise("memory", ("tanh", ex.x(0)), b.param("enc", (2, 3), ("B", "D")))
    x = b.param("x0", (2, 3), ("B", "D"))
    both = ("B", "D")
    r = b.repeat("outer", 2)
    entry = r.enter(x)
    h = r.einsum("B D, D E -> B E", entry, r.param("w", (3, 3), ("D", "E")), name="h")
    h = r.map("h2", [(h, both), (memory, both)], both, ("tanh", ex.mul(ex.x(0), ex.x(1))))
    s = r.repeat("inner", 3)
    inner = s.enter(h)
    g = s.einsum("B D, D E -> B E", inner, s.param("v", (3, 3), ("D", "E")), name="g")
    value = ex.add(("tanh", ex.x(0)), ex.mul(ex.x(1), ex.x(2)))
    out = s.map("g2", [(g, both), (memory, both), (h, both)], both, value)
    (h,) = s.end_repeat([(h, inner, out)])
    (x,) = r.end_repeat([(x, entry, r.pointwise("sum", ex.add(ex.x(0), ex.x(1)), h, entry))])
    return weighted_sum(b, x)


def shared_by_two_loops(b: Builder) -> str:
    """A parameter and an activation that two loops read whole; a carry that stays as it is."""
    bias, x = b.param("bias", (3,), ("D",)), b.param("x0", (2, 3), ("B", "D"))
    y = b.param("y0", (2, 3), ("B", "D"))
    m = b.pointwise("m", ("tanh", ex.x(0)), bias)
    for name in ("first", "second"):
        r = b.repeat(name, 2)
        entry, other = r.enter(x), r.enter(y)
        both = ("B", "D")
        value = ("tanh", ex.add(ex.mul(ex.x(0), ex.x(1)), ex.mul(ex.x(2), ex.x(3))))
        operands = [(entry, both), (r.use(bias), ("D",)), (m, ("D",)), (other, both)]
        out = r.map("out", operands, both, value)
        x, y = r.end_repeat([(x, entry, out), (y, other, other)])
    return weighted_sum(b, x)


def swapped_carries(b: Builder) -> str:
    """Two values that trade places in every iteration."""
    x, y = b.param("x0", (2, 3), ("B", "D")), b.param("y0", (2, 3), ("B", "D"))
    r = b.repeat("loop", 3)
    a, c = r.enter(x), r.enter(y)
    w = r.use(r.param("w", (3,), ("D",)))
    value = ("tanh", ex.add(ex.mul(ex.x(0), ex.x(2)), ex.x(1)))
    both = ("B", "D")
    out = r.map("out", [(a, both), (c, both), (w, ("D",))], both, value)
    x, y = r.end_repeat([(x, a, out), (y, c, a)])
    return weighted_sum(b, b.pointwise("product", ex.mul(ex.x(0), ex.x(1)), x, y))


def slots(b: Builder, x: str) -> str:
    """What one slot holds goes to another one, over what was there."""
    taken, left = (b.map(name, [], (), ex.c(n), dtype="i32") for name, n in (("a", 2), ("b", 1)))
    row, rest = structural.pop(b, x, taken)
    return structural.put(b, rest, row, left)


IMAGE = (2, 5, 4, 4)
CASES: dict[str, Callable[[Builder], str]] = {
    "conv": on_two(IMAGE, (3, 3, 4, 2), windows.conv),
    "conv valid": on_two(IMAGE, (3, 2, 4, 2), windows.conv, padding="valid"),
    "conv strided": on_two(IMAGE, (3, 3, 4, 2), windows.conv, stride=2),
    "conv dilated": on_two(IMAGE, (2, 2, 4, 2), windows.conv, dilation=2, padding=[(2, 0), 1]),
    "conv grouped": on_two(IMAGE, (2, 2, 2, 6), windows.conv, groups=2),
    "conv depthwise": on_two(IMAGE, (3, 3, 1, 4), windows.conv, groups=4),
    "conv 1-D causal": on_two((2, 6, 2), (3, 2, 2), windows.conv, padding=[(2, 0)]),
    "conv 3-D": on_two((2, 3, 3, 2, 2), (2, 2, 2, 2, 2), windows.conv),
    "conv skips points": on_two((2, 5, 2), (1, 2, 2), windows.conv, stride=3, padding="valid"),
    "conv_transpose": on_two((2, 3, 2, 4), (3, 3, 4, 2), windows.conv_transpose, stride=2),
    "conv_transpose valid": on_two(
        (2, 3, 2), (2, 2, 4), windows.conv_transpose, stride=3, padding="valid"
    ),
    "conv_transpose grouped": on_two(
        (2, 4, 4), (4, 2, 6), windows.conv_transpose, stride=2, padding=1, groups=2
    ),
    "max_pool": on_param(
        IMAGE, "B H W C", lambda b, x: windows.max_pool(b, x, window=3, stride=2, padding=1)
    ),
    "avg_pool": on_param(
        IMAGE, "B H W C", lambda b, x: windows.avg_pool(b, x, window=2, padding="same")
    ),
    "global_avg_pool": on_param(IMAGE, "B H W C", windows.global_avg_pool),
    "shift around": on_param((3, 4), "S D", lambda b, x: windows.shift(b, x, "S", -1, wrap=True)),
    "shift": on_param(
        (3, 4), "S D", lambda b, x: windows.shift(b, windows.shift(b, x, "S", 1), "D", -2)
    ),
    "pop and put": on_param((4, 3), "S D", slots),
    "upsample": on_param(
        (2, 2, 3, 2), "B H W C", lambda b, x: windows.upsample(b, x, factor=(2, 3))
    ),
    "reshape": on_param(
        (2, 6, 4), "B S D", lambda b, x: structural.reshape(b, x, (4, 3, -1), ("P", "Q", "R"))
    ),
    "reshape unaligned": on_param(
        (2, 4, 3), "B S D", lambda b, x: structural.reshape(b, x, (2, 6, 2), ("B", "Q", "R"))
    ),
    "transpose": on_param(
        (2, 3, 4), "B S D", lambda b, x: structural.transpose(b, x, ("D", 0, "S"))
    ),
    "concat": concat_twice,
    "slice": on_param((2, 7), "B S", lambda b, x: structural.slice_dim(b, x, "S", 1, -1, 2)),
    "pad": on_param(
        (2, 3), "B S", lambda b, x: structural.pad(b, x, "S", 1, 2, value=0.5, interior=1)
    ),
    "cumsum": on_param((2, 4), "B S", lambda b, x: structural.cumsum(b, x, "S")),
    "cumsum back": on_param(
        (2, 4), "B S", lambda b, x: structural.cumsum(b, x, "B", reverse=True, exclusive=True)
    ),
    "top_k": on_param((2, 5, 2), "B S D", lambda b, x: structural.top_k(b, x, 2, "S")[0]),
    "sort": on_param((2, 5), "B S", lambda b, x: structural.sort(b, x)[0]),
    "group_norm": normed("group"),
    "batch_norm": normed("batch"),
    "layer_norm": normed("layer"),
    "rms_norm": normed("rms"),
    "attention": attention,
    "classifier": classifier,
    "maximum": maximum,
    "conv blocks": conv_blocks,
    "nested loops": nested_loops,
    "shared by two loops": shared_by_two_loops,
    "swapped carries": swapped_carries,
}


# ---- what is checked ----------------------------------------------------------------------------


def gradients(step: Graph, inputs: Arrays) -> Arrays:
    """Parameter gradients, read off the update new = old - RATE·gradient of plain SGD."""
    out = reference.evaluate(step, inputs)
    return {
        old: (inputs[old] - out[new]) / RATE
        for new, old in step.aliases.items()
    }


def loss_of(step: Graph, inputs: Arrays) -> float:
    return float(reference.evaluate(step, inputs)[step.outputs[0]])


def check_gradients(step: Graph, seed: int = 0, h: float = 1e-5) -> None:
    """Every parameter's gradient against a central difference along a random direction."""
    inputs = reference.random_inputs(step, seed)
    found = gradients(step, inputs)
    assert found.keys() == {t.name for t in step.parameters()}
    for name, gradient in found.items():
        direction = np.random.default_rng(seed + 1).normal(size=gradient.shape)
        above = loss_of(step, {**inputs, name: inputs[name] + h * direction})
        below = loss_of(step, {**inputs, name: inputs[name] - h * direction})
        expected = (above - below) / (2 * h)
        scale = np.abs(gradient * direction).sum() + 1e-3
        assert abs(expected - (gradient * direction).sum()) < 1e-6 * scale, name


def executed(graph: Graph, inputs: Arrays, monkeypatch: Any) -> list[tuple[Op, list[np.ndarray]]]:
    """Every op of the graph with the arrays it reads (the last time it runs)."""
    seen: dict[str, tuple[Op, list[np.ndarray]]] = {}
    real = kernels.evaluate

    def spy(op: Op, args: Sequence[np.ndarray], offsets: Any) -> Any:
        seen[op.name] = (op, list(args))
        return real(op, args, offsets)

    monkeypatch.setattr(kernels, "evaluate", spy)
    reference.evaluate(graph, inputs)
    monkeypatch.setattr(kernels, "evaluate", real)
    return list(seen.values())


def cut(
    array: np.ndarray, dims: Dims, sizes: Sequence[int], factor: int, piece: slice
) -> np.ndarray:
    """The part of `array` at `piece` of one factor; whole if its dimensions lack the factor."""
    at = next((i for i, dim in enumerate(dims) if factor in dim), None)
    if at is None:
        return array
    inner = [sizes[f] for f in dims[at]]
    split = array.reshape(*array.shape[:at], *inner, *array.shape[at + 1 :])
    index = [slice(None)] * split.ndim
    index[at + dims[at].index(factor)] = piece
    part = split[tuple(index)]
    return part.reshape(*array.shape[:at], -1, *array.shape[at + 1 :])


def join(parts: Sequence[np.ndarray], dims: Dims, sizes: Sequence[int], factor: int) -> np.ndarray:
    """The inverse of `cut` for equal consecutive pieces; `sizes` are those of a piece."""
    at = next(i for i, dim in enumerate(dims) if factor in dim)
    inner = [sizes[f] for f in dims[at]]
    shape = parts[0].shape
    split = [p.reshape(*shape[:at], *inner, *shape[at + 1 :]) for p in parts]
    whole = np.concatenate(split, axis=at + dims[at].index(factor))
    return whole.reshape(*shape[:at], -1, *shape[at + 1 :])


def divisors(n: int) -> list[int]:
    return [k for k in range(2, n + 1) if n % k == 0]


def evaluate_pieces(
    op: Op, args: Sequence[np.ndarray], factor: int, pieces: int, localised: bool = True
) -> tuple[list[int], list[tuple[np.ndarray, ...]]]:
    """(local factor sizes, results per piece): the op on shards along one factor.

    `localised`: the op's rule is given the local sizes, as lowering does.
    """
    sizes = [f.size for f in op.rule.factors]
    width = sizes[factor] // pieces
    name = op.rule.factors[factor].name
    local = [width if i == factor else n for i, n in enumerate(sizes)]
    factors = tuple(replace(f, size=n) for f, n in zip(op.rule.factors, local, strict=True))
    local_op = replace(op, rule=replace(op.rule, factors=factors)) if localised else op
    results = []
    for i in range(pieces):
        piece = slice(i * width, (i + 1) * width)
        shards = [
            cut(a, d, sizes, factor, piece) for a, d in zip(args, op.rule.ins, strict=True)
        ]
        results.append(kernels.evaluate(local_op, shards, {name: i * width}))
    return local, results


def check_split(
    op: Op, args: Sequence[np.ndarray], factor: int, pieces: int, localised: bool = True
) -> None:
    """The law of factors: pieces of a parallel one concatenate, of a reduce one combine."""
    whole = kernels.evaluate(op, args, {})
    local, results = evaluate_pieces(op, args, factor, pieces, localised)
    kind = op.rule.factors[factor].kind
    for k, expected in enumerate(whole):
        parts = [r[k] for r in results]
        if kind == "parallel":
            found = join(parts, op.rule.outs[k], local, factor)
        else:
            found = np.maximum.reduce(parts) if op.rule.combiner == "max" else sum(parts)
        assert found.shape == expected.shape
        np.testing.assert_allclose(
            found, expected, rtol=1e-9, atol=1e-9, err_msg=f"{op.name} {op.rule.factors[factor]}"
        )


def check_linear(op: Op, args: Sequence[np.ndarray], group: Sequence[int], seed: int = 0) -> None:
    """The law of linear groups: partial sums of the operands give partial sums of the result."""
    rng = np.random.default_rng(seed)
    first = [rng.normal(size=a.shape) if i in group else a for i, a in enumerate(args)]
    second = [a - f if i in group else a for i, (a, f) in enumerate(zip(args, first, strict=True))]
    whole, one, two = (kernels.evaluate(op, v, {}) for v in (args, first, second))
    for k, expected in enumerate(whole):
        np.testing.assert_allclose(one[k] + two[k], expected, rtol=1e-8, atol=1e-8, err_msg=op.name)


def check_rule(op: Op, args: Sequence[np.ndarray]) -> None:
    """The rule describes the arrays, and every factor it calls splittable is."""
    sizes = [f.size for f in op.rule.factors]
    for array, dims in zip(args, op.rule.ins, strict=True):
        assert array.shape == tuple(prod(sizes[f] for f in dim) for dim in dims), op.name
    for result, dims in zip(kernels.evaluate(op, args, {}), op.rule.outs, strict=True):
        assert result.shape == tuple(prod(sizes[f] for f in dim) for dim in dims), op.name
    for i, factor in enumerate(op.rule.factors):
        if factor.kind in ("parallel", "reduce"):
            for pieces in divisors(factor.size):
                check_split(op, args, i, pieces)
    for group in op.rule.linear:
        check_linear(op, args, group)
