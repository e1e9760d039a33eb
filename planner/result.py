"""What planning or pricing a model gives back: the plan, its program and the program's readings.

Only data and what follows from it by arithmetic; nothing here searches, prices or prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from costmodels.memory import Memory
from costmodels.pipeline import PipelineProgram
from costmodels.program import ITEM_BYTES, Program
from costmodels.simulate import Timing
from costmodels.spread import spread
from meshes import LogicalMesh
from planner.graph.core import Graph
from planner.graph.flops import FlopCount
from planner.model import DECODE, Model
from planner.pipelining.pieces import Piece
from planner.plan import Plan
from planner.sharding.spec import Spec


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a pipeline with a program of its own: `step` is that of `piece`, `specs` by the
    names that tensors have there."""

    piece: Piece
    step: Graph
    plan: Plan
    specs: Mapping[str, Spec]


@dataclass(frozen=True)
class Result:
    """A plan of `model` on `mesh`, read. `graph` is the step.

    `specs`: where every materialised tensor lies (stacked parameters with their stacked
    dimensions). `limit_bytes` is per device; `headroom` the fraction by which the compiler may
    need more than predicted. `notes` say what a reader of the report should know. `stages`: of a
    pipeline whose stages have programs of their own, equal ones the same.
    """

    model: Model
    mesh: LogicalMesh
    graph: Graph
    plan: Plan
    program: Program | PipelineProgram
    timing: Timing
    memory: Memory
    flops: FlopCount
    limit_bytes: int
    headroom: float
    specs: Mapping[str, Spec]
    notes: tuple[str, ...] = ()
    stages: tuple[PlannedStage, ...] = ()

    @property
    def one_program(self) -> Program:
        """The program of all devices; ValueError if stages of a pipeline have programs of their
        own."""
        if isinstance(self.program, PipelineProgram):
            raise ValueError(f"{self.model.name} is pipelined: its devices run several programs")
        return self.program

    @property
    def fits(self) -> bool:
        return self.memory.peak_bytes * (1 + self.headroom) <= self.limit_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices could do at the peak of the compute dtype."""
        return self.flops.model / self._capacity

    @property
    def hfu(self) -> float:
        """The same with the work that the schedule adds (recomputation, dispatch)."""
        return self.flops.hardware / self._capacity

    @property
    def step_time_range_s(self) -> tuple[float, float] | None:
        """Where four of five measured steps would lie; None if nobody has compared this chip."""
        found = spread(self.mesh.chip.efficiency)
        if found is None:
            return None
        return self.timing.step_time_s * found[0], self.timing.step_time_s * found[1]

    @property
    def tokens_per_s(self) -> float:
        return self.model.tokens / self.timing.step_time_s

    @property
    def bandwidth_utilization(self) -> float | None:
        """Of a decoding step: parameters and caches, which it has to read once, over what the
        devices' memories could deliver in its time. Other steps are not about that."""
        inference = self.model.inference
        if inference is None or inference.phase != DECODE:
            return None
        rate = self.mesh.devices * self.mesh.chip.hbm_bytes_per_s
        return bytes_to_read(self.graph) / (self.timing.step_time_s * rate)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the sequences, on one device."""
        sizes = dict(self.mesh.axes)
        return sum(
            prod(self.specs[t.name].local_shape(t.shape, sizes)) * ITEM_BYTES[t.dtype]
            for t in self.model.graph.tensors.values()
            if t.role == "cache" and t.name not in self.graph.aliases
        )

    @property
    def _capacity(self) -> float:
        peak = self.mesh.chip.peak_flops(self.model.workload.compute)
        return self.timing.step_time_s * self.mesh.devices * peak

def bytes_to_read(graph: Graph) -> int:
    """Bytes of the parameters and caches of which a step reads all, not only some rows."""
    looked_up = {op.ins[0] for op, _ in graph.walk() if op.attrs.get("onehot") == "take"}
    tensors = (graph.tensors[name] for name in graph.inputs)
    return sum(
        t.elements * ITEM_BYTES[t.dtype]
        for t in tensors
        if t.role == "cache" or (t.role == "parameter" and t.name not in looked_up)
    )
