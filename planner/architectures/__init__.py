"""Named architectures: a few numbers in, a forward graph out.

ARCHITECTURES maps the `kind` of a model file to its settings; `build` makes the graph, whose
first output is the scalar loss. STACKS are the layers alone, for graphs of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.architectures.convolutional import resnet, unet
from planner.architectures.language import encoder_decoder, language_model
from planner.architectures.settings import (
    Architecture,
    Conformer,
    Decoder,
    Encoder,
    EncoderDecoder,
    MoEDecoder,
    MoEEncoderDecoder,
    ResNet,
    UNet,
    VisionTransformer,
)
from planner.architectures.stacks import STACKS
from planner.architectures.vision import conformer, vision_transformer
from planner.graph.builder import Builder
from planner.graph.core import Graph
from planner.model import Training

_BUILDERS: Mapping[str, tuple[type[Architecture], Callable[[Builder, Any, int], str]]] = {
    "decoder": (Decoder, language_model),
    "encoder": (Encoder, language_model),
    "encoder-decoder": (EncoderDecoder, encoder_decoder),
    "moe-decoder": (MoEDecoder, language_model),
    "moe-encoder-decoder": (MoEEncoderDecoder, encoder_decoder),
    "vit": (VisionTransformer, vision_transformer),
    "conformer": (Conformer, conformer),
    "resnet": (ResNet, resnet),
    "unet": (UNet, unet),
}
ARCHITECTURES: Mapping[str, type[Architecture]] = {k: s for k, (s, _) in _BUILDERS.items()}


def build(architecture: Architecture, batch: int, training: Training) -> Graph:
    """The forward graph for `batch` examples; outputs[0] is the loss."""
    b = Builder(training.compute, training.params)
    loss = _BUILDERS[architecture.kind][1](b, architecture, batch)
    return b.graph([loss])


__all__ = ["ARCHITECTURES", "STACKS", "Architecture", "build"]
