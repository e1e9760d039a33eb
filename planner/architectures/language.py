"""Dense language models: decoder, encoder, encoder and decoder together.

Every stack of layers is one `repeat` between embedding and loss.
"""

from __future__ import annotations

from planner.architectures.blocks import (
    TOKENS,
    added,
    attended,
    fed_forward,
    layer,
    normed,
)
from planner.architectures.settings import (
    Decoder,
    Encoder,
    EncoderDecoder,
    LanguageModel,
    TransformerBlock,
)
from planner.graph import layers
from planner.graph.builder import Builder


def token_input(b: Builder, name: str, batch: int, sequence: int) -> str:
    return b.input(name, (batch, sequence), TOKENS[:2], "i32")


def embedding_table(b: Builder, name: str, vocab: int, s: TransformerBlock) -> str:
    return b.param(name, (vocab, s.d_model), ("V", "D"))


def embedded(b: Builder, s: LanguageModel, tokens: str, table: str, name: str = "x") -> str:
    """Rows of the table for the tokens, plus learned positions if there are any."""
    x = layers.embedding(b, table, tokens, TOKENS, name=name)
    if s.positions != "learned":
        return x
    own = "positions" if name == "x" else f"{name}_positions"
    positions = b.param(own, b.lookup(x).shape[1:], TOKENS[1:])
    return added(b, f"{name}.placed", x, positions)


def predicted(b: Builder, s: LanguageModel, x: str, table: str, targets: str) -> str:
    """The loss: norm, projection to the vocabulary, cross-entropy over all positions."""
    x = normed(b, x, s.norm, s.biases, "ln_f")
    if s.tied_embeddings:
        logits = b.einsum("B S D, V D -> B S V", x, table, name="logits")
    else:
        vocab, width = b.lookup(table).shape
        unembed = b.param("unembed", (width, vocab), ("D", "V"))
        logits = b.einsum("B S D, D V -> B S V", x, unembed, name="logits")
    return layers.cross_entropy(b, logits, targets)


def language_model(b: Builder, s: Decoder | Encoder, batch: int) -> str:
    """Embedding, `layers` layers, output projection; returns the loss.

    An encoder is trained to predict the masked tokens, of which this graph computes the logits
    at all positions.
    """
    tokens = token_input(b, "tokens", batch, s.sequence)
    targets = token_input(b, "targets", batch, s.sequence)
    table = embedding_table(b, "embed", s.vocab, s)
    x = embedded(b, s, tokens, table)
    body = b.repeat("layers", s.layers)
    entry = body.enter(x)
    (x,) = body.end_repeat([(x, entry, layer(body, entry, s, isinstance(s, Decoder)))])
    return predicted(b, s, x, table, targets)


def attended_twice(
    b: Builder, x: str, memory: str, s: TransformerBlock, prefix: str = ""
) -> str:
    """Causal self-attention, then attention to the encoder's result, each with its residual."""
    h = normed(b, x, s.norm, s.biases, f"{prefix}ln1")
    x = added(b, f"{prefix}self", x, attended(b, h, h, s, True, prefix))
    h = normed(b, x, s.norm, s.biases, f"{prefix}cross_ln")
    return added(b, f"{prefix}mid", x, attended(b, h, memory, s, False, f"{prefix}cross_"))


def cross_layer(b: Builder, x: str, memory: str, s: TransformerBlock) -> str:
    """A decoder layer that also reads the encoder's result."""
    x = attended_twice(b, x, memory, s)
    h = normed(b, x, s.norm, s.biases, "ln2")
    return added(b, "x", x, fed_forward(b, h, s))


def tables(b: Builder, s: LanguageModel, target_vocab: int | None) -> tuple[str, str]:
    """Embedding tables of sources and targets: one for both unless the targets have their own."""
    source = embedding_table(b, "embed", s.vocab, s)
    if target_vocab is None:
        return source, source
    return source, embedding_table(b, "target_embed", target_vocab, s)


def encoder_decoder(b: Builder, s: EncoderDecoder, batch: int) -> str:
    """Encoder over the sources, decoder over the targets shifted by one; returns the loss."""
    sources = token_input(b, "sources", batch, s.sequence)
    tokens = token_input(b, "tokens", batch, s.target_length)
    targets = token_input(b, "targets", batch, s.target_length)
    source_table, target_table = tables(b, s, s.target_vocab)
    memory = embedded(b, s, sources, source_table, "source")
    encoder = b.repeat("encoder", s.encoder_layers)
    entry = encoder.enter(memory)
    (memory,) = encoder.end_repeat([(memory, entry, layer(encoder, entry, s, False))])
    memory = normed(b, memory, s.norm, s.biases, "encoder_ln")
    x = embedded(b, s, tokens, target_table)
    decoder = b.repeat("decoder", s.decoder_layers)
    entry = decoder.enter(x)
    (x,) = decoder.end_repeat([(x, entry, cross_layer(decoder, entry, memory, s))])
    return predicted(b, s, x, target_table, targets)
