"""Sums over the parts of a batch where their summands are made, not at the end of a part.

On GPUs the exported program makes the gradients of a product outside loops together and reduces
them at once (see planner.export.placement). Left to the end, the unembedding of Llama 3 70B keeps
2 GiB of unreduced gradients while all layers go backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.graph.core import Graph, Loop, Node


def sums_at_once(graph: Graph) -> Graph:
    """The same step; in loops over parts of a batch, sums stand right behind what they add."""
    nodes = [_reordered(n) if isinstance(n, Loop) and n.of_parts else n for n in graph.nodes]
    return replace(graph, nodes=tuple(nodes))


def _reordered(loop: Loop) -> Loop:
    exits = {k.exit for k in loop.carries}
    nodes = loop.body.nodes
    sums = [n for n in nodes if exits.issuperset(n.outs) and not _read(n, nodes)]
    placed: list[Node] = [n for n in nodes if n not in sums]
    for node in sums:
        made = [i for i, n in enumerate(placed) if set(n.outs) & set(node.ins)]
        placed.insert(max(made, default=len(placed) - 1) + 1, node)
    return replace(loop, body=replace(loop.body, nodes=tuple(placed)))


def _read(node: Node, nodes: Sequence[Node]) -> bool:
    return any(set(node.outs) & set(n.ins) for n in nodes)
