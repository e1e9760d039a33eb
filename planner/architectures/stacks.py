"""Stacks of layers of the named architectures, for graphs of one's own.

A stack is one repeat that takes [B, S, D] to [B, S, D]; what comes before and after it (embedding,
loss) is the graph's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.architectures.language import stacked
from planner.architectures.settings import (
    Architecture,
    Conformer,
    Decoder,
    Encoder,
    LanguageModel,
    MoEDecoder,
    TransformerBlock,
)
from planner.architectures.vision import conformer_stack
from planner.graph.builder import Builder, GraphError


@dataclass(frozen=True)
class Stack:
    """`settings` without those in `outside`, which say what is around the layers.

    `build(builder, name, x, settings, memory)` adds the layers and returns their result.
    """

    settings: type[Architecture]
    outside: frozenset[str]
    build: Callable[[Builder, str, str, Any, str | None], str]


def _decoder(b: Builder, name: str, x: str, s: Any, memory: str | None) -> str:
    return stacked(b, name, s.layers, x, s, True, memory)


def _alone(
    build: Callable[[Builder, str, str, Any], str],
) -> Callable[[Builder, str, str, Any, str | None], str]:
    def checked(b: Builder, name: str, x: str, s: Any, memory: str | None) -> str:
        if memory is not None:
            raise GraphError(f"layers of a '{s.kind}' attend to no memory, those of a decoder do")
        return build(b, name, x, s)

    return checked


def _encoder(b: Builder, name: str, x: str, s: Any) -> str:
    return stacked(b, name, s.layers, x, s, False)


_AROUND_TEXT = frozenset(LanguageModel.model_fields) - frozenset(TransformerBlock.model_fields)
_AROUND_SPEECH = frozenset({"frames", "features", "vocab"})

STACKS: Mapping[str, Stack] = {
    "decoder": Stack(Decoder, _AROUND_TEXT, _decoder),
    "encoder": Stack(Encoder, _AROUND_TEXT, _alone(_encoder)),
    "moe-decoder": Stack(MoEDecoder, _AROUND_TEXT, _decoder),
    "conformer": Stack(Conformer, _AROUND_SPEECH, _alone(conformer_stack)),
}
