"""What a compiled program executes in one step: collectives, matmul FLOPs, estimated cycles.

Loops count with their trip counts; of the branches of a conditional the one that moves most
bytes counts. Collectives are named by kind and by the mesh axes their groups run along.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from planner.verify.hlo import (
    Array,
    Computation,
    HloError,
    Instruction,
    Module,
    trip_count,
)
from planner.verify.hlo_uses import roles

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
FUSED_SCATTER = "all-reduce-scatter"  # name of the TPU compiler's fused reduce-scatter


@dataclass(frozen=True)
class Executed:
    """A collective: `bytes` is one execution's full payload on one device, `count` executions
    in a step. `axes`: mesh axes its groups run along; parts of an axis as 'y/2'."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    name: str
    op_name: str = ""
    asynchronous: bool = False
    stands_for: str = ""  # another kind whose place this one takes
    chain: str = ""  # the TPU compiler's fusions that carry out one collective piece by piece

    @property
    def phase(self) -> str:
        """forward, recompute, backward or update, from the names that JAX gives operations."""
        if "rematted_computation" in self.op_name:
            return "recompute"
        if "transpose(" in self.op_name:
            return "backward"
        return "forward" if "jvp(" in self.op_name else "update"


@dataclass
class Reading:
    """Totals of one step on one device."""

    collectives: list[Executed] = field(default_factory=list)
    flops: float = 0.0
    cycles: float = 0.0
    cycles_by_phase: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Reading, times: int) -> None:
        self.collectives += [replace(c, count=c.count * times) for c in other.collectives]
        self.flops += other.flops * times
        self.cycles += other.cycles * times
        for phase, cycles in other.cycles_by_phase.items():
            self.cycles_by_phase[phase] += cycles * times

    @property
    def moved_bytes(self) -> int:
        return sum(c.bytes * c.count for c in self.collectives)


def read(module: Module, axes: Sequence[tuple[str, int]]) -> Reading:
    """What one device executes; `axes` are the mesh axes (name, size) in the devices' order."""
    return _Reader(module, axes).computation(module.entry)


