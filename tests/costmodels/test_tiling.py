"""How convolutions lie on a TPU, and what is not stored: as compiled programs have it.

Layouts are those that libtpu 0.0.52 prints for v3, such as `bf16[8,512,512,64]{3,0,2,1:T(8,128)}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest

import meshes
from costmodels.pricing import kernel_seconds
from costmodels.program import Compute
from costmodels.tiling import laid, laid_argument
from planner.export.placement import placement
from planner.modelfile import load_model
from planner.planning import price_annotations
from planner.result import Result

MIB = 2**20
TPU, GPU = "tpu-v3:2x2", "dgx-a100-80gb:1x8"


@pytest.mark.parametrize(
    ("shape", "mib"),
    [
        ((8, 512, 512, 64), 512),  # 64 channels on 128 lanes
        ((8, 512, 512, 1), 256),  # one channel: samples on the lanes, T(4,128)
        ((8, 256, 256, 128), 128),
        ((64, 256, 256, 32), 512),  # 64 samples on the lanes take less than 32 channels
        ((4, 128, 128, 192), 32),  # T(4,128): no padding of samples, only of channels
        ((2, 64, 64, 64, 64), 256),  # both are padded to twice
        ((1, 128, 128, 128, 64), 256),  # 128 slices on the lanes
        ((1, 64, 64, 64, 64), 64),
        ((1, 128, 128, 128, 3), 16),
    ],
)
def test_sizes_in_memory(shape: tuple[int, ...], mib: int) -> None:
    assert 2 * prod(laid(shape)) == mib * MIB


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((64, 224, 224, 3), (64, 224, 256, 3)),  # bf16[...]{2,1,3,0:T(8,128)(2,1)}
        ((14, 14, 3, 48), (16, 14, 3, 128)),  # {3,1,2,0:T(8,128)}, as large
        ((48, 6, 48), (48, 6, 128)),
        ((6, 29593), (8, 29696)),
        ((58, 48, 2, 64), (58, 48, 2, 128)),  # T(2,128)
        ((64, 32), (128, 32)),  # {0,1:T(8,128)}
        ((9, 1024, 1), (9, 1024, 1)),
        ((12288,), (12288,)),
    ],
)
def test_sizes_of_arguments(shape: tuple[int, ...], padded: tuple[int, ...]) -> None:
    """As libtpu 0.0.52 lays zoo models' parameters, states and batches on v3 and v4."""
    assert prod(laid_argument(shape)) == prod(padded)


def chain(mesh: str, samples: int, space: Sequence[int], end: str = "mean(y * y)") -> Result:
    """Two convolutions of 64 channels with ReLU between them, `samples` on each of 8 devices."""
    names = "ZYX"[-len(space) :]
    taps = ", ".join("3" * len(space))
    whole = ", ".join(["data", *["null"] * (len(space) + 1)])
    text = f"""
dims: {{B: {8 * samples}, {", ".join(f"{d}: {n}" for d, n in zip(names, space, strict=True))}}}
training: {{batch: B, optimizer: sgd, compute: bf16, remat: none}}
graph:
  inputs: {{x: "bf16[B, {", ".join(names)}, 32]"}}
  params: {{w1: "[{taps}, 32, 64]", w2: "[{taps}, 64, 64]"}}
  ops:
    - a = conv(x, w1)
    - h = relu(a)
    - y = conv(h, w2)
    - loss = {end}
constraints: {{x: [{whole}]}}
"""
    model = load_model(text, "chain.yaml")
    machine = meshes.logical(meshes.resolve(mesh), {"data": 8})
    return price_annotations(model, machine, dict(model.constraints))


def held(result: Result) -> dict[str, list[int]]:
    """MiB of the arrays that are there at the peak, by tensor."""
    found: dict[str, list[int]] = {}
    for name, _, size in result.memory.largest:
        found.setdefault(name, []).append(size // MIB)
    return found


def test_channels_are_padded_and_what_convolutions_compute_is_not_stored() -> None:
    """Of relu(a) only `a` is kept, on 128 lanes; of the argument a copy, with 32 on 128."""
    at_peak = held(chain(TPU, 8, (128, 128)))
    assert at_peak["a"] == [32]
    assert "h" not in at_peak
    assert at_peak["x"] == [8]
    assert at_peak["x.copy"] == [32]


def test_gpus_store_what_is_computed_and_pad_nothing() -> None:
    at_peak = held(chain(GPU, 8, (128, 128)))
    assert at_peak["a"] == at_peak["h"] == [16]
    assert "x.copy" not in at_peak


def test_what_others_read_is_stored() -> None:
    assert held(chain(TPU, 8, (128, 128), "mean(y * y) + mean(h)"))["h"] == [32]


def passes(result: Result, tensor: str) -> list[float]:
    """Seconds of the steps that make a tensor."""
    return [
        kernel_seconds(result.mesh.chip, i.kernel)
        for i, _ in result.program.instructions()
        if isinstance(i, Compute) and result.program.buffers[i.outs[0]].tensor == tensor
    ]


def test_what_convolutions_compute_is_no_pass() -> None:
    assert passes(chain(TPU, 8, (128, 128)), "h") == [0.0]
    assert min(passes(chain(TPU, 8, (128, 128), "mean(y * y) + mean(h)"), "h")) > 0
    assert min(passes(chain(GPU, 8, (128, 128)), "h")) > 0


@pytest.mark.parametrize(
    ("mesh", "samples", "space", "sliced"),
    [
        (TPU, 1, (64, 64, 64), True), (TPU, 1, (256, 256), True), (TPU, 2, (64, 64, 64), False),
        (GPU, 1, (64, 64, 64), False),
    ],
)  # fmt: skip
def test_slices_are_samples_where_a_tpu_has_one(
    mesh: str, samples: int, space: Sequence[int], sliced: bool
) -> None:
    """A window of three slices reads two that are copies, and three where the array that it reads
    is not stored: what ReLU makes, and its gradients."""
    result = chain(mesh, samples, space)
    assert set(placement(result).sliced) == ({"a", "y"} if sliced else set())
    copies = {
        result.program.buffers[made].tensor: len(beside)
        for made, beside in result.program.scratch.items()
    }  # fmt: skip
    expected = {"a": 2, "y": 3, "h.grad": 3, "w2.cast.grad": 3, "w1.cast.grad": 3}
    assert copies == (expected if sliced else {})
