"""Dense language models: decoder, encoder. One `repeat` of layers between embedding and loss."""

from __future__ import annotations

from planner.architectures.blocks import TOKENS, added, layer, normed
from planner.architectures.settings import Decoder, Encoder, LanguageModel
from planner.graph import layers
from planner.graph.builder import Builder


def embedded(b: Builder, s: LanguageModel, tokens: str, table: str) -> str:
    """Rows of the table for the tokens, plus learned positions if there are any."""
    x = layers.embedding(b, table, tokens, TOKENS, name="x")
    if s.positions != "learned":
        return x
    positions = b.param("positions", b.lookup(x).shape[1:], TOKENS[1:])
    return added(b, "x.placed", x, positions)


def predicted(b: Builder, s: LanguageModel, x: str, table: str, targets: str) -> str:
    """The loss: norm, projection to the vocabulary, cross-entropy over all positions."""
    x = normed(b, x, s.norm, s.biases, "ln_f")
    if s.tied_embeddings:
        logits = b.einsum("B S D, V D -> B S V", x, table, name="logits")
    else:
        unembed = b.param("unembed", (s.d_model, s.vocab), ("D", "V"))
        logits = b.einsum("B S D, D V -> B S V", x, unembed, name="logits")
    return layers.cross_entropy(b, logits, targets)


def language_model(b: Builder, s: Decoder | Encoder, batch: int) -> str:
    """Embedding, `layers` layers, output projection; returns the loss.

    An encoder is trained to predict the masked tokens, of which this graph computes the logits
    at all positions.
    """
    shape, dims = (batch, s.sequence), TOKENS[:2]
    tokens = b.input("tokens", shape, dims, "i32")
    targets = b.input("targets", shape, dims, "i32")
    table = b.param("embed", (s.vocab, s.d_model), ("V", "D"))
    x = embedded(b, s, tokens, table)
    body = b.repeat("layers", s.layers)
    entry = body.enter(x)
    (x,) = body.end_repeat([(x, entry, layer(body, entry, s, isinstance(s, Decoder)))])
    return predicted(b, s, x, table, targets)
