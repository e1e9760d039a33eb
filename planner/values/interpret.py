"""Values: runs a Program with NumPy arrays on virtual devices, one array per device.

Proves that lowering is mathematically the single-device graph. Never looks at a Graph: local
kernels carry the local op, collectives move blocks between the device arrays. Where uneven
dimensions are padded stands no number (0 in integers): a result that depends on it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.program import Block, Collective, Compute, LoopStep, Program, Step
from planner.sharding.spec import Spec, block_length
from planner.values import kernels

Array = NDArray[Any]
Device = tuple[int, ...]
Shards = dict[Device, Array]


def shard(array: Array, spec: Spec, axes: Sequence[tuple[str, int]]) -> Shards:
    """Cuts a whole array into the blocks of every device."""
    sizes = dict(axes)
    shards = {}
    local = spec.local_shape(array.shape, sizes)
    for device in product(*(range(n) for _, n in axes)):
        at = dict(zip(sizes, device, strict=True))
        index = tuple(
            _block(n, d, at, sizes) for n, d in zip(array.shape, spec.dims, strict=True)
        )
        shards[device] = np.array(array[index])
        for d, n in enumerate(local):
            shards[device] = _long(shards[device], d, n)
    return shards


def _long(array: Array, dim: int, length: int) -> Array:
    """`array` cut or padded to `length` points along `dim`."""
    missing = length - array.shape[dim]
    if missing <= 0:
        return array[(slice(None),) * dim + (slice(length),)]
    nothing = np.nan if array.dtype.kind == "f" else 0
    pads = [(0, missing if d == dim else 0) for d in range(array.ndim)]
    return np.pad(array, pads, constant_values=nothing)


def _block(n: int, dim: Sequence[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> slice:
    position = _position(dim, at, sizes)
    width = block_length(n, prod(sizes[a] for a in dim))
    return slice(position * width, (position + 1) * width)


def _position(dim: Sequence[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Which block along a dimension a device holds; the first axis is major."""
    position = 0
    for axis in dim:
        position = position * sizes[axis] + at[axis]
    return position


