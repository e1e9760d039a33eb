"""Parts of a transformer layer with their parameters: norms, attention, feed-forward.

Every function declares parameters under short standard names (wq, w_in, ln1 …) after `prefix`
and returns the name of its result. Whole models belong to the other modules.

Dimensions: B batch, S positions, T positions of keys, D model, N heads, H head size, K heads
of keys and values, G query heads per key head, F feed-forward, V vocabulary; of latent attention
L latent vector of keys and values, Q of queries, R part of a head that carries positions.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.architectures.caching import Cache
from planner.architectures.settings import Activation, Norm, TransformerBlock
from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import Builder
from planner.graph.ring import ring_attention
from planner.graph.structural import reshape

TOKENS = ("B", "S", "D")


def activated(kind: Activation, value: ex.Expr) -> ex.Expr:
    """The activation function `kind` of a scalar expression."""
    if kind == "silu":
        return ex.silu(value)
    if kind == "gelu":
        return ex.call("gelu", value)
    return ex.relu(value) if kind == "relu" else ex.square(ex.relu(value))


def normed(b: Builder, x: str, kind: Norm, biases: bool, name: str) -> str:
    """Norm over the last dimension, with a scale called `name` and a bias called `name`_bias."""
    t = b.lookup(x)
    last, width = (t.dims[-1],), (t.shape[-1],)
    scale = b.param(name, width, last)
    if kind == "rms":
        return layers.rms_norm(b, x, scale, f"{name}.out")
    bias = b.param(f"{name}_bias", width, last) if biases else None
    return layers.layer_norm(b, x, scale, bias, f"{name}.out")


def added(b: Builder, name: str, *values: str) -> str:
    """The sum of tensors, the first of which has all dimensions; biases broadcast."""
    total = ex.x(0)
    for i in range(1, len(values)):
        total = ex.add(total, ex.x(i))
    return b.pointwise(name, total, *values)


def declared(b: Builder, name: str, dims: str, s: TransformerBlock) -> str:
    """A new parameter whose sizes follow from the names of its dimensions.

    With grouped queries the heads N of a parameter are split into K × G on use: a view of the
    weights, which leaves the activations alone.
    """
    sizes = {
        "D": s.d_model, "C": s.d_model, "F": s.ff_size, "H": s.head_size,
        "N": s.n_heads, "K": s.n_kv_heads, "G": s.n_heads // s.n_kv_heads,
        "L": s.kv_rank or 0, "Q": s.q_rank or s.d_model, "R": s.rope_dim or 0,
    }  # fmt: skip
    own = dims.split()
    param = b.param(name, [sizes[d] for d in own], own)
    if "N" not in own or not s.grouped:
        return param
    split = dims.replace("N", "K G").split()
    return reshape(b, param, [sizes[d] for d in split], split, f"{name}.grouped")


def projected(b: Builder, spec: str, x: str, w: str, name: str, bias: str | None = None) -> str:
    """einsum(spec, x, w), plus the bias if there is one."""
    y = b.einsum(spec, x, w, name=name)
    return y if bias is None else added(b, f"{name}.biased", y, bias)


def attended(
    b: Builder, x: str, memory: str, s: TransformerBlock, causal: bool, prefix: str = "",
    cache: Cache | None = None,
) -> str:  # fmt: skip
    """Multi-head attention of x [B, S, D] to memory [B, T, D]: itself, or an encoder's result.

    With a `cache` that decodes, x is one new token and attends to the cache and itself.
    """
    if s.kv_rank is not None:
        return _latently_attended(b, x, memory, s, causal, prefix, cache)
    queries = "K G" if s.grouped else "N"
    keys = "" if s.n_kv_heads == 1 else "K" if s.grouped else "N"

    def biased(name: str, dims: str) -> str | None:
        return declared(b, f"{prefix}{name}", dims, s) if s.biases else None

    def from_model(name: str, source: str, at: str, stored: str, used: str) -> str:
        w = declared(b, f"{prefix}w{name}", f"D {stored} H", s)
        spec = f"B {at} D, D {used} H -> B {at} {used} H"
        bias = biased(f"b{name}", f"{stored} H")
        y = projected(b, spec, source, w, f"{prefix}{name}", bias)
        if name == "v" or not s.qk_norm:
            return y
        return normed(b, y, s.norm, s.biases, f"{prefix}{name}_norm")

    q = from_model("q", x, "S", "N", queries)
    name = f"{prefix}attn"
    at = "S" if cache and cache.decodes else "T"
    k, v = (from_model(n, memory, at, keys, keys) for n in "kv")
    if cache and cache.decodes:
        old_k, old_v = cache.recall(b, f"{prefix}k", k), cache.recall(b, f"{prefix}v", v)
        scale = s.head_size**-0.5
        mixed = layers.attention_to_cache(
            b, [(q, old_k)], old_v, cache.filled, scale=scale, name=name
        )
    else:
        if cache:
            cache.fill(b, f"{prefix}k", k)
            cache.fill(b, f"{prefix}v", v)
        if s.attention_blocks is None:
            mixed = layers.attention(b, q, k, v, causal=causal, name=name, grouped=s.grouped)
        else:
            mixed = ring_attention(
                b, q, k, v, s.attention_blocks, causal=causal, name=name, grouped=s.grouped
            )
    wo = declared(b, f"{prefix}wo", "N H D", s)
    spec = f"B S {queries} H, {queries} H D -> B S D"
    return projected(b, spec, mixed, wo, f"{prefix}o", biased("bo", "D"))


def _latently_attended(
    b: Builder, x: str, memory: str, s: TransformerBlock, causal: bool, prefix: str,
    cache: Cache | None,
) -> str:  # fmt: skip
    """Attention whose keys and values are made from one narrow vector per position.

    That vector is what a cache remembers. A decoding step makes neither keys nor values of it:
    queries come down to its width instead, and the mixture goes up to the heads (DeepSeek-AI
    2024, DeepSeek-V2, section 2.1.2).
    """

    def product(name: str, source: str, at: str, dims: str) -> str:
        """`source` [B, `at`, …] times a parameter w`name` of these dimensions."""
        come, *go = dims.split()
        w = declared(b, f"{prefix}w{name}", dims, s)
        spec = f"B {at} {come}, {dims} -> B {at} {' '.join(go)}"
        return b.einsum(spec, source, w, name=f"{prefix}{name}")

    def narrowed(name: str, source: str, at: str, dims: str) -> str:
        return normed(b, product(name, source, at, dims), s.norm, False, f"{prefix}{name}_ln")

    queries = x if s.q_rank is None else narrowed("q_latent", x, "S", "D Q")
    wide = "D" if s.q_rank is None else "Q"
    at = "S" if cache and cache.decodes else "T"
    latent = narrowed("kv_latent", memory, at, "D L")
    q = product("q", queries, "S", f"{wide} N H")
    placed = None
    if s.rope_dim is not None:
        placed = (
            product("q_rope", queries, "S", f"{wide} N R"), product("k_rope", memory, at, "D R"),
        )  # fmt: skip
    if cache and cache.decodes:
        mixed = _attended_to_latents(b, q, latent, placed, s, prefix, cache)
    else:
        if cache:
            cache.fill(b, f"{prefix}kv_latent", latent)
            if placed:
                cache.fill(b, f"{prefix}k_rope", placed[1])
        k, v = (product(name, latent, "T", "L N H") for name in "kv")
        mixed = layers.attention(b, q, k, v, causal=causal, name=f"{prefix}attn", placed=placed)
    wo = declared(b, f"{prefix}wo", "N H D", s)
    return b.einsum("B S N H, N H D -> B S D", mixed, wo, name=f"{prefix}o")


def _attended_to_latents(
    b: Builder, q: str, latent: str, placed: tuple[str, str] | None, s: TransformerBlock,
    prefix: str, cache: Cache,
) -> str:  # fmt: skip
    """The heads' mixtures [B, S, N, H] for one new token, whose `latent` joins the cache."""
    wk, wv = (declared(b, f"{prefix}w{name}", "L N H", s) for name in "kv")
    down = b.einsum("B S N H, L N H -> B S N L", q, wk, name=f"{prefix}q_down")
    latents = cache.recall(b, f"{prefix}kv_latent", latent)
    parts = [(down, latents)]
    if placed is not None:
        parts.append((placed[0], cache.recall(b, f"{prefix}k_rope", placed[1])))
    scale = (s.head_size + (s.rope_dim or 0)) ** -0.5
    mixed = layers.attention_to_cache(
        b, parts, latents, cache.filled, scale=scale, name=f"{prefix}attn"
    )
    return b.einsum("B S N L, L N H -> B S N H", mixed, wv, name=f"{prefix}up")


