"""Language models: decoder, encoder, encoder and decoder together; with experts or without.

Every stack of layers is one `repeat` between embedding and loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.architectures.blocks import (
    TOKENS,
    Feed,
    added,
    cross_layer,
    fed_forward,
    layer,
    normed,
)
from planner.architectures.caching import Cache
from planner.architectures.experts import experts
from planner.architectures.settings import (
    Decoder,
    Encoder,
    Experts,
    LanguageModel,
    MoEDecoder,
    MoEEncoderDecoder,
    SequenceToSequence,
    TransformerBlock,
)
from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import Builder, GraphError
from planner.graph.structural import slice_dim
from planner.model import Inference


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


def logits_of(b: Builder, s: LanguageModel, x: str, table: str) -> str:
    """Norm and projection to the vocabulary."""
    x = normed(b, x, s.norm, s.biases, "ln_f")
    if s.tied_embeddings:
        return b.einsum("B S D, V D -> B S V", x, table, name="logits")
    vocab, width = b.lookup(table).shape
    unembed = b.param("unembed", (width, vocab), ("D", "V"))
    return b.einsum("B S D, D V -> B S V", x, unembed, name="logits")


def predicted(b: Builder, s: LanguageModel, x: str, table: str, targets: str) -> str:
    """The loss: cross-entropy over all positions."""
    return layers.cross_entropy(b, logits_of(b, s, x, table), targets)


def sublayers(s: LanguageModel, decodes: bool) -> tuple[tuple[str, Feed], ...]:
    """(prefix of names, feed-forward layer) of the layers that one iteration of a stack runs.

    One ordinary layer, or with experts in every n-th layer n - 1 ordinary ones and that layer.
    `decodes`: whether the layers attend to an encoder, which may have all the experts.
    """
    elsewhere = decodes and isinstance(s, MoEEncoderDecoder) and s.experts_in == "encoder"
    if elsewhere or not isinstance(s, Experts):
        return (("", fed_forward),)
    if s.moe_every == 1:
        return (("", experts),)
    count = s.moe_every - 1
    dense = [f"dense{i + 1}." if count > 1 else "dense." for i in range(count)]
    return (*((prefix, fed_forward) for prefix in dense), ("moe.", experts))


def stacked(
    b: Builder, name: str, count: int, x: str, s: LanguageModel, causal: bool,
    memory: str | None = None, cache: Cache | None = None,
) -> str:  # fmt: skip
    """`count` layers as a repeat called `name`; with `memory` they attend to it, too.

    Ordinary layers that come before those with experts are a repeat of their own.
    """
    first = s.dense_first if isinstance(s, MoEDecoder) else 0
    if first:
        dense = (("", fed_forward),)
        x = _repeated(b, f"first_{name}", first, x, s, causal, dense, memory, cache)
    parts = sublayers(s, memory is not None)
    return _repeated(b, name, count - first, x, s, causal, parts, memory, cache)


def _repeated(
    b: Builder, name: str, count: int, x: str, s: LanguageModel, causal: bool,
    parts: Sequence[tuple[str, Feed]], memory: str | None, cache: Cache | None,
) -> str:  # fmt: skip
    body = b.repeat(name, count // len(parts))
    entry = y = body.enter(x)
    for prefix, feed in parts:
        if memory is None:
            y = layer(body, y, s, causal, prefix, feed, cache)
        else:
            y = cross_layer(body, y, memory, s, prefix, feed)
    return body.end_repeat([(x, entry, y)])[0]


def language_model(b: Builder, s: Decoder | Encoder | MoEDecoder, batch: int) -> str:
    """Embedding, `layers` layers, output projection; returns the loss.

    An encoder is trained to predict the masked tokens, of which this graph computes the logits
    at all positions.
    """
    tokens = token_input(b, "tokens", batch, s.sequence)
    targets = token_input(b, "targets", batch, s.sequence)
    table = embedding_table(b, "embed", s.vocab, s)
    x = embedded(b, s, tokens, table)
    x = stacked(b, "layers", s.layers, x, s, not isinstance(s, Encoder))
    return predicted(b, s, x, table, targets)


def inferred(
    b: Builder, s: Decoder | Encoder | MoEDecoder, how: Inference
) -> tuple[str, dict[str, str | None]]:
    """A step of inference: its logits, and the caches it hands out with what they take over.

    A decoder predicts only the token after the last one; an encoder's logits are those of all
    positions.
    """
    causal = not isinstance(s, Encoder)
    cache = Cache.of(b, how) if causal else None
    decodes = cache is not None and cache.decodes
    tokens = token_input(b, "tokens", how.batch, 1 if decodes else how.context)
    table = embedding_table(b, "embed", s.vocab, s)
    x = placed(b, s, layers.embedding(b, table, tokens, TOKENS, name="x"), cache)
    x = stacked(b, "layers", s.layers, x, s, causal, cache=cache)
    if causal and not decodes:
        x = slice_dim(b, x, "S", how.context - 1, how.context, name="last")
    logits = logits_of(b, s, x, table)
    return logits, cache.close(b) if cache else {}


def placed(b: Builder, s: LanguageModel, x: str, cache: Cache | None) -> str:
    """x plus its learned positions, if there are any: the first ones, or that of the new token."""
    if s.positions != "learned":
        return x
    count = b.lookup(x).shape[1]
    rows = s.sequence
    limit = cache.how.context if cache else count
    if limit > rows:
        raise GraphError(f"positions are learned up to {rows}, a context of {limit} has more")
    table = b.param("positions", (rows, s.d_model), TOKENS[1:])
    if cache is not None and cache.decodes:
        row = layers.embedding(b, table, cache.filled, ("B", "D"), "position")
        place = ex.add(ex.x(0), ex.x(1))
        return b.map("x.placed", [(x, TOKENS), (row, ("B", "D"))], TOKENS, place)
    first = slice_dim(b, table, "S", 0, count, name="first_positions") if count < rows else table
    return added(b, "x.placed", x, first)


def tables(b: Builder, s: LanguageModel, target_vocab: int | None) -> tuple[str, str]:
    """Embedding tables of sources and targets: one for both unless the targets have their own."""
    source = embedding_table(b, "embed", s.vocab, s)
    if target_vocab is None:
        return source, source
    return source, embedding_table(b, "target_embed", target_vocab, s)


def encoder_decoder(b: Builder, s: SequenceToSequence, batch: int) -> str:
    """Encoder over the sources, decoder over the targets shifted by one; returns the loss."""
    sources = token_input(b, "sources", batch, s.sequence)
    tokens = token_input(b, "tokens", batch, s.target_length)
    targets = token_input(b, "targets", batch, s.target_length)
    source_table, target_table = tables(b, s, s.target_vocab)
    memory = embedded(b, s, sources, source_table, "source")
    memory = stacked(b, "encoder", s.encoder_layers, memory, s, False)
    memory = normed(b, memory, s.norm, s.biases, "encoder_ln")
    x = embedded(b, s, tokens, target_table)
    x = stacked(b, "decoder", s.decoder_layers, x, s, True, memory)
    return predicted(b, s, x, target_table, targets)
