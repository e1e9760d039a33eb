"""Named architectures: a few numbers in, a forward graph out.

ARCHITECTURES maps the `kind` of a model file to its settings; `build` makes the graph, whose
first output is the scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.architectures.language import language_model
from planner.architectures.settings import Architecture, Decoder, Encoder
from planner.graph.builder import Builder
from planner.graph.core import Graph
from planner.model import Training

ARCHITECTURES: Mapping[str, type[Architecture]] = {
    "decoder": Decoder,
    "encoder": Encoder,
}
_BUILDERS: Mapping[type[Architecture], Callable[[Builder, Any, int], str]] = {
    Decoder: language_model,
    Encoder: language_model,
}


def build(architecture: Architecture, batch: int, training: Training) -> Graph:
    """The forward graph for `batch` examples; outputs[0] is the loss."""
    b = Builder(training.compute, training.params)
    loss = _BUILDERS[type(architecture)](b, architecture, batch)
    return b.graph([loss])


__all__ = ["ARCHITECTURES", "Architecture", "build"]
