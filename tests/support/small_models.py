"""Models small enough to run on virtual devices, together with every kind of op and loop.

All sizes are products of twos, so that every dimension can be split over eight devices or over
parts of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

from planner.architectures import build
from planner.architectures.settings import MoEDecoder
from planner.graph import expr as ex
from planner.graph import layers, optimizers, structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.model import Model, Training


def decoder(
    batch: int = 4, grouped: bool = False, positions: int = 4, vocabulary: int = 8,
    width: int = 8, hidden: int = 16, heads: int = 4, head: int = 2, layers_: int = 2,
    **training: Any,
) -> Model:  # fmt: skip
    """Pre-norm layers in a loop with tied embeddings; `grouped` shares keys between heads."""
    micro = batch // training.get("accumulation_steps", 1)
    b = Builder()
    ids = b.input("ids", (micro, positions), ("B", "S"), "i32")
    targets = b.input("targets", (micro, positions), ("B", "S"), "i32")
    table = b.param("table", (vocabulary, width), ("V", "D"))
    bias = b.param("bias", (width,), ("D",))  # read by every iteration: gradients add up
    x = layers.embedding(b, table, ids, ("B", "S", "D"), name="x")
    r = b.repeat("layers", layers_)
    entry = r.enter(x)
    h = layers.layer_norm(r, entry, r.param("scale", (width,), ("D",)), bias)
    split = (heads // 2, 2) if grouped else (heads,)
    names = ("K", "G") if grouped else ("N",)
    text = " ".join(names)
    wq = r.param("wq", (width, *split, head), ("D", *names, "H"))
    wk, wv = (r.param(n, (width, split[0], head), ("D", names[0], "H")) for n in ("wk", "wv"))
    wo = r.param("wo", (*split, head, width), (*names, "H", "D"))
    q = r.einsum(f"B S D, D {text} H -> B S {text} H", h, wq, name="q")
    k = r.einsum(f"B T D, D {names[0]} H -> B T {names[0]} H", h, wk, name="k")
    v = r.einsum(f"B T D, D {names[0]} H -> B T {names[0]} H", h, wv, name="v")
    mixed = layers.attention(r, q, k, v, causal=True, grouped=grouped)
    o = r.einsum(f"B S {text} H, {text} H D -> B S D", mixed, wo, name="o")
    middle = r.pointwise("middle", ex.add(ex.x(0), ex.x(1)), entry, o)
    w1 = r.param("w1", (width, hidden), ("D", "F"))
    w2 = r.param("w2", (hidden, width), ("F", "D"))
    act = r.pointwise("act", ("gelu", ex.x(0)), r.einsum("BSD,DF->BSF", middle, w1, name="h"))
    y = r.einsum("BSF,FD->BSD", act, w2, name="y")
    out = r.pointwise("out", ex.add(ex.x(0), ex.x(1)), middle, y)
    (x,) = r.end_repeat([(x, entry, out)])
    loss = layers.cross_entropy(b, b.einsum("BSD,VD->BSV", x, table, name="logits"), targets)
    return Model("decoder", b.graph([loss]), Training(batch, **training), batch * positions)


def encoder_decoder(batch: int = 4, **training: Any) -> Model:
    """Two stacks: every layer of the second also reads what the first has made."""
    width, both = 8, ("B", "D")
    b = Builder()
    table = b.param("table", (8, width), ("V", "D"))
    source, aim = (b.input(n, (batch,), ("B",), "i32") for n in ("source", "aim"))
    value = ("tanh", ex.add(ex.x(0), ex.x(1)))
    results = []
    for name, ids in (("encoder", source), ("decoder", aim)):
        x = layers.embedding(b, table, ids, both, name=f"{name}_x")
        r = b.repeat(name, 2)
        entry = r.enter(x)
        w = r.param("w", (width, width), ("D", "E"))
        h = r.einsum("B D, D E -> B E", entry, w, name="h")
        h = r.map("out", [(h, both), (entry, both)], both, value)
        for memory in results:
            h = r.map("mixed", [(h, both), (memory, both)], both, value)
        results += r.end_repeat([(x, entry, h)])
    loss = weighted_sum(b, b.pointwise("both", ex.mul(ex.x(0), ex.x(1)), *results))
    return Model("encoder-decoder", b.graph([loss]), Training(batch, **training), batch)


def experts(batch: int = 4, **training: Any) -> Model:
    """Layers with experts, top-2 of 4, in which capacity is short."""
    settings = MoEDecoder(
        d_model=4, d_ff=8, heads=2, head_dim=2, vocab=8, sequence=4, layers=4, moe_every=2,
        experts=4, top_k=2, capacity_factor=1.0,
    )  # fmt: skip
    how = Training(batch, **{"optimizer": "sgd", **training})
    return Model("experts", build(settings, batch, how), how, batch * 4)


def weighted_sum(b: Builder, x: str) -> str:
    """A scalar loss in which every entry of x counts differently."""
    dims = b.lookup(x).dims
    weight = ex.c(1.0)
    for i, d in enumerate(dims):
        weight = ex.add(weight, ex.mul(ex.c(0.3 / (i + 1)), ex.index(d)))
    value = ex.mul(("tanh", ex.mul(ex.c(0.5), ex.x(0))), weight)
    return b.map("loss", [(x, dims)], (), value, dtype="f32")


def conv_net(b: Builder, batch: int = 4, height: int = 8, width: int = 8) -> str:
    """All kinds of convolutions, pooling, norms, a loop of blocks; what one slot holds moves."""
    x = b.input("image", (batch, height, width, 4), ("B", "H", "W", "C"), "f32")
    stem = b.param("stem", (3, 3, 4, 8), ("kh", "kw", "I", "C"))
    h = windows.conv(b, x, stem, stride=2)
    r = b.repeat("blocks", 2)
    entry = r.enter(h)
    w = r.param("w", (3, 3, 8, 8), ("kh", "kw", "I", "C"))
    scale, bias = r.param("scale", (8,), ("C",)), r.param("bias", (8,), ("C",))
    y = layers.group_norm(r, windows.conv(r, entry, w, dilation=2), scale, bias, 2)
    out = r.pointwise("out", ex.add(ex.x(0), ex.silu(ex.x(1))), entry, y)
    (h,) = r.end_repeat([(h, entry, out)])
    grouped = b.param("grouped", (2, 2, 2, 8), ("kh", "kw", "I", "C"))
    g = windows.conv(b, h, grouped, groups=4)
    pooled = windows.max_pool(b, g, window=2)
    back = b.param("back", (2, 2, 8, 4), ("kh", "kw", "I", "O"))
    up = windows.conv_transpose(b, pooled, back, stride=2)
    bn = layers.batch_norm(b, up, b.param("bn", (4,), ("O",)), None)
    smooth = windows.upsample(b, windows.avg_pool(b, bn, window=2), factor=2)
    slots = [b.map(name, [], (), ex.c(n), dtype="i32") for name, n in (("taken", 0), ("left", 1))]
    row, rest = structural.pop(b, smooth, slots[0])
    swapped = structural.put(b, rest, row, slots[1])
    return weighted_sum(b, windows.global_avg_pool(b, swapped))


def rearranged(b: Builder, batch: int = 4, width: int = 4) -> str:
    """Reshape, concat, slice, pad, sort, cumsum, transpose; a maximum read by a linear op."""
    x = b.param("x", (batch, 8, width), ("B", "S", "D"))
    y = b.param("y", (batch, 8, width), ("B", "S", "D"))
    split = structural.reshape(b, x, (batch, 2, 4, width), ("B", "N", "P", "D"))
    merged = structural.reshape(b, split, (2 * batch, 4 * width), ("BN", "PD"))
    back = structural.reshape(b, merged, (batch, 8, width), ("B", "S", "D"))
    moved = windows.shift(b, back, "S", -1)
    turned = windows.shift(b, windows.shift(b, moved, "S", 2, wrap=True), "D", -1, wrap=True)
    joined = structural.concat(b, [windows.shift(b, turned, "B", 2), y], "D")
    ordered, _ = structural.sort(b, joined, "S")
    running = structural.cumsum(b, ordered, "S", reverse=True)
    part = structural.slice_dim(b, running, "S", 0, 8, 2, label="Q")
    wide = structural.pad(b, part, "Q", 2, 2, label="R")
    swapped = structural.transpose(b, wide, ("D", "B", "R"))
    best, _ = structural.top_k(b, swapped, 4, "R")
    dims = b.lookup(best).dims
    top = b.map("top", [(best, dims)], dims[:2], ex.x(0), combiner="max")
    twice = b.map("twice", [(top, dims[:2])], dims[:2], ex.mul(ex.c(2.0), ex.x(0)))
    scale = b.param("scale", (2 * width, batch), dims[:2])
    both = [(twice, dims[:2]), (scale, dims[:2])]
    return weighted_sum(b, b.map("scaled", both, dims[:2], ex.mul(ex.x(0), ex.x(1))))


def nested_loops(b: Builder) -> str:
    """A loop in a loop, with activations of both outer scopes read by the inner one."""
    both = ("B", "D")
    memory = b.pointwise("memory", ("tanh", ex.x(0)), b.param("enc", (4, 8), both))
    x = b.param("x0", (4, 8), both)
    r = b.repeat("outer", 2)
    entry = r.enter(x)
    h = r.einsum("B D, D E -> B E", entry, r.param("w", (8, 8), ("D", "E")), name="h")
    h = r.map("h2", [(h, both), (memory, both)], both, ("tanh", ex.mul(ex.x(0), ex.x(1))))
    s = r.repeat("inner", 3)
    inner = s.enter(h)
    g = s.einsum("B D, D E -> B E", inner, s.param("v", (8, 8), ("D", "E")), name="g")
    value = ex.add(("tanh", ex.x(0)), ex.mul(ex.x(1), ex.x(2)))
    out = s.map("g2", [(g, both), (memory, both), (h, both)], both, value)
    (h,) = s.end_repeat([(h, inner, out)])
    (x,) = r.end_repeat([(x, entry, r.pointwise("sum", ex.add(ex.x(0), ex.x(1)), h, entry))])
    return weighted_sum(b, x)


def loop_first(b: Builder) -> str:
    """A body that starts and ends with a loop: nothing but loops can hand its values on."""
    both = ("B", "D")
    x = b.param("x0", (4, 8), both)
    r = b.repeat("outer", 2)
    entry = r.enter(x)
    s = r.repeat("inner", 2)
    inner = s.enter(entry)
    w = s.use(s.param("v", (8,), ("D",)))
    value = ("tanh", ex.add(ex.mul(ex.x(0), ex.x(1)), ex.x(2)))
    out = s.map("g", [(inner, both), (w, ("D",)), (entry, both)], both, value)
    (h,) = s.end_repeat([(entry, inner, out)])
    (x,) = r.end_repeat([(x, entry, h)])
    return weighted_sum(b, x)


def shared_by_two_loops(b: Builder) -> str:
    """Values that two loops read whole, values handed through unchanged, and a swap of two."""
    both = ("B", "D")
    bias, x = b.param("bias", (8,), ("D",)), b.param("x0", (4, 8), both)
    y = b.param("y0", (4, 8), both)
    m = b.pointwise("m", ("tanh", ex.x(0)), bias)
    for name in ("first", "second"):
        r = b.repeat(name, 2)
        entry, other = r.enter(x), r.enter(y)
        value = ("tanh", ex.add(ex.mul(ex.x(0), ex.x(1)), ex.mul(ex.x(2), ex.x(3))))
        operands = [(entry, both), (r.use(bias), ("D",)), (m, ("D",)), (other, both)]
        out = r.map("out", operands, both, value)
        swapped = (out, other) if name == "first" else (other, out)
        x, y = r.end_repeat([(x, entry, swapped[0]), (y, other, swapped[1])])
    return weighted_sum(b, b.pointwise("product", ex.mul(ex.x(0), ex.x(1)), x, y))


def swapped_carries(b: Builder) -> str:
    """Two values that trade places in every iteration: an exit that is another's entry."""
    both = ("B", "D")
    x, y = b.param("x0", (4, 8), both), b.param("y0", (4, 8), both)
    r = b.repeat("loop", 3)
    a, c = r.enter(x), r.enter(y)
    w = r.use(r.param("w", (8,), ("D",)))
    value = ("tanh", ex.add(ex.mul(ex.x(0), ex.x(2)), ex.x(1)))
    out = r.map("out", [(a, both), (c, both), (w, ("D",))], both, value)
    x, y = r.end_repeat([(x, a, out), (y, c, a)])
    return weighted_sum(b, b.pointwise("product", ex.mul(ex.x(0), ex.x(1)), x, y))


