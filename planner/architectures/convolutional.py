"""Convolutional networks: ResNet for classification, U-Net in two and three dimensions.

Dimensions: Z, Y, X space, C channels (I those of a weight's input), V classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.architectures.blocks import added, projected
from planner.architectures.settings import ResNet, UNet
from planner.graph import expr as ex
from planner.graph import layers, windows
from planner.graph.builder import Builder
from planner.graph.structural import concat

EXPANSION = 4  # channels of a bottleneck block's result per narrow channel, He et al. 2016
SPACE = ("Z", "Y", "X")


def filters(b: Builder, name: str, taps: Sequence[int], channels: tuple[int, int]) -> str:
    """A new weight [taps…, channels in, channels out]."""
    dims = [f"taps_{d.lower()}" for d in SPACE[-len(taps) :]]
    return b.param(name, (*taps, *channels), (*dims, "I", "C"))


def batch_normed(b: Builder, x: str, name: str) -> str:
    """Batch norm with a scale called `name` and a bias called `name`_bias."""
    channels = b.lookup(x).shape[-1:]
    scale, bias = (b.param(n, channels, ("C",)) for n in (name, f"{name}_bias"))
    return layers.batch_norm(b, x, scale, bias, f"{name}.out")


# ---- ResNet ----------------------------------------------------------------------------------


def resnet(b: Builder, s: ResNet, batch: int) -> str:
    """Stem, stages of bottleneck blocks, mean over space, classes; returns the loss."""
    shape = (batch, s.image, s.image, s.channels)
    images = b.input("images", shape, ("B", "Y", "X", "C"), b.compute)
    targets = b.input("targets", (batch,), ("B",), "i32")
    x = convolved(b, images, "stem", 7, s.width, stride=2)
    x = windows.max_pool(b, x, window=3, stride=2, padding="same", name="stem.pool")
    for i, count in enumerate(s.blocks):
        x = stage(b, x, s, i, count)
    x = windows.global_avg_pool(b, x, "pooled")
    w = b.param("w_class", (b.lookup(x).shape[-1], s.classes), ("C", "V"))
    bias = b.param("b_class", (s.classes,), ("V",))
    logits = projected(b, "B C, C V -> B V", x, w, "logits", bias)
    return layers.cross_entropy(b, logits, targets)


def convolved(
    b: Builder, x: str, name: str, taps: int, channels: int, stride: int = 1, active: bool = True
) -> str:
    """Convolution without bias, batch norm, ReLU."""
    w = filters(b, f"w_{name}", (taps, taps), (b.lookup(x).shape[-1], channels))
    h = windows.conv(b, x, w, stride=stride, name=f"{name}.conv")
    h = batch_normed(b, h, f"bn_{name}")
    return b.pointwise(f"{name}.act", ex.relu(ex.x(0)), h) if active else h


def stage(b: Builder, x: str, s: ResNet, index: int, count: int) -> str:
    """A block that halves the resolution (but in the first stage), then equal ones in a repeat."""
    narrow = s.width * 2**index
    name = f"stage{index + 1}"
    stride = 1 if index == 0 else 2
    x = bottleneck(b, x, s, narrow, stride, f"{name}_")
    if count == 1:
        return x
    body = b.repeat(name, count - 1)
    entry = body.enter(x)
    (x,) = body.end_repeat([(x, entry, bottleneck(body, entry, s, narrow, 1, ""))])
    return x


def bottleneck(b: Builder, x: str, s: ResNet, narrow: int, stride: int, prefix: str) -> str:
    """1×1, 3×3 (with the stride, as in version 1.5), 1×1 convolutions around a shortcut."""
    wide, inner = narrow * EXPANSION, narrow * s.width_factor
    h = convolved(b, x, f"{prefix}1", 1, inner)
    h = convolved(b, h, f"{prefix}2", 3, inner, stride)
    h = convolved(b, h, f"{prefix}3", 1, wide, active=False)
    if prefix:  # the first block of a stage changes the number of channels
        x = convolved(b, x, f"{prefix}skip", 1, wide, stride, active=False)
    return b.pointwise(f"{prefix}out", ex.relu(ex.add(ex.x(0), ex.x(1))), x, h)


# ---- U-Net -----------------------------------------------------------------------------------


def unet(b: Builder, s: UNet, batch: int) -> str:
    """Levels down, levels up with skip connections, classes of every point; returns the loss."""
    space = SPACE[-len(s.image) :]
    images = b.input("images", (batch, *s.image, s.channels), ("B", *space, "C"), b.compute)
    targets = b.input("targets", (batch, *s.image), ("B", *space), "i32")
    x, skips = images, []
    for i in range(s.levels):
        if i:
            skips.append(x)
            x = windows.max_pool(b, x, window=2, name=f"down{i}.pool")
        wide = s.width * 2**i
        x = twice(b, s, x, f"down{i}", (wide if s.widen == "first" else wide // 2, wide))
    for i, skip in reversed(list(enumerate(skips))):
        x = upward(b, s, x, skip, i)
    w = b.param("w_class", (b.lookup(x).shape[-1], s.classes), ("C", "V"))
    bias = b.param("b_class", (s.classes,), ("V",))
    points = " ".join(("B", *space))
    logits = projected(b, f"{points} C, C V -> {points} V", x, w, "logits", bias)
    return layers.cross_entropy(b, logits, targets)


def upward(b: Builder, s: UNet, x: str, skip: str, level: int) -> str:
    """Up-convolution by two, the skip connection's channels beside it, two convolutions."""
    name, taps = f"up{level}", (2,) * len(s.image)
    come, wide = b.lookup(x).shape[-1], b.lookup(skip).shape[-1]
    go = come // 2 if s.widen == "first" else come
    w = filters(b, f"w_{name}", taps, (come, go))
    x = windows.conv_transpose(b, x, w, stride=2, padding="same", name=f"{name}.conv")
    x = added(b, f"{name}.x", x, b.param(f"b_{name}", (go,), ("C",)))
    return twice(b, s, concat(b, [skip, x], -1, name=f"{name}.both"), name, (wide, wide))


def twice(b: Builder, s: UNet, x: str, name: str, channels: tuple[int, int]) -> str:
    """Two convolutions of 3 taps per dimension, each with bias, batch norm if asked for, ReLU."""
    for i, count in enumerate(channels):
        own = f"{name}_{i + 1}"
        w = filters(b, f"w_{own}", (3,) * len(s.image), (b.lookup(x).shape[-1], count))
        x = windows.conv(b, x, w, name=f"{own}.conv")
        bias = b.param(f"b_{own}", (count,), ("C",))
        if s.batch_norm:
            x = batch_normed(b, added(b, f"{own}.biased", x, bias), f"bn_{own}")
            x = b.pointwise(f"{own}.act", ex.relu(ex.x(0)), x)
        else:
            x = b.pointwise(f"{own}.act", ex.relu(ex.add(ex.x(0), ex.x(1))), x, bias)
    return x
