"""Mixture of experts with top-k routing and capacity, after GShard (Lepikhin et al. 2021).

A router gives every token k experts and gates. Within a group of tokens, experts hand out their
slots first to all first choices, in the order of the tokens, then to the second ones; who finds
none is dropped. Dispatch and combine are products with masks [G, S, E, C], so what they may do
on a mesh follows from an einsum's rule, and moving tokens from groups to experts is a resharding.
The auxiliary loss that balances experts is left out: it costs next to nothing.

Dimensions: G groups, S tokens of a group, E experts, C slots of an expert and group, K choices.
"""

from __future__ import annotations

from planner.architectures.blocks import activated
from planner.architectures.settings import Experts, TransformerBlock
from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import Builder, GraphError
from planner.graph.structural import cumsum, reshape, top_k

MOVES_TOKENS = {"overhead": True}


def experts(b: Builder, x: str, s: TransformerBlock, prefix: str = "") -> str:
    """The feed-forward layer of x [B, S, D] by experts."""
    if not isinstance(s, Experts):
        raise GraphError(f"{prefix}experts: the settings of a '{s.kind}' name no experts")
    t = b.lookup(x)
    batch, sequence, width = t.shape
    size = s.group_size or sequence
    if batch * sequence % size:
        raise GraphError(
            f"{prefix}experts: groups of {size} do not divide {batch} × {sequence} tokens"
        )
    grouped = (batch * sequence // size, size, width)
    own = size == sequence  # a sequence is a group
    tokens = x if own else reshape(b, x, grouped, ("G", "S", "D"), f"{prefix}tokens")
    y = _routed(b, tokens, s, prefix)
    return y if own else reshape(b, y, t.shape, t.dims, f"{prefix}experts.out")


def _routed(b: Builder, x: str, s: Experts, prefix: str) -> str:
    size = b.lookup(x).shape[1]
    slots = s.capacity(size)
    gates, choices = _route(b, x, s, prefix)
    places = _places(b, choices, s, prefix)
    here = ex.mul(ex.call("eq", ex.x(0), ex.index("E")), ex.call("eq", ex.x(1), ex.index("C")))
    sizes = {"E": s.experts, "C": slots}
    pairs = [(choices, ("G", "S", "K")), (places, ("G", "K", "S"))]
    mask = ("G", "S", "E", "C")
    dispatch = b.map(f"{prefix}dispatch", pairs, mask, here, sizes=sizes)
    combine = b.map(
        f"{prefix}combine", [*pairs, (gates, ("G", "S", "K"))], mask, ex.mul(here, ex.x(2)),
        sizes=sizes,
    )  # fmt: skip
    taken = b.einsum(
        "G S E C, G S D -> E G C D", dispatch, x, name=f"{prefix}dispatched", attrs=MOVES_TOKENS
    )
    useful = min(1.0, s.top_k * size / (s.experts * slots))
    out = _fed_forward(b, taken, s, prefix, useful)
    return b.einsum(
        "G S E C, E G C D -> G S D", combine, out, name=f"{prefix}combined", attrs=MOVES_TOKENS
    )


def _route(b: Builder, x: str, s: Experts, prefix: str) -> tuple[str, str]:
    """Gates and experts [G, S, K] of every token's choices; the gates of several add up to 1."""
    router = b.param(f"{prefix}router", (s.d_model, s.experts), ("D", "E"))
    logits = b.einsum("G S D, D E -> G S E", x, router, name=f"{prefix}routing", dtype="f32")
    likely = layers.softmax(b, logits, "E", f"{prefix}likely", dtype="f32")
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


def _fed_forward(b: Builder, x: str, s: Experts, prefix: str, useful: float) -> str:
    """Every expert's feed-forward layer on its slots [E, G, C, D]."""
    sizes = {"E": s.experts, "D": s.d_model, "F": s.expert_ff_size}

    def through(name: str, operand: str, come: str, go: str) -> str:
        dims = ("E", come, go)
        own = f"{prefix}expert_w_{name}"
        w = b.param(own, [sizes[d] for d in dims], dims)
        spec = f"E G C {come}, E {come} {go} -> E G C {go}"
        attrs = {"useful": useful}
        return b.einsum(spec, operand, w, name=f"{prefix}expert_{name}", attrs=attrs)

    gated = s.experts_are_gated
    sides = [through(name, x, "D", "F") for name in (("gate", "in") if gated else ("in",))]
    value = activated(s.activation, ex.x(0))
    h = b.pointwise(f"{prefix}expert_h", ex.mul(value, ex.x(1)) if gated else value, *sides)
    return through("out", h, "F", "D")
