"""What a step counts as: model FLOPs and hardware FLOPs, for MFU and HFU.

Model FLOPs are two per multiply-add of the forward pass's products (matmuls, convolutions,
attention), times three for a step that trains: the backward pass costs twice the forward one.
Causal attention is not halved; lookups and elementwise work do not count. Hardware FLOPs add
what the schedule needs: recomputation, routing and empty expert slots. Neither knows padding
or replication: a graph is logical.

Op attributes matter: `overhead` marks products that move or route data (dispatch and combine of
experts), `picks` those that only stand for a gather, `useful` is the fraction of a product that
works on tokens (expert capacity beyond tokens × k is slack), `skips` says that the rest is not
computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from planner.graph.builder import contraction_sizes
from planner.graph.core import Graph, Op

PER_MULTIPLY_ADD = 2
BACKWARD_PER_FORWARD = 2  # a product's two operands each get a gradient of the same size


@dataclass(frozen=True)
class FlopCount:
    """Global FLOPs of one step."""

    model: float
    hardware: float


def product_flops(op: Op) -> float:
    """FLOPs of one execution of `op` if it is a product, else 0."""
    sizes = contraction_sizes(op)
    if sizes is None or op.attrs.get("onehot") or op.attrs.get("picks"):
        return 0.0
    return float(PER_MULTIPLY_ADD * prod(sizes))


def count_flops(graph: Graph) -> FlopCount:
    """FLOPs of a training step, or of a forward graph alone."""
    useful = slack = again = 0.0
    trains = False
    for op, times in graph.walk():
        trains = trains or op.phase == "backward"
        flops = product_flops(op) * times
        if op.phase == "recompute":
            again += flops * (float(op.attrs["useful"]) if op.attrs.get("skips") else 1.0)
        elif op.phase == "forward":
            part = 0.0 if op.attrs.get("overhead") else float(op.attrs.get("useful", 1.0))
            useful += flops * part
            slack += 0.0 if op.attrs.get("skips") else flops * (1.0 - part)
    passes = 1 + BACKWARD_PER_FORWARD if trains else 1
    model = passes * useful
    return FlopCount(model, model + passes * slack + again)
