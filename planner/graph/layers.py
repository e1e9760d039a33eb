"""Composite layers written with the builder's primitives: norms, softmax, attention, losses.

Nothing here knows sharding: what a layer may do on a mesh follows from its primitives' rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from planner.graph import expr as ex
from planner.graph.builder import Builder, GraphError, distinct
from planner.graph.structural import reshape

NORM_EPSILON = 1e-6  # the usual default of T5- and Llama-style norms
MASKED = -1e30  # large enough to vanish in exp(), finite in bf16


def layer_norm(
    b: Builder, value: str, scale: str, bias: str | None = None, name: str = "ln"
) -> str:
    """(x − mean) · rsqrt(var + ε) · scale [+ bias] over the last dimension."""
    t = b.lookup(value)
    last, n = t.dims[-1], t.shape[-1]
    lead = t.dims[:-1]
    total = b.map(f"{name}.sum", [(value, t.dims)], lead, ex.x(0), dtype="f32")
    squares = b.map(f"{name}.sumsq", [(value, t.dims)], lead, ex.square(ex.x(0)), dtype="f32")
    mean = ex.div(ex.x(1), ex.c(n))
    var = ex.sub(ex.div(ex.x(2), ex.c(n)), ex.square(mean))
    unit = ex.mul(ex.sub(ex.x(0), mean), ex.call("rsqrt", ex.add(var, ex.c(NORM_EPSILON))))
    out = ex.mul(unit, ex.x(3))
    operands = [(value, t.dims), (total, lead), (squares, lead), (b.use(scale), (last,))]
    if bias is not None:
        out = ex.add(out, ex.x(4))
        operands.append((b.use(bias), (last,)))
    return b.map(name, operands, t.dims, out)


def rms_norm(b: Builder, value: str, scale: str, name: str = "norm") -> str:
    """x · rsqrt(mean(x²) + ε) · scale over the last dimension (Zhang & Sennrich 2019)."""
    t = b.lookup(value)
    last, n = t.dims[-1], t.shape[-1]
    lead = t.dims[:-1]
    squares = b.map(f"{name}.sumsq", [(value, t.dims)], lead, ex.square(ex.x(0)), dtype="f32")
    mean = ex.add(ex.div(ex.x(1), ex.c(n)), ex.c(NORM_EPSILON))
    out = ex.mul(ex.mul(ex.x(0), ex.call("rsqrt", mean)), ex.x(2))
    operands = [(value, t.dims), (squares, lead), (b.use(scale), (last,))]
    return b.map(name, operands, t.dims, out)


def group_norm(
    b: Builder, value: str, scale: str, bias: str | None, groups: int, name: str = "gn"
) -> str:
    """Normalises every example over its spatial dimensions and groups of channels (Wu & He 2018).

    value: [B, spatial…, C]; scale, bias: [C].
    """
    t = b.lookup(value)
    channels = t.shape[-1]
    if groups < 1 or channels % groups:
        raise GraphError(f"{name}: {channels} channels do not divide into {groups} groups")
    labels = distinct((*t.dims[:-1], "groups", t.dims[-1]))
    split = (groups, channels // groups)
    grouped = reshape(b, value, (*t.shape[:-1], *split), labels, f"{name}.grouped")
    affine = [
        reshape(b, p, split, labels[-2:], f"{name}.{what}")
        for p, what in ((scale, "scale"), (bias, "bias"))
        if p is not None
    ]
    unit = _standardised(b, grouped, (labels[0], labels[-2]), affine, labels[-2:], name)
    return reshape(b, unit, t.shape, t.dims, f"{name}.merged")


def batch_norm(
    b: Builder, value: str, scale: str, bias: str | None, name: str = "bn"
) -> str:
    """Normalises every channel (last dimension) over all examples and positions of the batch.

    Training mode (Ioffe & Szegedy 2015); running averages are not kept: they cost nothing next
    to the activations. value: [B, spatial…, C]; scale, bias: [C].
    """
    labels = b.lookup(value).dims
    affine = [b.use(p) for p in (scale, bias) if p is not None]
    return _standardised(b, value, labels[-1:], affine, labels[-1:], name)


def _standardised(
    b: Builder, value: str, kept: Sequence[str], affine: Sequence[str], along: Sequence[str],
    name: str,
) -> str:  # fmt: skip
    """(x − mean) · rsqrt(var + ε) [· scale [+ bias]], statistics over all dimensions not `kept`."""
    t = b.lookup(value)
    n = prod(size for size, d in zip(t.shape, t.dims, strict=True) if d not in kept)
    pairs = [(value, t.dims)]
    total = b.map(f"{name}.sum", pairs, kept, ex.x(0), dtype="f32")
    squares = b.map(f"{name}.sumsq", pairs, kept, ex.square(ex.x(0)), dtype="f32")
    mean = ex.div(ex.x(1), ex.c(n))
    var = ex.sub(ex.div(ex.x(2), ex.c(n)), ex.square(mean))
    out = ex.mul(ex.sub(ex.x(0), mean), ex.call("rsqrt", ex.add(var, ex.c(NORM_EPSILON))))
    for i, combine in zip(range(len(affine)), (ex.mul, ex.add), strict=False):
        out = combine(out, ex.x(3 + i))
    operands = [*pairs, (total, kept), (squares, kept), *((p, along) for p in affine)]
    return b.map(name, operands, t.dims, out)


def softmax(
    b: Builder, value: str, over: str, name: str = "softmax",
    causal: tuple[str, str] | None = None, dtype: str | None = None,
) -> str:  # fmt: skip
    """softmax over dimension `over`; `causal=(query, key)` masks keys after the query."""
    t = b.lookup(value)
    if over not in t.dims:
        raise GraphError(f"{name}: '{over}' is not a dimension of '{value}' {list(t.dims)}")
    lead = tuple(d for d in t.dims if d != over)
    logit = ex.x(0)
    if causal is not None:
        seen = ex.call("ge", ex.index(causal[0]), ex.index(causal[1]))
        logit = ex.call("where", seen, logit, ex.c(MASKED))
    top = b.map(
        f"{name}.max", [(value, t.dims)], lead, logit, dtype="f32", combiner="max",
        attrs={"stop": True},
    )  # fmt: skip
    power = ex.call("exp", ex.sub(logit, ex.x(1)))
    total = b.map(
        f"{name}.sum", [(value, t.dims), (top, lead)], lead, power, dtype="f32",
        attrs={"stop": True},
    )  # fmt: skip
    return b.map(
        name, [(value, t.dims), (top, lead), (total, lead)], t.dims, ex.div(power, ex.x(2)),
        dtype=dtype, attrs={"vjp": "softmax", "over": over},
    )  # fmt: skip


def attention(
    b: Builder, q: str, k: str, v: str, *, causal: bool, name: str = "attn",
    grouped: bool = False, placed: tuple[str, str] | None = None,
) -> str:  # fmt: skip
    """softmax(q·kᵀ/√d)·v. q: [B,S,N,H] (grouped: [B,S,K,G,H]); k, v: [B,T,N|K,H].

    Without a dimension of heads, [B,T,H], all heads of q share k and v. `placed`: another part
    of queries and keys, [B,S,N,R] and [B,T,R], that values lack.
    """
    head = b.lookup(q).shape[-1] + (b.lookup(placed[0]).shape[-1] if placed else 0)
    heads = "K G" if grouped else "N"
    keys = "" if len(b.lookup(k).shape) == 3 else "K" if grouped else "N"
    qd, kd, vd = f"B S {heads} H", f"B T {keys} H", f"B T {keys} H"
    scale = ex.c(head**-0.5)
    labels = qd.split()
    scores = b.map(
        f"{name}.scores", [(q, labels), (k, kd.split())], ("B", *heads.split(), "S", "T"),
        ex.mul(ex.mul(ex.x(0), ex.x(1)), scale),
    )  # fmt: skip
    if placed is not None:
        part = b.map(
            f"{name}.placed", [(placed[0], "BSNR"), (placed[1], "BTR")], tuple("BNST"),
            ex.mul(ex.mul(ex.x(0), ex.x(1)), scale),
        )  # fmt: skip
        total = ex.add(ex.x(0), ex.x(1))
        scores = b.map(
            f"{name}.all_scores", [(scores, "BNST"), (part, "BNST")], tuple("BNST"), total,
            attrs={"epilogue": True},
        )  # fmt: skip
    p = softmax(b, scores, "T", f"{name}.probs", ("S", "T") if causal else None)
    return b.einsum(f"B {heads} S T, {vd} -> {qd}", p, v, name=f"{name}.mix")


@dataclass(frozen=True)
class Remembered:
    """Keys or values: `old` [B, T, …] of earlier steps, `own` [B, S, …] of the one token (S = 1)
    that this step adds. Without a dimension of heads, all heads of queries share them."""

    old: str
    own: str


def attention_to_cache(
    b: Builder, parts: Sequence[tuple[str, Remembered]], values: Remembered, filled: str, *,
    scale: float, name: str = "attn",
) -> str:  # fmt: skip
    """softmax(scale · Σ q·kᵀ)·v for one new token, over a cache and the token itself.

    `parts`: queries [B,S,heads…,X] and their keys. Of the cache the first `filled` [B] slots
    count. The softmax over both is taken without writing the new keys into the cache first:
    that would move all of it.
    """
    first = b.lookup(parts[0][0]).dims
    heads = first[2:-1]
    lead = ("B", *heads, "S")
    old = _scores(b, [(q, k.old) for q, k in parts], (*lead, "T"), scale, f"{name}.scores")
    own = _scores(b, [(q, k.own) for q, k in parts], lead, scale, f"{name}.own_scores")
    slots, all_slots = [(old, (*lead, "T")), (filled, ("B",))], (*lead, "T")
    seen = ex.call("where", ex.call("gt", ex.x(1), ex.index("T")), ex.x(0), ex.c(MASKED))
    top = b.map(f"{name}.max", slots, lead, seen, dtype="f32", combiner="max")
    largest = ex.call("max", ex.x(2), ex.x(3))
    power = ex.call("exp", ex.sub(seen, largest))
    known = [*slots, (top, lead), (own, lead)]
    total = b.map(f"{name}.sum", known, lead, power, dtype="f32")
    own_power = ex.call("exp", ex.sub(ex.x(3), largest))
    probs = b.map(
        f"{name}.probs", [*known, (total, lead)], all_slots,
        ex.div(power, ex.add(ex.x(4), own_power)),
    )  # fmt: skip
    v = b.lookup(values.old).dims
    out = (*first[:-1], v[-1])
    mixed = b.map(
        f"{name}.mix", [(probs, all_slots), (values.old, v)], out, ex.mul(ex.x(0), ex.x(1))
    )
    largest = ex.call("max", ex.x(1), ex.x(2))
    own_power = ex.call("exp", ex.sub(ex.x(2), largest))
    share = ex.div(own_power, ex.add(ex.x(3), own_power))
    operands = [
        (mixed, out), (top, lead), (own, lead), (total, lead),
        (values.own, b.lookup(values.own).dims),
    ]  # fmt: skip
    return b.map(f"{name}.all", operands, out, ex.add(ex.x(0), ex.mul(share, ex.x(4))))


def _scores(
    b: Builder, parts: Sequence[tuple[str, str]], out: Sequence[str], scale: float, name: str
) -> str:
    """The scaled products of queries and keys, added up over the parts."""
    value = ex.mul(ex.mul(ex.x(0), ex.x(1)), ex.c(scale))
    found = [
        b.map(
            f"{name}.{k.dims[-1].lower()}" if len(parts) > 1 else name,
            [(q, b.lookup(q).dims), (k.name, k.dims)], out, value,
        )
        for q, k in ((q, b.lookup(k)) for q, k in parts)
    ]  # fmt: skip
    total = found[0]
    for part in found[1:]:
        total = b.map(
            name, [(total, out), (part, out)], out, ex.add(ex.x(0), ex.x(1)),
            attrs={"epilogue": True},
        )  # fmt: skip
    return total


def appended(b: Builder, cache: str, new: str, slots: str, name: str) -> str:
    """`cache` […, B, T, …] with `new` […, B, …] written in slot `slots` [B] of every sequence."""
    t = b.lookup(cache)
    value = ex.call("where", ex.call("eq", ex.x(2), ex.index("T")), ex.x(1), ex.x(0))
    return b.map(
        name, [(cache, t.dims), (new, b.lookup(new).dims), (slots, ("B",))], t.dims, value,
        dtype=t.dtype, attrs={"onehot": "put"}, roles=[t.role],
    )  # fmt: skip


def embedding(b: Builder, table: str, ids: str, out: Sequence[str], name: str = "embed") -> str:
    """table[ids]: [V, D] and integer ids [...] → [..., D]; a one-hot product over V."""
    used = b.use(table)
    rows, _ = b.lookup(used).dims
    where = tuple(out[:-1])
    value = ex.mul(ex.call("eq", ex.x(1), ex.index(rows)), ex.x(0))
    return b.map(
        name, [(used, (rows, out[-1])), (ids, where)], tuple(out), value,
        attrs={"onehot": "take", "along": rows},
    )  # fmt: skip


def chosen_round(
    b: Builder, stacks: str, tick: str, stage: str, turns: int, name: str
) -> str:
    """Every stage's parameters in a tick of a circular pipeline: `stacks` [R, layers, stages, …]
    → [layers, stages, …]. Stage s is in round ⌊(tick − s) / turns⌋, or waits before the first or
    after the last."""
    t = b.lookup(stacks)
    rounds, *rest = t.dims
    count = ex.c(t.shape[0] - 1)
    begun = ex.whole_part(ex.sub(ex.x(1), ex.index(stage)), turns)
    now = ex.call("min", ex.call("max", begun, ex.c(0)), count)
    value = ex.mul(ex.call("eq", now, ex.index(rounds)), ex.x(0))
    return b.map(
        name, [(stacks, t.dims), (tick, ())], rest, value, dtype=t.dtype, roles=["parameter"],
        attrs={"onehot": "choose", "along": rounds, "turns": turns},
    )  # fmt: skip


def cross_entropy(b: Builder, logits: str, targets: str, name: str = "loss") -> str:
    """Mean over positions of logsumexp(logits) − logits[target]; the last dimension is V."""
    t = b.lookup(logits)
    lead, classes = t.dims[:-1], t.dims[-1]
    positions = 1
    for size in t.shape[:-1]:
        positions *= size
    top = b.map(
        f"{name}.max", [(logits, t.dims)], lead, ex.x(0), dtype="f32", combiner="max",
        attrs={"stop": True},
    )  # fmt: skip
    total = b.map(
        f"{name}.sumexp", [(logits, t.dims), (top, lead)], lead,
        ex.call("exp", ex.sub(ex.x(0), ex.x(1))), dtype="f32",
    )  # fmt: skip
    picked = b.map(
        f"{name}.picked", [(logits, t.dims), (targets, lead)], lead,
        ex.mul(ex.call("eq", ex.x(1), ex.index(classes)), ex.x(0)), dtype="f32",
    )  # fmt: skip
    value = ex.sub(ex.add(ex.call("log", ex.x(0)), ex.x(1)), ex.x(2))
    scaled = ex.div(value, ex.c(positions))
    return b.map(
        name, [(total, lead), (top, lead), (picked, lead)], (), scaled, dtype="f32"
    )
