"""Predicted against compiled: bytes, collectives, FLOPs, time, each with its threshold.

Only numbers are compared here; how they are shown is in `show.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod

from costmodels.program import MOVES, Block, Collective, Compute, Kernel, LoopStep, Program
from meshes import LogicalMesh
from planner.graph.builder import contraction_sizes
from planner.graph.core import Op
from planner.result import Result
from planner.verify.compile import Compiled
from planner.verify.hlo_reading import Executed, Reading
from planner.verify.normalise import Moved, Totals, normalised, raw


@dataclass(frozen=True)
class Thresholds:
    """Largest accepted |predicted / compiled − 1|."""

    arguments: float = 0.01
    peak: float = 0.15
    collectives: float = 0.25
    flops: float = 0.02
    compute: float = 0.15
    minor: float = 0.01  # collectives below this share of all moved bytes are not judged


@dataclass(frozen=True)
class Row:
    """One comparison. `threshold` None: shown, not judged."""

    name: str
    unit: str
    predicted: float | None
    compiled: float | None
    threshold: float | None = None

    @property
    def error(self) -> float | None:
        """predicted / compiled − 1."""
        if self.predicted is None or self.compiled is None:
            return None
        if self.compiled == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return self.predicted / self.compiled - 1

    @property
    def exceeded(self) -> bool:
        return (
            self.threshold is not None
            and self.error is not None
            and abs(self.error) > self.threshold
        )


@dataclass(frozen=True)
class Verification:
    """What `plan verify` found. `rows` are quantities, `collectives` bytes by kind and axes in
    the normal form, `raw` the same as predicted and as compiled."""

    model: str
    mesh: str
    compiled: Compiled
    fits: bool
    limit_bytes: int
    rows: tuple[Row, ...]
    collectives: tuple[Row, ...]
    raw: tuple[Row, ...]
    held_bytes: int = 0  # of the compiled peak: what the program leaves out
    note: str = ""  # where the program does not say what the plan does

    @property
    def judged(self) -> tuple[Row, ...]:
        return (*self.rows, *self.collectives)

    @property
    def false_fits(self) -> bool:
        """Predicted to fit, but the compiler ran out of memory, or would have with what its
        program leaves out. The CPU's memory is no one's."""
        needed = (self.compiled.peak_bytes or 0) + self.held_bytes
        held = self.held_bytes > 0 and self.compiled.backend != "cpu" and needed > self.limit_bytes
        return self.fits and (held or self.compiled.status == "exhausted")

    @property
    def ok(self) -> bool:
        """Whether every judged figure is within its threshold (exit code 0, else 1)."""
        return not self.false_fits and not any(r.exceeded for r in self.judged)


def compare(
    result: Result, compiled: Compiled, reading: Reading | None, thresholds: Thresholds,
    held_bytes: int = 0,
) -> Verification:  # fmt: skip
    """`reading`: the compiled program's; None if there is none (out of memory). `held_bytes`: what
    the device has besides the program, in the predicted peak but not the compiled one."""
    rows = memory_rows(result, compiled, thresholds, held_bytes)
    collectives: tuple[Row, ...] = ()
    as_is: tuple[Row, ...] = ()
    if reading is not None:
        rows += work_rows(result, compiled, reading, thresholds)
        sizes = dict(result.mesh.axes)
        moves = list(predicted_moves(result.one_program)), list(compiled_moves(reading.collectives))
        # XLA's CPU backend widens bf16 to f32, and so what it moves: nothing to judge then.
        widened = compiled.backend == "cpu" and result.model.workload.compute != "f32"
        collectives = collective_rows(
            normalised(moves[0], sizes), normalised(moves[1], sizes),
            None if widened else thresholds,
        )  # fmt: skip
        as_is = collective_rows(raw(moves[0]), raw(moves[1]), None)
    return Verification(
        result.model.name, result.mesh.describe(), compiled, result.fits, result.limit_bytes,
        rows, collectives, as_is, held_bytes,
    )  # fmt: skip


# ---- memory --------------------------------------------------------------------------------------


def memory_rows(
    result: Result, compiled: Compiled, t: Thresholds, held_bytes: int = 0
) -> tuple[Row, ...]:
    """Arguments, peak, temporaries. The CPU's memory is no one's: shown, not judged."""
    arguments = argument_bytes(result.one_program)
    peak = result.memory.peak_bytes
    found = None if compiled.peak_bytes is None else compiled.peak_bytes + held_bytes
    # Out of memory, the compiler only gives a lower bound: then the verdict is whether it fits.
    judged = compiled.backend != "cpu" and compiled.status == "compiled"
    return (
        Row("arguments", "B", arguments, compiled.argument_bytes, t.arguments if judged else None),
        Row("peak", "B", peak, found, t.peak if judged else None),
        Row("temporaries", "B", max(result.memory.profile) - arguments, compiled.temp_bytes),
    )


def argument_bytes(program: Program) -> int:
    """Parameters, optimizer states and the batch on one device."""
    return sum(program.buffers[b].held_bytes for b in program.inputs.values())


# ---- work ----------------------------------------------------------------------------------------


def work_rows(
    result: Result, compiled: Compiled, reading: Reading, t: Thresholds
) -> tuple[Row, ...]:
    flops = sum(
        written_flops(i.kernel) * n
        for i, n in result.program.instructions() if isinstance(i, Compute)
    )  # fmt: skip
    rows = [Row("FLOPs per device", "FLOP", flops, reading.flops, t.flops)]
    if compiled.backend == "tpu":
        # libtpu has no estimate of some products that it decomposes.
        known = isfinite(reading.cycles)
        seconds = reading.cycles / clock_hz(result.mesh) if known else None
        threshold = t.compute if known else None
        rows.append(Row("compute time", "s", result.timing.compute_s, seconds, threshold))
    return tuple(rows)


def written_flops(kernel: Kernel) -> float:
    """Of a kernel as the exported program has it: what only stands for a gather (experts without
    capacity limits) is a product with a mask there."""
    op = kernel.payload
    picked = contraction_sizes(op) if isinstance(op, Op) and op.attrs.get("picks") else None
    return kernel.flops if picked is None else 2.0 * prod(picked)


def clock_hz(mesh: LogicalMesh) -> float:
    """What turns the compiler's estimated cycles into seconds."""
    return mesh.chip.clock_hz


