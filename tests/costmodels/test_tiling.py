"""How convolutions lie on a TPU, and what is not stored: as compiled programs have it.

Layouts are those that libtpu 0.0.52 prints for v3, such as `bf16[8,512,512,64]{3,0,2,1:T(8,128)}`.
"""

from __future__ import annotations

from math import prod

import pytest

from costmodels.tiling import laid

MIB = 2**20
MESH = "tpu-v3:2x2"


@pytest.mark.parametrize(
    "shape, mib",
    [
        ((8, 512, 512, 64), 512),  # 64 channels on 128 lanes
        ((8, 512, 512, 1), 256),  # one channel: samples on the lanes, T(4,128)
        ((8, 256, 256, 128), 128),
        ((64, 256, 256, 32), 512),  # 64 samples on the lanes take less than 32 channels
        ((4, 128, 128, 192), 32),  # T(4,128): 4 samples need no padding, 192 channels do
        ((1, 128, 128, 128, 64), 256),  # 128 slices on the lanes
        ((1, 64, 64, 64, 64), 64),
        ((1, 128, 128, 128, 3), 16),
    ],
)
def test_sizes_in_memory(shape: tuple[int, ...], mib: int) -> None:
    assert 2 * prod(laid(shape)) == mib * MIB
