"""What one device runs: local compute, collectives over named mesh axes, loops.

A Program is the only thing that the three readings (seconds, bytes, values) look at. It is
plain data: types and sizes live here, no pricing and no semantics. Kernels carry an opaque
`payload` that only the interpreter of values opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

ITEM_BYTES = {
    "f64": 8, "f32": 4, "bf16": 2, "f16": 2, "f8": 1, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
    "u8": 1, "u32": 4, "bool": 1,
}  # fmt: skip

CATEGORIES = (
    "parameters", "gradients", "optimizer", "kv_cache", "activations", "temporaries",
    "collective_buffers",
)  # fmt: skip

MOVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Buffer:
    """A local array. `alias`: the buffer whose memory it takes over (donated state). `laid`: the
    sizes that it takes in memory, if they are larger (see `tiling`)."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    tensor: str
    alias: int | None = None
    laid: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def held_bytes(self) -> int:
        """Bytes in memory, padding of its layout included."""
        return prod(self.laid or self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Kernel:
    """One local computation.

    `dtype`: of the operands of a contraction; of other work, the narrowest type it touches.
    `matmul` is (batch, m, n, k) for contractions. `bytes` is what it moves through device
    memory, `vector_flops` its elementwise work. `model_flops` counts the useful matmul work.
    A product may do elementwise work, too, and read `fused_bytes` for it besides its operands.
    `copies`: of which array a TPU makes copies beside it (position of the operand, -1 the result),
    and how many.
    """

    name: str
    kind: str
    dtype: str
    bytes: float
    vector_flops: float
    matmul: tuple[int, int, int, int] | None = None
    payload: Any = None
    offsets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: tuple[int, int] = (0, 0)
    fused_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """Matmul FLOPs on this device: 2 per multiply-add."""
        return 2.0 * prod(self.matmul) if self.matmul else 0.0


@dataclass(frozen=True)
class Compute:
    kernel: Kernel
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    phase: str = "forward"


@dataclass(frozen=True)
class Collective:
    """A move of data between devices (or a free local `slice` / `mask`).

    `bytes`: full payload on one device (all-gather result, reduce-scatter or all-reduce
    operand, all-to-all and permute operand). `dim` is the dimension gathered, scattered or
    split; `to_dim` the one that grows in an all-to-all. A collective-permute reorders the
    blocks of `dim` from axis order `axes` to `order`; with `shift` it hands `width` points of
    `dim` to the next device (1) or the one before (-1), with `wrap` also from one end to the other.
    """

    kind: str
    axes: tuple[str, ...]
    source: int
    result: int
    bytes: int
    dim: int = -1
    to_dim: int = -1
    order: tuple[str, ...] = ()
    reduce: str = "sum"
    tensor: str = ""
    phase: str = "forward"
    shift: int = 0
    width: int = 0
    wrap: bool = False

    @property
    def ins(self) -> tuple[int, ...]:
        return (self.source,)

    @property
    def pattern(self) -> str:
        """What its price depends on: `kind`, or `shift` where only neighbours exchange."""
        return "shift" if self.shift else self.kind

    @property
    def outs(self) -> tuple[int, ...]:
        return (self.result,)


Instruction = Compute | Collective


@dataclass(frozen=True)
class Step:
    """One graph op with the reshardings around it; all its buffers coexist."""

    name: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class CarryBuffers:
    init: int
    entry: int
    exit: int
    result: int


@dataclass(frozen=True)
class StackBuffers:
    outer: int
    inner: int


@dataclass(frozen=True)
class LoopStep:
    """`times` executions of `body`; `enter` holds the conversions done once before it.
    `narrowed`: buffers that live through the loop because of it (see `narrowing`)."""

    name: str
    times: int
    enter: Step
    body: tuple[Step | LoopStep, ...]
    carries: tuple[CarryBuffers, ...]
    reads: tuple[StackBuffers, ...]
    writes: tuple[StackBuffers, ...]
    reverse: bool = False
    narrowed: tuple[int, ...] = ()


Block = tuple[Step | LoopStep, ...]


@dataclass(frozen=True)
class Program:
    """One device's step. `inputs`, `outputs` map logical tensors to buffers; `copies` are buffers
    that live as long as the inputs (see `gathered`). `remade`: buffers that are never stored, but
    computed by whoever reads them, and what of; `scratch`: buffers beside the making of one (see
    `tiling`)."""

    axes: tuple[tuple[str, int], ...]
    buffers: Mapping[int, Buffer]
    block: Block
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    copies: tuple[int, ...] = ()
    remade: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    scratch: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction with the number of its executions in a step."""
        yield from _walk(self.block, 1)


def _walk(block: Block, times: int) -> Iterator[tuple[Instruction, int]]:
    for step in block:
        if isinstance(step, Step):
            for instruction in step.instructions:
                yield instruction, times
            continue
        for instruction in step.enter.instructions:
            yield instruction, times
        yield from _walk(step.body, times * step.times)
