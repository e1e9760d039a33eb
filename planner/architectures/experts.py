"""Mixture of experts with capacity: who gets a slot, and how tokens come and go.

A router scores every pair of token and expert. Within a group of tokens

    top_k           tokens take their k best experts; these hand out their slots first to all
                    first choices, in the order of the tokens, then to the second ones; who finds
                    none is dropped (Lepikhin et al. 2021, GShard; k = 1: Fedus et al. 2021)
    dropless        the same with slots for all; the busiest expert gets load_imbalance × the mean
                    and all wait for it (Gale et al. 2022, MegaBlocks)
    expert_choice   experts take the tokens that score best (Zhou et al. 2022)

Dispatch and combine are products with masks [G, S, E, C], so what they may do on a mesh follows
from an einsum's rule, and moving tokens from groups to experts is a resharding. Where nothing is
dropped they stand for gathers: rows are moved, nothing is multiplied, empty slots not computed.
Auxiliary losses that balance experts are left out: they cost next to nothing.

Dimensions: G groups, S tokens of a group, E experts, C slots of an expert and group, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.architectures.blocks import activated, added, fed_forward
from planner.architectures.settings import Experts, TransformerBlock
from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import Builder, GraphError
from planner.graph.structural import cumsum, reshape, top_k

MASK = ("G", "S", "E", "C")


def experts(b: Builder, x: str, s: TransformerBlock, prefix: str = "") -> str:
    """The feed-forward layer of x [B, S, D] by experts."""
    if not isinstance(s, Experts):
        raise GraphError(f"{prefix}experts: the settings of a '{s.kind}' name no experts")
    t = b.lookup(x)
    batch, sequence, width = t.shape
    # One token of every sequence, as in decoding, is routed together with the others.
    size = min(s.group_size or (batch if sequence == 1 else sequence), batch * sequence)
    if batch * sequence % size:
        raise GraphError(
            f"{prefix}experts: groups of {size} do not divide {batch} × {sequence} tokens"
        )
    grouped = (batch * sequence // size, size, width)
    own = size == sequence  # a sequence is a group
    tokens = x if own else reshape(b, x, grouped, ("G", "S", "D"), f"{prefix}tokens")
    y = _routed(b, tokens, s, prefix)
    y = y if own else reshape(b, y, t.shape, t.dims, f"{prefix}experts.out")
    if not s.shared_experts:
        return y
    wide = s.model_copy(update={
        "d_ff": s.shared_experts * s.expert_ff_size, "gated": s.experts_are_gated, "biases": False,
    })  # fmt: skip
    shared = fed_forward(b, x, wide, f"{prefix}shared_")
    return added(b, f"{prefix}served", y, shared)


def _routed(b: Builder, x: str, s: Experts, prefix: str) -> str:
    size = b.lookup(x).shape[1]
    slots = s.capacity(size)
    choose = _chosen_by_experts if s.routing == "expert_choice" else _chosen_by_tokens
    dispatch, combine = choose(b, x, s, slots, prefix)
    moves = {"overhead": True} if s.drops else {"picks": MASK[1:]}
    taken = b.einsum(
        "G S E C, G S D -> E G C D", dispatch, x, name=f"{prefix}dispatched", attrs=moves
    )
    useful = min(1.0, s.top_k * size / (s.experts * slots))
    out = _fed_forward(b, taken, s, prefix, {"useful": useful, "skips": not s.drops})
    return b.einsum(
        "G S E C, E G C D -> G S D", combine, out, name=f"{prefix}combined", attrs=moves
    )


def _chosen_by_tokens(
    b: Builder, x: str, s: Experts, slots: int, prefix: str
) -> tuple[str, str]:
    """Masks of dispatch and combine: 1, or the gate, where a token has that slot."""
    gates, choices = _route(b, x, s, prefix)
    places = _places(b, choices, s, prefix)
    here = ex.mul(ex.call("eq", ex.x(0), ex.index("E")), ex.call("eq", ex.x(1), ex.index("C")))
    sizes = {"E": s.experts, "C": slots}
    pairs = [(choices, ("G", "S", "K")), (places, ("G", "K", "S"))]
    dispatch = b.map(f"{prefix}dispatch", pairs, MASK, here, sizes=sizes)
    combine = b.map(
        f"{prefix}combine", [*pairs, (gates, ("G", "S", "K"))], MASK, ex.mul(here, ex.x(2)),
        sizes=sizes,
    )  # fmt: skip
    return dispatch, combine


def _chosen_by_experts(
    b: Builder, x: str, s: Experts, slots: int, prefix: str
) -> tuple[str, str]:
    """The same masks where every expert takes its `slots` best tokens."""
    likely = _scores(b, x, s, prefix)
    gates, tokens = top_k(b, likely, slots, "S", "C", f"{prefix}gates")
    here = ex.call("eq", ex.x(0), ex.index("S"))
    size = {"S": b.lookup(x).shape[1]}
    dims = ("G", "C", "E")
    dispatch = b.map(f"{prefix}dispatch", [(tokens, dims)], MASK, here, sizes=size)
    pairs = [(tokens, dims), (gates, dims)]
    combine = b.map(f"{prefix}combine", pairs, MASK, ex.mul(here, ex.x(1)), sizes=size)
    return dispatch, combine


def _scores(b: Builder, x: str, s: Experts, prefix: str) -> str:
    """How much every token [G, S, E] wants every expert."""
    router = b.param(f"{prefix}router", (s.d_model, s.experts), ("D", "E"))
    logits = b.einsum("G S D, D E -> G S E", x, router, name=f"{prefix}routing", dtype="f32")
    return layers.softmax(b, logits, "E", f"{prefix}likely", dtype="f32")


def _route(b: Builder, x: str, s: Experts, prefix: str) -> tuple[str, str]:
    """Gates and experts [G, S, K] of every token's choices; the gates of several add up to 1."""
    likely = _scores(b, x, s, prefix)
    gates, choices = top_k(b, likely, s.top_k, "E", "K", f"{prefix}gates")
    if s.top_k == 1:
        return gates, choices
    dims = ("G", "S", "K")
    total = b.map(f"{prefix}gates.sum", [(gates, dims)], dims[:2], ex.x(0), dtype="f32")
    share = ex.div(ex.x(0), ex.x(1))
    operands = [(gates, dims), (total, dims[:2])]
    return b.map(f"{prefix}shares", operands, dims, share, dtype="f32"), choices