@dataclass
class _Reader:
    module: Module
    axes: Sequence[tuple[str, int]]
    done: dict[str, Reading] = field(default_factory=dict)

    def computation(self, name: str) -> Reading:
        if name not in self.done:
            computation = self.module.computations[name]
            total = Reading()
            for instruction in computation.instructions:
                total.add(self.instruction(computation, instruction), 1)
            total.collectives = _once_per_chain(total.collectives)
            self.done[name] = total
        return self.done[name]

    def instruction(self, scope: Computation, i: Instruction) -> Reading:
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            return self._collective(scope, i, kind)
        if i.opcode == "while":
            return self._loop(scope, i)
        if i.opcode == "conditional":
            return self._branches(i)
        if i.opcode == "fusion":
            return self._fusion(scope, i)
        if i.opcode in ("call", "async-start"):
            return self.computation(i.called("to_apply") or i.called("calls") or "")
        found = Reading(flops=self._flops(scope, i), cycles=i.estimated_cycles)
        found.cycles_by_phase[_phase(i)] += found.cycles
        return found

    def _loop(self, scope: Computation, i: Instruction) -> Reading:
        found = Reading()
        times = trip_count(self.module, scope, i)
        found.add(self.computation(i.called("body") or ""), times)
        return found

    def _branches(self, i: Instruction) -> Reading:
        listed = i.attribute("branch_computations")
        names = re.findall(r"%?([\w.\-]+)", listed) if listed else [
            i.called("true_computation") or "", i.called("false_computation") or "",
        ]  # fmt: skip
        return max((self.computation(n) for n in names), key=lambda r: (r.moved_bytes, r.flops))

    def _fusion(self, scope: Computation, i: Instruction) -> Reading:
        """Its inside, with the cycles of the fusion itself."""
        called = i.called("calls") or ""
        inside = self.computation(called)
        found = Reading(flops=inside.flops, cycles=i.estimated_cycles)
        found.cycles_by_phase[_phase(i)] += found.cycles
        scatter = called.startswith(FUSED_SCATTER)
        for c in inside.collectives:
            kind = "reduce-scatter" if scatter and c.kind == "all-reduce" else c.kind
            found.collectives.append(
                replace(c, kind=kind, name=i.name, op_name=c.op_name or i.op_name)
            )
        return found

    # ---- collectives ------------------------------------------------------------------------

    def _collective(self, scope: Computation, i: Instruction, kind: str) -> Reading:
        if kind == "collective-permute":
            axes, size = self._permuted(i), 1
        else:
            groups = i.replica_groups
            if groups.size == 0:
                groups = np.arange(prod(n for _, n in self.axes))[None, :]
            axes, size = self._axes_of(groups), groups.shape[1]
        if size == 1 and kind != "collective-permute":
            return Reading()  # a group of one moves nothing
        found = Reading(cycles=i.estimated_cycles)
        chain = re.search(r'chain_id="(\d+)"', i.rest)
        asynchronous = i.opcode.endswith("-start") or chain is not None
        own = f"{chain[1]}/{i.attribute('channel_id')}" if chain else ""
        for role, total in self._payloads(scope, i, kind).items():
            count = total * (size if kind == "all-gather" else 1)
            found.collectives.append(
                Executed(kind, axes, count, 1, i.name, i.op_name, asynchronous, role, own)
            )
        return found

    def _payloads(self, scope: Computation, i: Instruction, kind: str) -> dict[str, int]:
        """Bytes of the operands, by the kind that the collective stands for with them."""
        sizes = [sum(a.bytes for a in scope.by_name[name].shape) for name in i.operands]
        if kind == "collective-permute":
            return {_window_of(scope, i): sum(sizes)}
        if kind != "all-reduce":
            return {"": sum(sizes)}
        found: dict[str, int] = defaultdict(int)
        for role, size in zip(roles(self.module, scope, i), sizes, strict=True):
            found[role] += size
        return found

    def _axes_of(self, groups: np.ndarray) -> tuple[str, ...]:
        """Mesh axes along which the members of a group differ."""
        group = np.sort(groups[0])
        sizes = [n for _, n in self.axes]
        if group.max() >= prod(sizes):
            raise HloError(f"device {group.max()} is not in the mesh {dict(self.axes)}")
        places = np.stack(np.unravel_index(group, sizes))
        found = []
        for (name, size), row in zip(self.axes, places, strict=True):
            different = len(np.unique(row))
            if different > 1:
                found.append(name if different == size else f"{name}/{different}")
        return tuple(found)

    def _permuted(self, i: Instruction) -> tuple[str, ...]:
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attribute("source_target_pairs") or "")
        sizes = [n for _, n in self.axes]
        moved = set()
        for source, target in pairs:
            at = zip(
                np.unravel_index(int(source), sizes), np.unravel_index(int(target), sizes),
                strict=True,
            )  # fmt: skip
            moved |= {k for k, (a, b) in enumerate(at) if a != b}
        return tuple(name for k, (name, _) in enumerate(self.axes) if k in moved)

    # ---- FLOPs ------------------------------------------------------------------------------

    def _flops(self, scope: Computation, i: Instruction) -> float:
        if i.opcode == "dot":
            left = scope.operand_arrays(i)[0].shape
            over = _sizes_at(left, i.attribute("lhs_contracting_dims") or "{}")
            return 2.0 * prod(i.shape[0].shape) * prod(over)
        if i.opcode == "convolution":
            return convolution_flops(i, scope.operand_arrays(i))
        if i.opcode == "custom-call":
            return _library_flops(scope, i)
        return 0.0


def _once_per_chain(collectives: Sequence[Executed]) -> list[Executed]:
    """The start, the steps beside other work, and the end of one collective are one."""
    seen: set[str] = set()
    kept = []
    for c in collectives:
        if not c.chain or c.chain not in seen:
            kept.append(c)
            seen.add(c.chain)
    return kept


