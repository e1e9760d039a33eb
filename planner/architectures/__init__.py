"""Named architectures: a few numbers in, a forward graph or a step of inference out.

ARCHITECTURES maps the `kind` of a model file to its settings, INFERENCE to the phases of
inference it has; `build` makes the graph, whose first output is the scalar loss, or the logits.
STACKS are the layers alone, for graphs of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.architectures.convolutional import resnet, unet
from planner.architectures.language import encoder_decoder, inferred, language_model
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
from planner.graph.builder import Builder, GraphError
from planner.graph.core import Graph
from planner.model import PHASES, PREFILL, Inference, Training

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


INFERENCE: Mapping[str, tuple[str, ...]] = {
    "decoder": PHASES, "moe-decoder": PHASES, "encoder": (PREFILL,),
}  # fmt: skip


def build(architecture: Architecture, batch: int, workload: Training | Inference) -> Graph:
    """The forward graph for `batch` examples; outputs[0] is the loss. Or the step of inference.

    Raises GraphError for what cannot be built.
    """
    b = Builder(workload.compute, workload.params)
    if isinstance(workload, Inference):
        return _inference(b, architecture, workload)
    loss = _BUILDERS[architecture.kind][1](b, architecture, batch)
    return b.graph([loss])


def _inference(b: Builder, architecture: Any, how: Inference) -> Graph:
    phases = INFERENCE.get(architecture.kind, ())
    if how.phase not in phases:
        able = ", ".join(k for k, known in INFERENCE.items() if how.phase in known)
        raise GraphError(f"kind {architecture.kind} has no {how.phase}; those that do: {able}")
    logits, caches = inferred(b, architecture, how)
    aliases = {new: old for new, old in caches.items() if old is not None}
    return b.graph([logits, *caches], aliases=aliases)


__all__ = ["ARCHITECTURES", "INFERENCE", "STACKS", "Architecture", "build"]
