"""Settings of the named architectures: the numbers a model file gives, checked.

One strict, frozen model per kind; defaults make the smallest file short. Building graphs from
them is the other modules' work.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0)]
Activation = Literal["gelu", "silu", "relu", "squared_relu"]
Norm = Literal["layer", "rms"]

FF_PER_MODEL = 4  # d_ff / d_model of the original transformer, Vaswani et al. 2017
HEAD_SIZE = 128  # width of a TPU's matrix unit; the head size of most large models
SUBSAMPLING = 4  # frames per position of a conformer, Gulati et al. 2020, section 2


class Architecture(BaseModel):
    """What all kinds have in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    kind: str = Field(description="the named architecture")

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
    kv_rank: Size | None = Field(
        None, description="latent attention: keys and values of all heads are made from a vector "
        "of this width (DeepSeek-AI 2024, DeepSeek-V2)",
    )  # fmt: skip
    q_rank: Size | None = Field(
        None, description="latent attention: width of the vector that queries are made from; "
        "d_model if left out",
    )  # fmt: skip
    rope_dim: Size | None = Field(
        None, description="latent attention: part of a head, beside head_dim, that carries "
        "positions and whose keys all heads share; none if left out",
    )  # fmt: skip

    attention_blocks: Size | None = Field(
        None, description="attention in as many turns, with blocks of keys and values that move "
        "on from block to block of queries: ring attention where an axis splits the blocks, and "
        "little memory where none does; all at once if left out",
    )  # fmt: skip

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

    @model_validator(mode="after")
    def _latent_attention_is_whole(self) -> TransformerBlock:
        given = [n for n in ("q_rank", "rope_dim") if getattr(self, n) is not None]
        if self.kv_rank is None and given:
            raise ValueError(f"{given[0]} belongs to latent attention: give kv_rank too")
        if self.kv_rank is not None and self.attention_blocks is not None:
            raise ValueError("attention_blocks: latent attention is not computed in blocks")
        if self.kv_rank is not None and (self.kv_heads or self.qk_norm or self.biases):
            raise ValueError("kv_rank: latent attention has no kv_heads, qk_norm or biases")
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