def unshard(
    shards: Shards, spec: Spec, axes: Sequence[tuple[str, int]],
    shape: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """Puts the blocks together again; replicas must agree. `shape` if something is padded."""
    sizes = dict(axes)
    first = next(iter(shards.values()))
    padded = [
        n * prod(sizes[a] for a in d) for n, d in zip(first.shape, spec.dims, strict=True)
    ]
    whole = np.full(padded, np.nan)
    for device, part in shards.items():
        at = dict(zip(sizes, device, strict=True))
        index = tuple(_block(n, d, at, sizes) for n, d in zip(padded, spec.dims, strict=True))
        seen = whole[index]
        same = np.allclose(seen, part, rtol=1e-9, atol=1e-9, equal_nan=True)
        if not np.isnan(seen).all() and not same:
            raise ValueError("replicas of one block differ")
        whole[index] = part
    index = tuple(slice(n) for n in (padded if shape is None else shape))
    return np.array(whole[index])


@dataclass
class Interpreter:
    """Runs the blocks of `program`; `values` maps buffer ids to the arrays of all devices."""

    program: Program

    def __post_init__(self) -> None:
        self.sizes = dict(self.program.axes)
        self.names = list(self.sizes)
        self.devices = list(product(*(range(n) for n in self.sizes.values())))
        self.values: dict[int, Shards] = {}

    def run(self, inputs: Mapping[str, Shards]) -> dict[str, Shards]:
        for name, buffer in self.program.inputs.items():
            self.values[buffer] = inputs[name]
        self.execute(self.program.block)
        return {name: self.values[b] for name, b in self.program.outputs.items()}

    def execute(self, block: Block) -> None:
        for step in block:
            if isinstance(step, Step):
                self._step(step)
            else:
                self._loop(step)

    def _step(self, step: Step) -> None:
        for instruction in step.instructions:
            if isinstance(instruction, Compute):
                self._compute(instruction)
            else:
                self._collective(instruction)

    def _loop(self, loop: LoopStep) -> None:
        self._step(loop.enter)
        for k in loop.carries:
            self.values[k.entry] = self.values[k.init]
        slices: dict[int, list[Shards]] = {s.outer: [] for s in loop.writes}
        order = range(loop.times)
        for i in reversed(order) if loop.reverse else order:
            for s in loop.reads:
                self.values[s.inner] = {d: a[i] for d, a in self.values[s.outer].items()}
            self.execute(loop.body)
            for s in loop.writes:
                slices[s.outer].append(self.values[s.inner])
            moved = {k.entry: self.values[k.exit] for k in loop.carries}
            self.values.update(moved)
        for k in loop.carries:
            self.values[k.result] = self.values[k.entry]
        for outer, parts in slices.items():
            ordered = parts[::-1] if loop.reverse else parts
            self.values[outer] = {d: np.stack([p[d] for p in ordered]) for d in self.devices}

    # ---- kernels ----------------------------------------------------------------------------

    def _compute(self, c: Compute) -> None:
        op = c.kernel.payload
        sizes = {f.name: f.size for f in op.rule.factors}
        results: list[Shards] = [{} for _ in c.outs]
        for device in self.devices:
            at = dict(zip(self.names, device, strict=True))
            offsets = {
                f: _position(axes, at, self.sizes) * sizes[f]
                for f, axes in c.kernel.offsets.items()
            }
            args = [self.values[b][device] for b in c.ins]
            for k, array in enumerate(kernels.evaluate(op, args, offsets)):
                results[k][device] = array
        for buffer, shards in zip(c.outs, results, strict=True):
            expected = self.program.buffers[buffer].shape
            if any(a.shape != expected for a in shards.values()):
                raise ValueError(f"{c.kernel.name}: local shape differs from {expected}")
            self.values[buffer] = shards

    # ---- collectives ------------------------------------------------------------------------

    def _collective(self, c: Collective) -> None:
        shards = self.values[c.source]
        moved = {d: self._moved(c, shards, d) for d in self.devices}
        for dim, length in enumerate(self.program.buffers[c.result].shape):
            moved = {d: _long(array, dim, length) for d, array in moved.items()}
        self.values[c.result] = moved

    def _group(self, device: Device, axes: Sequence[str]) -> list[Device]:
        """Devices that differ from `device` only on `axes`, in block order (first axis major)."""
        where = [self.names.index(a) for a in axes]
        found = []
        for position in product(*(range(self.sizes[a]) for a in axes)):
            other = list(device)
            for i, p in zip(where, position, strict=True):
                other[i] = p
            found.append(tuple(other))
        return found

    def _moved(self, c: Collective, shards: Shards, device: Device) -> Array:
        group = self._group(device, c.axes)
        own = group.index(device)
        if c.kind == "all-gather":
            return np.concatenate([shards[d] for d in group], axis=c.dim)
        if c.kind == "slice":
            return self._pieces(c, shards[device], c.dim, len(group))[own]
        if c.kind == "mask":
            return shards[device] if own == 0 else np.zeros_like(shards[device])
        if c.kind == "all-to-all":
            pieces = [self._pieces(c, shards[d], c.to_dim, len(group))[own] for d in group]
            return np.concatenate(pieces, axis=c.dim)
        if c.shift:
            return self._handed(c, shards, group, own)
        if c.kind == "collective-permute":
            return shards[self._permuted(c, device)]
        stacked = np.stack([shards[d] for d in group])
        total = stacked.max(axis=0) if c.reduce == "max" else stacked.sum(axis=0)
        if c.kind == "reduce-scatter":
            return self._pieces(c, total, c.dim, len(group))[own]
        return total

    def _pieces(self, c: Collective, array: Array, dim: int, count: int) -> list[Array]:
        """`array`, padded if need be, in pieces as long as the result's blocks."""
        length = self.program.buffers[c.result].shape[dim]
        return np.split(_long(array, dim, length * count), count, axis=dim)

    def _handed(
        self, c: Collective, shards: Shards, group: Sequence[Device], own: int
    ) -> Array:
        """The edge of the neighbour's block, zeros where there is no neighbour."""
        neighbour = (own - c.shift) % len(group) if c.wrap else own - c.shift
        there = 0 <= neighbour < len(group)
        block = shards[group[neighbour if there else own]]
        size = block.shape[c.dim]
        edge = range(size - c.width, size) if c.shift > 0 else range(c.width)
        piece = np.take(block, edge, axis=c.dim)
        return piece if there else np.zeros_like(piece)

    def _permuted(self, c: Collective, device: Device) -> Device:
        """The device that holds, in axis order `c.axes`, the block this one needs in `c.order`."""
        at = dict(zip(self.names, device, strict=True))
        position = _position(c.order, at, self.sizes)
        other = dict(at)
        for axis in reversed(c.axes):
            position, other[axis] = divmod(position, self.sizes[axis])
        return tuple(other[a] for a in self.names)