def built(build: Callable[[Builder], str], **training: Any) -> Model:
    b = Builder()
    loss = build(b)
    return Model("case", b.graph([loss]), Training(4, **training), 4)


def step_of(build: Callable[[Builder], str], **training: Any) -> Graph:
    return training_step(built(build, **training))


def factored() -> Graph:
    """Adafactor's second moments as rows and columns, which real sizes have."""
    with patch.object(optimizers, "FACTORED_MIN", 4):
        return training_step(decoder(remat="full", optimizer="adafactor"))


ODD = {"positions": 5, "vocabulary": 11, "width": 7, "hidden": 14, "heads": 3, "head": 3}


def odd_steps() -> dict[str, Callable[[], Graph]]:
    """Training steps most of whose sizes no number of devices divides, with every kind of op."""
    net = partial(conv_net, batch=3, height=10, width=14)
    return {
        "decoder": lambda: training_step(
            decoder(batch=6, remat="full", optimizer="adamw", **ODD)
        ),
        "decoder accumulation": lambda: training_step(
            decoder(batch=12, remat="dots", optimizer="adafactor", accumulation_steps=2, **ODD)
        ),
        "experts": lambda: training_step(experts(batch=6)),
        "conv net": lambda: step_of(net, remat="full", optimizer="momentum"),
        "rearranged": lambda: step_of(partial(rearranged, batch=6, width=5), optimizer="sgd"),
    }


def steps() -> dict[str, Callable[[], Graph]]:
    """Training steps that together hold every kind of op, loop, remat policy and optimizer."""
    found: dict[str, Callable[[], Graph]] = {
        "decoder none adamw": lambda: training_step(decoder(remat="none", optimizer="adamw")),
        "decoder full adafactor": factored,
        "decoder dots momentum": lambda: training_step(
            decoder(remat="dots", optimizer="momentum")
        ),
        "decoder attention sgd": lambda: training_step(
            decoder(remat="attention", optimizer="sgd")
        ),
        "decoder accumulation": lambda: training_step(
            decoder(batch=8, remat="full", optimizer="adamw", accumulation_steps=2)
        ),
        "decoder grouped": lambda: training_step(decoder(grouped=True, optimizer="sgd")),
        "conv net": lambda: step_of(conv_net, remat="full", optimizer="momentum"),
        "rearranged": lambda: step_of(rearranged, optimizer="sgd"),
    }
    for loops in (nested_loops, loop_first, shared_by_two_loops, swapped_carries):
        for remat in ("none", "full"):
            found[f"{loops.__name__} {remat}"] = (
                lambda loops=loops, remat=remat: step_of(loops, remat=remat, optimizer="adam")
            )
    return found