class Experts(LanguageModel):
    """Mixture of experts in every n-th layer: tokens go to the k experts a router prefers.

    Tokens are routed in groups; every expert has `capacity` slots for those of a group.
    """

    experts: Annotated[int, Field(gt=1)] = Field(description="experts of a layer")
    top_k: Size = Field(2, description="experts of a token")
    moe_every: Size = Field(1, description="every how many layers has experts")
    expert_d_ff: Size | None = Field(
        None, description="width of an expert; d_ff if left out"
    )
    expert_gated: bool | None = Field(
        None, description="whether experts have a gate; as `gated` if left out"
    )
    routing: Literal["top_k", "expert_choice", "dropless"] = Field(
        "top_k", description="top_k: tokens choose experts, which drop what finds no slot; "
        "expert_choice: experts choose tokens; dropless: tokens choose, and all are served",
    )  # fmt: skip
    capacity_factor: float = Field(
        1.25, gt=0, description="slots of an expert, relative to what it gets if all experts "
        "get equally many tokens; dropless routing does not need it",
    )  # fmt: skip
    load_imbalance: float = Field(
        1.0, ge=1, description="dropless routing: tokens of the busiest expert, relative to "
        "the mean; the others wait for it",
    )  # fmt: skip
    shared_experts: int = Field(
        0, ge=0, description="experts that every token goes to, besides the ones chosen for it"
    )
    group_size: Size | None = Field(
        None, description="tokens that are routed together, at most all; one sequence if left out"
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> Experts:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        return self

    @property
    def expert_ff_size(self) -> int:
        return self.expert_d_ff or self.ff_size

    @property
    def experts_are_gated(self) -> bool:
        return self.gated if self.expert_gated is None else self.expert_gated

    @property
    def drops(self) -> bool:
        return self.routing != "dropless"

    def capacity(self, group: int) -> int:
        """Slots of an expert for a group of that many tokens: at least one."""
        factor = self.capacity_factor if self.drops else self.load_imbalance
        return min(group, max(1, ceil(factor * self.top_k * group / self.experts)))


def _whole_periods(layers: int, every: int, what: str) -> None:
    if layers % every:
        raise ValueError(f"moe_every {every} does not divide {what} {layers}")


class MoEDecoder(Experts):
    """Causal language model with experts."""

    kind: Literal["moe-decoder"] = "moe-decoder"
    layers: Size = Field(description="number of layers, those with experts included")
    dense_first: int = Field(
        0, ge=0, description="ordinary layers before the first of those that layers with experts "
        "alternate with",
    )  # fmt: skip

    @model_validator(mode="after")
    def _periods_fit(self) -> MoEDecoder:
        if self.dense_first >= self.layers:
            raise ValueError(f"dense_first {self.dense_first} leaves none of {self.layers} layers")
        what = "layers - dense_first" if self.dense_first else "layers"
        _whole_periods(self.layers - self.dense_first, self.moe_every, what)
        return self


class SequenceToSequence(LanguageModel):
    """What models with an encoder over sources and a decoder over targets have in common."""

    target_sequence: Size | None = Field(
        None, description="positions of the targets; as many as the sources' if left out"
    )
    target_vocab: Size | None = Field(
        None, description="vocabulary of the targets, with an embedding table of its own; "
        "one table serves sources and targets if left out",
    )  # fmt: skip
    encoder_layers: Size = Field(description="number of encoder layers")
    decoder_layers: Size = Field(description="number of decoder layers")

    @property
    def target_length(self) -> int:
        return self.target_sequence or self.sequence

    @property
    def tokens(self) -> int:
        return self.sequence + self.target_length


    @model_validator(mode="after")
    def _no_parallel_block(self) -> SequenceToSequence:
        if self.parallel_block:
            raise ValueError("parallel_block: a decoder layer with two attentions has none")
        return self


class EncoderDecoder(SequenceToSequence):
    """Encoder over sources, causal decoder over targets that attends to the encoder's result."""

    kind: Literal["encoder-decoder"] = "encoder-decoder"


class MoEEncoderDecoder(SequenceToSequence, Experts):
    """Encoder and decoder with experts."""

    kind: Literal["moe-encoder-decoder"] = "moe-encoder-decoder"
    experts_in: Literal["both", "encoder"] = Field(
        "both", description="encoder: the decoder's layers are ordinary ones"
    )

    @model_validator(mode="after")
    def _periods_fit(self) -> MoEEncoderDecoder:
        _whole_periods(self.encoder_layers, self.moe_every, "encoder_layers")
        if self.experts_in == "both":
            _whole_periods(self.decoder_layers, self.moe_every, "decoder_layers")
        return self


class VisionTransformer(TransformerBlock):
    """Transformer over the patches of an image; the mean over patches is classified."""

    kind: Literal["vit"] = "vit"
    layers: Size = Field(description="number of layers")
    image: Size = Field(224, description="height and width of an image")
    patch: Size = Field(16, description="height and width of a patch")
    channels: Size = Field(3, description="channels of an image")
    classes: Size = Field(1000, description="classes to predict")

    @model_validator(mode="after")
    def _patches_fit(self) -> VisionTransformer:
        if self.image % self.patch:
            raise ValueError(f"patches of {self.patch} do not divide an image of {self.image}")
        return self


class Conformer(TransformerBlock):
    """Speech encoder of attention and convolution; every fourth frame's token is predicted."""

    kind: Literal["conformer"] = "conformer"
    layers: Size = Field(description="number of layers")
    kernel: Size = Field(31, description="taps of the depthwise convolution")
    frames: Size = Field(1024, description="frames of one utterance")
    features: Size = Field(80, description="features of a frame (mel filters)")
    vocab: Size = Field(1024, description="tokens to predict")
    activation: Activation = Field("silu", description="activation of the feed-forward layers")
    biases: bool = Field(True, description="biases in projections and layer norms")

    @model_validator(mode="after")
    def _shape_fits(self) -> Conformer:
        for name in ("frames", "features"):
            if getattr(self, name) % SUBSAMPLING:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of {SUBSAMPLING}")
        if self.parallel_block:
            raise ValueError("parallel_block: a conformer layer has none")
        return self

    @property
    def tokens(self) -> int:
        return self.frames // SUBSAMPLING


Sizes = Annotated[tuple[Size, ...], Field(strict=False, min_length=1)]  # a list in the file


class ResNet(Architecture):
    """Residual network of bottleneck blocks with batch norm, for image classification."""

    kind: Literal["resnet"] = "resnet"
    blocks: Sizes = Field((3, 4, 6, 3), description="blocks of every stage; the default is 50")
    width: Size = Field(64, description="channels of the first stage's narrow convolutions")
    width_factor: Size = Field(
        1, description="how much wider narrow convolutions are (Wide ResNet)"
    )
    image: Size = Field(224, description="height and width of an image")
    channels: Size = Field(3, description="channels of an image")
    classes: Size = Field(1000, description="classes to predict")


class UNet(Architecture):
    """Encoder and decoder of convolutions with skip connections, for segmentation."""

    kind: Literal["unet"] = "unet"
    image: Annotated[Sizes, Field(min_length=2, max_length=3)] = Field(
        description="sizes of an image (two) or volume (three)"
    )
    channels: Size = Field(1, description="channels of the input")
    classes: Size = Field(2, description="classes of a point")
    width: Size = Field(64, description="channels of the finest level's second convolution")
    levels: Size = Field(5, description="levels, each with half the resolution of the one before")
    widen: Literal["first", "second"] = Field(
        "first", description="the convolution of a level that doubles the channels on the way "
        "down; with first, up-convolutions halve them (2-D U-Net), with second, they keep them "
        "(3-D U-Net)",
    )  # fmt: skip
    batch_norm: bool = Field(False, description="batch norm before every activation")

    @model_validator(mode="after")
    def _levels_fit(self) -> UNet:
        step = 2 ** (self.levels - 1)
        for size in self.image:
            if size % step:
                raise ValueError(f"{self.levels} levels need sizes divisible by {step}, not {size}")
        return self