def _window_of(scope: Computation, i: Instruction) -> str:
    """What a permute of a decomposed matmul stands for, else "".

    XLA names the loop's body after it. Unrolled, a reduce-scatter sends sums (the first ones
    zero) and an all-gather the operand as it is.
    """
    body = re.search(r"windowed_dot_general_body_(ag|rs)", scope.name)
    if body:
        return {"ag": "all-gather", "rs": "reduce-scatter"}[body[1]]
    if not i.op_name.endswith("dot_general"):
        return ""
    sent = scope.by_name[i.operands[0]]
    while sent.opcode in ("get-tuple-element", "bitcast", "copy"):
        sent = scope.by_name[sent.operands[0]]
    sums = sent.opcode in ("broadcast", "add") or "add" in sent.name
    return "reduce-scatter" if sums else "all-gather"


def _phase(i: Instruction) -> str:
    return Executed("", (), 0, 1, i.name, i.op_name).phase


def _sizes_at(shape: Sequence[int], dims: str) -> list[int]:
    return [shape[int(n)] for n in re.findall(r"\d+", dims)]


def _library_flops(scope: Computation, i: Instruction) -> float:
    """Matmuls and convolutions that the GPU compiler hands to a library."""
    target = i.attribute("custom_call_target") or ""
    operands = scope.operand_arrays(i)
    if "gemm" in target or "matmul" in target:
        over = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)
        if over is None:
            raise HloError(f"'{i.name}' has no contracting dimensions")
        return 2.0 * prod(i.shape[0].shape) * prod(_sizes_at(operands[0].shape, over[1]))
    if "conv" in target.lower() and i.attribute("dim_labels"):
        return _library_convolution(target, i, operands)
    return 0.0


def _library_convolution(target: str, i: Instruction, operands: Sequence[Array]) -> float:
    """Every tap counts, as in the model. Backward ones keep the labels of the forward one."""
    taps, made = operands[1], i.shape[0]
    if "BackwardInput" in target:
        made = operands[0]
    elif "BackwardFilter" in target:
        taps, made = i.shape[0], operands[1]
    kernel = re.split(r"_|->", i.attribute("dim_labels") or "")[1]
    return 2.0 * prod(made.shape) * prod(taps.shape) / taps.shape[kernel.index("o")]


def convolution_flops(i: Instruction, operands: Sequence[Array]) -> float:
    """2 per multiply-add over pairs of window and input positions that hold a value.

    Positions in the padding and in the holes of a dilated input do not count: the TPU compiler
    writes batched matmuls as convolutions whose windows mostly hit such positions.
    """
    labels = i.attribute("dim_labels") or ""
    left, right, out = re.split(r"_|->", labels)
    lhs, rhs, result = operands[0].shape, operands[1].shape, i.shape[0].shape
    spatial = sorted(c for c in left if c.isdigit())
    window = _window(i.attribute("window") or "{}", len(spatial))
    pairs = 1
    for d, c in enumerate(spatial):
        pairs *= _valid_pairs(lhs[left.index(c)], result[out.index(c)], window, d)
    batch, features = result[out.index("b")], result[out.index("f")]
    per_group = int(i.attribute("batch_group_count") or 1)
    inputs = rhs[right.index("i")]  # input features of one group
    return 2.0 * batch * features * inputs * pairs / per_group


Window = Mapping[str, Sequence[tuple[int, ...]]]


def _window(text: str, rank: int) -> Window:
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", text))
    found: dict[str, list[tuple[int, ...]]] = {}
    defaults = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1",
                "rhs_reversal": "0"}  # fmt: skip
    for key, default in defaults.items():
        parts = fields[key].split("x") if key in fields else [default] * rank
        found[key] = [tuple(int(n) for n in part.split("_")) for part in parts]
    return found


def _valid_pairs(size: int, results: int, window: Window, d: int) -> int:
    """Pairs (result position, tap) along one dimension that meet an input value."""
    (taps,), (stride,) = window["size"][d], window["stride"][d]
    (dilate,), (spread,) = window["rhs_dilate"][d], window["lhs_dilate"][d]
    low = window["pad"][d][0]
    at = np.arange(results)[:, None] * stride + np.arange(taps)[None, :] * dilate - low
    inside = (at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)
    return int(inside.sum())