# ---- collectives ---------------------------------------------------------------------------------


def predicted_moves(program: Program) -> Iterable[Moved]:
    order = [name for name, _ in program.axes]
    sliced = _only_sliced(program)
    for i, times in program.instructions():
        if isinstance(i, Collective) and i.kind in MOVES:
            axes = tuple(sorted(i.axes, key=order.index))
            scatters = i.kind == "all-reduce" and i.result in sliced
            yield Moved(i.kind, axes, i.bytes * times, "reduce-scatter" if scatters else "")


def _only_sliced(program: Program) -> set[int]:
    """Buffers of which every reader takes only its slice."""
    sliced: set[int] = set()
    read: set[int] = set(program.outputs.values())
    for i, _ in program.instructions():
        slices = isinstance(i, Collective) and i.kind == "slice"
        (sliced if slices else read).update(i.ins)
    return sliced - read - _handed_on(program.block)


def _handed_on(block: Block) -> set[int]:
    """Buffers that loops carry or stack."""
    found: set[int] = set()
    for step in block:
        if isinstance(step, LoopStep):
            found.update(b for k in step.carries for b in (k.init, k.exit))
            found.update(s.outer for s in step.reads)
            found.update(s.inner for s in step.writes)
            found |= _handed_on(step.body)
    return found


def compiled_moves(collectives: Iterable[Executed]) -> Iterable[Moved]:
    """All permutes of a decomposed matmul are of one kind: a reduce-scatter if any sends sums."""
    found = list(collectives)
    windows: dict[str, str] = {}
    for c in found:
        if c.kind == "collective-permute" and c.stands_for:
            sums = windows.get(c.op_name) == "reduce-scatter"
            windows[c.op_name] = "reduce-scatter" if sums else c.stands_for
    for c in found:
        permute = c.kind == "collective-permute"
        stands_for = windows.get(c.op_name, "") if permute else c.stands_for
        yield Moved(c.kind, c.axes, c.bytes * c.count, stands_for)


def collective_rows(predicted: Totals, compiled: Totals, t: Thresholds | None) -> tuple[Row, ...]:
    """One row per kind and axes, largest first; without thresholds nothing is judged."""
    everything = sum(compiled.values()) or sum(predicted.values())
    keys = sorted(
        {*predicted, *compiled},
        key=lambda k: (-max(predicted.get(k, 0), compiled.get(k, 0)), k),
    )
    rows = []
    for kind, axes in keys:
        mine, theirs = predicted.get((kind, axes), 0.0), compiled.get((kind, axes), 0.0)
        minor = t is None or max(mine, theirs) < t.minor * everything
        threshold = None if t is None or minor else t.collectives
        rows.append(Row(f"{kind} over {'+'.join(axes)}", "B", mine, theirs, threshold))
    return tuple(rows)


def summary(rows: Iterable[Row]) -> Mapping[str, float | None]:
    """Median and worst |error| of judged rows."""
    errors = sorted(abs(r.error) for r in rows if r.threshold is not None and r.error is not None)
    if not errors:
        return {"median": None, "worst": None}
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    return {"median": median, "worst": errors[-1]}