def _places(b: Builder, choices: str, s: Experts, prefix: str) -> str:
    """[G, K, S]: how many tokens are before this one at the expert of its choice."""
    groups, size, k = b.lookup(choices).shape
    chosen = b.map(
        f"{prefix}chosen", [(choices, ("G", "S", "K"))], ("G", "K", "S", "E"),
        ex.call("eq", ex.x(0), ex.index("E")), dtype="f32", sizes={"E": s.experts},
    )  # fmt: skip
    queue = reshape(b, chosen, (groups, k * size, s.experts), ("G", "Q", "E"), f"{prefix}queue")
    before = cumsum(b, queue, "Q", exclusive=True, name=f"{prefix}before")
    dims = ("G", "K", "S", "E")
    before = reshape(b, before, (groups, k, size, s.experts), dims, f"{prefix}before.own")
    own = ex.mul(ex.x(0), ex.call("eq", ex.x(1), ex.index("E")))
    operands = [(before, dims), (choices, ("G", "S", "K"))]
    return b.map(f"{prefix}places", operands, dims[:3], own, dtype="f32")


def _fed_forward(
    b: Builder, x: str, s: Experts, prefix: str, attrs: Mapping[str, Any]
) -> str:
    """Every expert's feed-forward layer on its slots [E, G, C, D]."""
    sizes = {"E": s.experts, "D": s.d_model, "F": s.expert_ff_size}

    def through(name: str, operand: str, come: str, go: str) -> str:
        dims = ("E", come, go)
        own = f"{prefix}expert_w_{name}"
        w = b.param(own, [sizes[d] for d in dims], dims)
        spec = f"E G C {come}, E {come} {go} -> E G C {go}"
        return b.einsum(spec, operand, w, name=f"{prefix}expert_{name}", attrs=attrs)

    gated = s.experts_are_gated
    sides = [through(name, x, "D", "F") for name in (("gate", "in") if gated else ("in",))]
    value = activated(s.activation, ex.x(0))
    h = b.pointwise(f"{prefix}expert_h", ex.mul(value, ex.x(1)) if gated else value, *sides)
    return through("out", h, "F", "D")
