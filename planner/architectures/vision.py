"""Vision transformer and conformer: transformer layers behind a convolutional stem.

Dimensions: Y, X image rows and columns (for speech: frames and features), C channels, S
positions, D model, V classes.
"""

from __future__ import annotations

from planner.architectures.blocks import (
    TOKENS,
    activated,
    added,
    attended,
    declared,
    fed_forward,
    layer,
    normed,
    projected,
)
from planner.architectures.settings import SUBSAMPLING, Conformer, VisionTransformer
from planner.graph import expr as ex
from planner.graph import layers, windows
from planner.graph.builder import Builder
from planner.graph.structural import reshape

STEM_TAPS = 3  # of each of the two subsampling convolutions, Gulati et al. 2020


def vision_transformer(b: Builder, s: VisionTransformer, batch: int) -> str:
    """Patches as a strided convolution, learned positions, layers, mean, classes."""
    images = b.input(
        "images", (batch, s.image, s.image, s.channels), ("B", "Y", "X", "C"), b.compute
    )
    targets = b.input("targets", (batch,), ("B",), "i32")
    w = b.param(
        "w_patch", (s.patch, s.patch, s.channels, s.d_model), ("patch_y", "patch_x", "C", "D")
    )
    x = windows.conv(b, images, w, stride=s.patch, padding="valid", name="patches")
    x = reshape(b, x, (batch, (s.image // s.patch) ** 2, s.d_model), TOKENS, "x")
    positions = b.param("positions", b.lookup(x).shape[1:], TOKENS[1:])
    x = added(b, "x.placed", x, positions)
    body = b.repeat("layers", s.layers)
    entry = body.enter(x)
    (x,) = body.end_repeat([(x, entry, layer(body, entry, s, False))])
    x = normed(b, x, s.norm, s.biases, "ln_f")
    mean = ex.div(ex.x(0), ex.c(b.lookup(x).shape[1]))
    pooled = b.map("pooled", [(x, TOKENS)], ("B", "D"), mean)
    w = b.param("w_class", (s.d_model, s.classes), ("D", "V"))
    bias = b.param("b_class", (s.classes,), ("V",))
    logits = projected(b, "B D, D V -> B V", pooled, w, "logits", bias)
    return layers.cross_entropy(b, logits, targets)


def conformer(b: Builder, s: Conformer, batch: int) -> str:
    """Subsampling, conformer layers, a prediction per position; returns the loss."""
    length = s.frames // SUBSAMPLING
    frames = b.input("frames", (batch, s.frames, s.features, 1), ("B", "Y", "X", "C"), b.compute)
    targets = b.input("targets", (batch, length), TOKENS[:2], "i32")
    x = conformer_stack(b, "layers", subsampled(b, s, frames), s)
    w = b.param("unembed", (s.d_model, s.vocab), ("D", "V"))
    return layers.cross_entropy(b, b.einsum("B S D, D V -> B S V", x, w, name="logits"), targets)


def conformer_stack(b: Builder, name: str, x: str, s: Conformer) -> str:
    """The conformer layers as a repeat called `name`."""
    body = b.repeat(name, s.layers)
    entry = body.enter(x)
    return body.end_repeat([(x, entry, conformer_layer(body, entry, s))])[0]


def subsampled(b: Builder, s: Conformer, x: str) -> str:
    """Two convolutions of stride 2 over frames and features, then a projection: [B, S, D]."""
    sizes = (1, s.d_model, s.d_model)
    for i in range(2):
        w = b.param(
            f"w_stem{i + 1}", (STEM_TAPS, STEM_TAPS, sizes[i], sizes[i + 1]),
            ("taps_y", "taps_x", "I", "C"),
        )  # fmt: skip
        x = windows.conv(b, x, w, stride=2, name=f"stem{i + 1}.conv")
        bias = b.param(f"b_stem{i + 1}", (s.d_model,), ("C",))
        x = b.pointwise(f"stem{i + 1}", ex.relu(ex.add(ex.x(0), ex.x(1))), x, bias)
    features = s.features // SUBSAMPLING
    w = b.param("w_stem", (features, s.d_model, s.d_model), ("X", "C", "D"))
    bias = b.param("b_stem", (s.d_model,), ("D",))
    return projected(b, "B S X C, X C D -> B S D", x, w, "x", bias)


def conformer_layer(b: Builder, x: str, s: Conformer) -> str:
    """Half feed-forward, attention, convolution, half feed-forward, norm (Gulati et al. 2020)."""
    x = half_fed_forward(b, x, s, "ff1_")
    h = normed(b, x, s.norm, s.biases, "ln1")
    x = added(b, "mid", x, attended(b, h, h, s, False))
    x = added(b, "convolved", x, convolution_module(b, x, s))
    x = half_fed_forward(b, x, s, "ff2_")
    return normed(b, x, s.norm, s.biases, "ln_out")


def half_fed_forward(b: Builder, x: str, s: Conformer, prefix: str) -> str:
    h = normed(b, x, s.norm, s.biases, f"{prefix}ln")
    half = ex.add(ex.x(0), ex.mul(ex.c(0.5), ex.x(1)))
    return b.pointwise(f"{prefix}x", half, x, fed_forward(b, h, s, prefix))


def convolution_module(b: Builder, x: str, s: Conformer) -> str:
    """Gated projection, depthwise convolution over positions, batch norm, projection."""
    h = normed(b, x, s.norm, s.biases, "conv_ln")

    def point(name: str, operand: str, come: str, go: str) -> str:
        w = declared(b, f"conv_w_{name}", f"{come} {go}", s)
        bias = declared(b, f"conv_b_{name}", go, s) if s.biases else None
        spec = f"B S {come}, {come} {go} -> B S {go}"
        return projected(b, spec, operand, w, f"conv_{name}", bias)

    gate = ex.mul(ex.x(0), ex.call("sigmoid", ex.x(1)))
    h = b.pointwise("conv_gated", gate, point("in", h, "D", "C"), point("gate", h, "D", "C"))
    w = b.param("conv_w_depth", (s.kernel, 1, s.d_model), ("taps", "I", "C"))
    h = windows.conv(b, h, w, groups=s.d_model, name="conv_depth")
    scale, bias = (b.param(f"conv_bn{n}", (s.d_model,), ("C",)) for n in ("", "_bias"))
    h = layers.batch_norm(b, h, scale, bias, "conv_bn.out")
    h = b.pointwise("conv_h", activated(s.activation, ex.x(0)), h)
    return point("out", h, "C", "D")
