"""Attention block by block, with a running softmax: ring attention (Liu et al. 2023) as a loop.

Positions are cut into blocks, a dimension `ring`. In each of as many turns every block of queries
meets one block of keys and values, which then move on to the next block. Kept of the softmax are
a running maximum, sum and weighted sum, so the scores of one turn are all that ever exist. Where
mesh axes split the dimension, moving on is a permute between neighbours; where none does, this is
attention in little memory. Ordinary ops throughout: nothing here knows sharding.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph import expr as ex
from planner.graph.builder import Builder, GraphError
from planner.graph.layers import MASKED
from planner.graph.structural import reshape
from planner.graph.windows import shift

RING = "ring"


def ring_attention(
    b: Builder, q: str, k: str, v: str, blocks: int, *, causal: bool, name: str = "attn",
    grouped: bool = False,
) -> str:  # fmt: skip
    """softmax(q·kᵀ/√d)·v with operands as `layers.attention` takes them, in `blocks` turns."""
    heads = ("K", "G") if grouped else ("N",)
    keys = heads[: len(b.lookup(k).shape) - 3]  # without heads, all heads of q share k and v
    queries = _cut(b, q, blocks, ("S", *heads, "H"), f"{name}.q")
    memory = [_cut(b, x, blocks, ("T", *keys, "H"), f"{name}.{n}") for n, x in (("k", k), ("v", v))]
    lead = ("B", RING, "S", *heads)
    sizes = dict(zip(b.lookup(queries).dims, b.lookup(queries).shape, strict=True))

    def start(what: str, dims: tuple[str, ...], value: ex.Expr, dtype: str = "f32") -> str:
        own = {d: sizes[d] for d in dims}
        return b.map(f"{name}.{what}", [], dims, value, dtype=dtype, sizes=own)

    starts = [
        *memory, start("block", (RING,), ex.index(RING), "i32"),
        start("top", lead, ex.c(MASKED)), start("total", lead, ex.c(0)),
        start("mixed", (*lead, "H"), ex.c(0)),
    ]  # fmt: skip
    turn = b.repeat(f"{name}.ring", blocks)
    entries = [turn.enter(s, s.rpartition(".")[2]) for s in starts]
    exits = _Turn(turn, queries, lead, causal).exits(*entries)
    results = turn.end_repeat(list(zip(starts, entries, exits, strict=True)))
    mixed, total = (results[5], (*lead, "H")), (results[4], lead)
    out = b.map(f"{name}.out", [mixed, total], mixed[1], ex.div(ex.x(0), ex.x(1)))
    t = b.lookup(q)
    return reshape(b, out, t.shape, t.dims, f"{name}.mix")


def _cut(b: Builder, x: str, blocks: int, rest: tuple[str, ...], name: str) -> str:
    """[B, S, …] → [B, ring, S of a block, …]."""
    t = b.lookup(x)
    if t.shape[1] % blocks:
        raise GraphError(f"{name}: {blocks} blocks do not divide {t.shape[1]} positions")
    shape = (t.shape[0], blocks, t.shape[1] // blocks, *t.shape[2:])
    return reshape(b, x, shape, ("B", RING, *rest), name)


@dataclass(frozen=True)
class _Turn:
    """One turn, in the body `b` of the loop; `lead`: the dimensions of a query."""

    b: Builder
    queries: str
    lead: tuple[str, ...]
    causal: bool

    def exits(
        self, key: str, value: str, block: str, top: str, total: str, mixed: str
    ) -> tuple[str, ...]:
        """What is carried on: the next block, and sums that include this one. `block` numbers
        the keys' blocks."""
        b, lead, out = self.b, self.lead, (*self.lead, "H")
        keys, scored = b.lookup(key).dims, ("B", RING, *self.lead[3:], "S", "T")
        score = ex.mul(ex.mul(ex.x(0), ex.x(1)), ex.c(b.lookup(key).shape[-1] ** -0.5))
        scores = b.map("scores", [(self.queries, out), (key, keys)], scored, score)
        logit, read = self._logit(scores, scored, key, block)
        was = ex.x(len(read))
        now = b.map(
            "top.new", [*read, (top, lead)], lead, ex.call("max", logit, was), dtype="f32",
            combiner="max", attrs={"stop": True},
        )  # fmt: skip
        power = ex.call("exp", ex.sub(logit, ex.call("stop", was)))
        probs = b.map("probs", [*read, (now, lead)], scored, power)
        part = b.map("part", [(probs, scored)], lead, ex.x(0), dtype="f32")
        share = b.map(
            "share", [(probs, scored), (value, keys)], out, ex.mul(ex.x(0), ex.x(1)), dtype="f32"
        )
        # Results do not depend on the maximum, which only keeps powers in range.
        faded = ex.mul(ex.x(0), ex.call("exp", ex.call("stop", ex.sub(ex.x(1), ex.x(2)))))
        tops, added = [(top, lead), (now, lead)], ex.add(faded, ex.x(3))
        sums = (
            b.map("total.new", [(total, lead), *tops, (part, lead)], lead, added, dtype="f32"),
            b.map("mixed.new", [(mixed, out), *tops, (share, out)], out, added, dtype="f32"),
        )
        moved = (shift(b, x, RING, 1, f"{n}.next", wrap=True)
                 for n, x in (("k", key), ("v", value), ("block", block)))  # fmt: skip
        return (*moved, now, *sums)

    def _logit(
        self, scores: str, scored: tuple[str, ...], key: str, block: str
    ) -> tuple[ex.Expr, list[tuple[str, tuple[str, ...]]]]:
        """The score where the query sees the key, as an expression of the operands given."""
        read: list[tuple[str, tuple[str, ...]]] = [(scores, scored)]
        if not self.causal:
            return ex.x(0), read
        asking, asked = self.b.lookup(self.queries).shape[2], self.b.lookup(key).shape[2]
        at = ex.add(ex.mul(ex.index(RING), ex.c(asking)), ex.index("S"))
        there = ex.add(ex.mul(ex.x(1), ex.c(asked)), ex.index("T"))
        seen = ex.call("where", ex.call("ge", at, there), ex.x(0), ex.c(MASKED))
        return seen, [*read, (block, (RING,))]
