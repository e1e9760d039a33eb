"""Convolutions and poolings whose slices are made the samples of a batch, on TPUs.

Which they are, for the exporter that writes them so and for the memory reading; why is said in
`costmodels/tiling.py`.
"""

from __future__ import annotations

from planner.graph.core import Op
from planner.sharding.choices import Choice

# Where the larger and the smaller array of a convolution stand: operands, -1 the result.
_LARGER = {"conv": 0, "conv_dx": -1, "conv_dw": 0}
_SMALLER = {"conv": -1, "conv_dx": 0, "conv_dw": 1}


def by_slices(op: Op, choice: Choice, local: Op) -> bool:
    """Whether a device has one sample, and the first spatial dimension of it whole; of poolings and
    transposed convolutions if windows do not overlap along it. `local`: what the device runs."""
    a, rank = op.attrs, len(op.attrs.get("taps", ()))
    known = op.kind == "max_pool" or (op.kind in _LARGER and not a["parts"]["b"])
    if not known or rank < 2 or len(op.rule.ins[0]) != rank + 2:
        return False
    whole = not any(choice.split[factor] for factor in op.rule.windows[0])
    alone = local.rule.factors[op.rule.ins[0][0][0]].size == 1
    return whole and alone and (_forward(op) or _apart(op))


def _forward(op: Op) -> bool:
    """Whether it is a convolution, or a gradient of one, that is not transposed."""
    return op.kind in _LARGER and not op.attrs["flipped"]


def _apart(op: Op) -> bool:
    """Poolings and transposed convolutions that make or read every slice once."""
    a = op.attrs
    once = a["stride"][0] == a["taps"][0] and a["dilation"][0] == 1 and a["padding"][0] == (0, 0)
    return once and a["spatial"][0] % a["taps"][0] == 0 and bool(a.get("flipped", True))


def moved_copies(op: Op) -> tuple[int, int]:
    """Which array such a convolution copies (an operand's position, or -1), and how often: what
    windows read beside each other, or the result of a transposed one, whose slices interleave."""
    if op.kind not in _LARGER:
        return 0, 0
    taps, stride = op.attrs["taps"][0], op.attrs["stride"][0]
    if not _forward(op):
        return _LARGER[op.kind], 1
    if stride > 1:
        return _LARGER[op.kind], -(-taps // stride)
    return (_LARGER if op.phase == "forward" else _SMALLER)[op.kind], taps - 1
