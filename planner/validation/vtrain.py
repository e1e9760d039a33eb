"""Measured iterations of GPT models on A100 in the CSV layout of vTrain's artifact.

One row is one configuration: sizes of the model, batch, and the three degrees of parallelism of
Megatron. The files are not ours to ship; docs/validation.md says where to get them. What a row
leaves open is taken from the same repository (VIA-Research/vTrain, `src/config.py`, `src/model`):
GPT of Megatron with recomputation of every layer, a vocabulary of 50257 padded as Megatron does,
fp16 with a master copy, gradients in fp16 too, Adam, 1F1B without interleaving, 800 Gb/s of
network per node of 8.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from math import ceil
from typing import Any

from planner.errors import InputError
from planner.validation.layouts import Layout
from planner.validation.runs import Measured, Run, Suite

COLUMNS = (
    "# GPUs", "global batch", "micro batch", "hidden size", "attention heads", "# layers",
    "sequence length", "tensor parallelism", "data parallelism", "pipeline parallelism",
)  # fmt: skip
TIME = "iteration time (ms)"
PARAMETERS = "Parameters (billion)"  # only the file of several nodes has it
SINGLE, MULTI = "vtrain-single", "vtrain-multi"

VOCABULARY = 50257  # of GPT-2
PADDING = 128  # Megatron pads the vocabulary to a multiple of this on every device
NODE = 8  # GPUs
NETWORK_BYTES_PER_S = 800e9 / 8 / NODE * 0.96  # 0.96: of the line rate, as in the catalogue

_DATA, _MODEL = ("data",), ("model",)
# Tensor parallelism as in Shoeybi et al. 2019: heads, feed-forward and vocabulary are split.
_TENSOR = {"N": _MODEL, "F": _MODEL, "V": _MODEL}
MEGATRON = Layout(_TENSOR, {"B": _DATA, **_TENSOR}, literal=True)


def from_text(text: str, file: str) -> Suite:
    """The rows of a file; InputError names the line that is wrong."""
    lines = text.splitlines()
    if not lines:
        raise InputError(f"{file}: empty")
    header = [name.strip() for name in next(csv.reader([lines[0]]))]
    missing = [name for name in (*COLUMNS, TIME) if name not in header]
    if missing:
        raise InputError(f"{file}:1: no column {missing[0]!r}", "the layout is that of vTrain")
    multi = PARAMETERS in header
    runs = [
        _run(dict(zip(header, next(csv.reader([line])), strict=False)), line, f"{file}:{n}", multi)
        for n, line in enumerate(lines[1:], 2)
        if line.strip()
    ]
    if not runs:
        raise InputError(f"{file}: no rows")
    return Suite(MULTI if multi else SINGLE, tuple(runs))


def _run(row: Mapping[str, str], line: str, where: str, multi: bool) -> Run:
    try:
        values = [int(row[name]) for name in COLUMNS]
        seconds = float(row[TIME]) / 1e3
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where}: every column needs a number") from None
    gpus, batch, micro, width, heads, layers, sequence, tensor, data, pipe = values
    if min(values) < 1 or not 0 < seconds < float("inf"):
        raise InputError(f"{where}: numbers must be positive")
    if tensor * data * pipe != gpus or batch % (micro * data):
        raise InputError(f"{where}: the degrees of parallelism do not fit GPUs and batch")
    parts = batch // (micro * data)
    model: dict[str, Any] = {
        "mesh": {
            "topology": _topology(gpus, multi),
            "shape": {"pipe": pipe, "data": data, "model": tensor},
        },
        "training": {
            "batch": batch, "optimizer": "adam", "compute": "f16", "params": "f16",
            "master": True, "gradients": "f16", "remat": "checkpoint",
            "pipeline_microbatches" if pipe > 1 else "accumulation_steps": parts,
        },
        "architecture": {
            "kind": "decoder", "layers": layers, "d_model": width, "heads": heads,
            "sequence": sequence, "biases": True, "positions": "learned",
            "vocab": ceil(VOCABULARY / (PADDING * tensor)) * PADDING * tensor,
        },
    }  # fmt: skip
    if pipe > 1:
        model["pipeline"] = {"axis": "pipe", "schedule": "1f1b"}
    group = f"{gpus} GPUs, h {width}, {layers} layers, batch {batch}"
    name = f"t{tensor} d{data} p{pipe} m{micro}, {group}"
    return Run(
        line, name, "vTrain", model, MEGATRON, Measured(seconds), True, group, NETWORK_BYTES_PER_S
    )


def _topology(gpus: int, multi: bool) -> str:
    if not multi:
        return f"dgx-a100-40gb:1x{gpus}"
    nodes = ceil(gpus / NODE)
    return f"dgx-a100-80gb:{nodes}x{min(gpus, NODE)}"
