"""What planning or pricing a model gives back: the plan, its program and the program's readings.

Only data and what follows from it by arithmetic; nothing here searches, prices or prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costmodels.memory import Memory
from costmodels.pipeline import PipelineProgram
from costmodels.program import Program
from costmodels.simulate import Timing
from costmodels.spread import spread
from meshes import LogicalMesh
from planner.graph.core import Graph
from planner.graph.flops import FlopCount
from planner.model import Model
from planner.plan import Plan
from planner.sharding.spec import Spec


@dataclass(frozen=True)
class Result:
    """A plan of `model` on `mesh`, read. `graph` is the training step.

    `specs`: where every materialised tensor lies (stacked parameters with their stacked
    dimensions). `limit_bytes` is per device; `headroom` the fraction by which the compiler may
    need more than predicted. `notes` say what a reader of the report should know.
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
    def _capacity(self) -> float:
        peak = self.mesh.chip.peak_flops(self.model.training.compute)
        return self.timing.step_time_s * self.mesh.devices * peak