def fed_forward(b: Builder, x: str, s: TransformerBlock, prefix: str = "") -> str:
    """x·w_in → activation (times a gate) → ·w_out."""

    def through(name: str, operand: str, dims: str) -> str:
        w = declared(b, f"{prefix}w_{name}", dims, s)
        come, go = dims.split()
        bias = declared(b, f"{prefix}b_{name}", go, s) if s.biases else None
        spec = f"B S {come}, {dims} -> B S {go}"
        return projected(b, spec, operand, w, f"{prefix}{name}", bias)

    sides = [through(name, x, "D F") for name in (("gate", "in") if s.gated else ("in",))]
    value = activated(s.activation, ex.x(0))
    h = b.pointwise(f"{prefix}h", ex.mul(value, ex.x(1)) if s.gated else value, *sides)
    return through("out", h, "F D")


Feed = Callable[[Builder, str, TransformerBlock, str], str]


def layer(
    b: Builder, x: str, s: TransformerBlock, causal: bool, prefix: str = "",
    feed: Feed = fed_forward, cache: Cache | None = None,
) -> str:  # fmt: skip
    """One pre-norm transformer layer: x + attention(norm(x)), then + feed-forward(norm(·))."""
    h = normed(b, x, s.norm, s.biases, f"{prefix}ln1")
    a = attended(b, h, h, s, causal, prefix, cache)
    if s.parallel_block:
        return added(b, f"{prefix}x", x, a, feed(b, h, s, prefix))
    return with_feed(b, added(b, f"{prefix}mid", x, a), s, prefix, feed)


def cross_layer(
    b: Builder, x: str, memory: str, s: TransformerBlock, prefix: str = "",
    feed: Feed = fed_forward,
) -> str:  # fmt: skip
    """A causal layer that, between the two, also attends to an encoder's result."""
    h = normed(b, x, s.norm, s.biases, f"{prefix}ln1")
    x = added(b, f"{prefix}self", x, attended(b, h, h, s, True, prefix))
    h = normed(b, x, s.norm, s.biases, f"{prefix}cross_ln")
    x = added(b, f"{prefix}mid", x, attended(b, h, memory, s, False, f"{prefix}cross_"))
    return with_feed(b, x, s, prefix, feed)


def with_feed(b: Builder, x: str, s: TransformerBlock, prefix: str, feed: Feed) -> str:
    h = normed(b, x, s.norm, s.biases, f"{prefix}ln2")
    return added(b, f"{prefix}x", x, feed(b, h, s, prefix))
