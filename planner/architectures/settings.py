"""Settings of the named architectures: the numbers a model file gives, checked.

One strict, frozen model per kind; defaults make the smallest file short. Building graphs from
them is the other modules' work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0)]
Activation = Literal["gelu", "silu", "relu", "squared_relu"]
Norm = Literal["layer", "rms"]

FF_PER_MODEL = 4  # d_ff / d_model of the original transformer, Vaswani et al. 2017
HEAD_SIZE = 128  # width of a TPU's matrix unit; the head size of most large models


class Architecture(BaseModel):
    """What all kinds have in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @property
    def tokens(self) -> int:
        """What one example counts as in tokens per second (an image counts as one)."""
        return 1


class TransformerBlock(Architecture):
    """Sizes and flavour of a transformer layer, whatever it is part of."""

    d_model: Size = Field(description="width of the residual stream")
    d_ff: Size | None = Field(
        None, description="width of the feed-forward layer; 4·d_model if left out"
    )
    heads: Size | None = Field(
        None, description="attention heads; d_model / head_dim (128) if left out"
    )
    head_dim: Size | None = Field(
        None, description="size of one head; d_model / heads if left out"
    )
    kv_heads: Size | None = Field(
        None, description="heads of keys and values: fewer is grouped-query attention, 1 is "
        "multi-query attention; as many as heads if left out",
    )  # fmt: skip
    activation: Activation = Field("gelu", description="activation of the feed-forward layer")
    gated: bool = Field(
        False, description="feed-forward layer with a gate: act(x·w_gate) × (x·w_in)"
    )
    norm: Norm = Field("layer", description="layer norm or root-mean-square norm")
    biases: bool = Field(False, description="biases in projections and layer norms")
    parallel_block: bool = Field(
        False, description="attention and feed-forward layer read the same norm, side by side"
    )
    qk_norm: bool = Field(False, description="norms of queries and keys over the head dimension")

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerBlock:
        width = self.head_dim or (HEAD_SIZE if self.heads is None else None)
        if self.heads is None and width and self.d_model % width:
            raise ValueError(
                f"d_model {self.d_model} does not divide into heads of {width}: give heads"
            )
        if self.heads is not None and width is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model {self.d_model} does not divide into {self.heads} heads: give head_dim"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"kv_heads {self.n_kv_heads} does not divide heads {self.n_heads}"
            )
        return self

    @property
    def n_heads(self) -> int:
        return self.heads or self.d_model // (self.head_dim or HEAD_SIZE)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads or self.n_heads

    @property
    def grouped(self) -> bool:
        """Whether several heads, but not all, share one head of keys and values."""
        return self.n_kv_heads not in (1, self.n_heads)

    @property
    def ff_size(self) -> int:
        return self.d_ff or FF_PER_MODEL * self.d_model


class LanguageModel(TransformerBlock):
    """A transformer over a vocabulary."""

    vocab: Size = Field(32000, description="entries of the vocabulary")
    sequence: Size = Field(2048, description="positions of one example")
    tied_embeddings: bool = Field(
        True, description="the output projection is the embedding table"
    )
    positions: Literal["none", "learned", "relative", "rotary"] = Field(
        "none", description="learned: a table [sequence, d_model] is added to the embedding; "
        "relative and rotary ones cost next to nothing and add nothing to the graph",
    )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.sequence


class Decoder(LanguageModel):
    """Causal language model: every position predicts the next token."""

    kind: Literal["decoder"] = "decoder"
    layers: Size = Field(description="number of layers")


class Encoder(LanguageModel):
    """Bidirectional language model: masked tokens are predicted, at all positions."""

    kind: Literal["encoder"] = "encoder"
    layers: Size = Field(description="number of layers")
