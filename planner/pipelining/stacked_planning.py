"""Planning a pipeline that is one program: an ordinary step, read with its bubbles.

Annotations and reports keep the dimensions that tensors have in the model: those of stages and
microbatches come and go here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from costmodels.pipeline_time import with_bubbles
from planner.graph.core import Graph, Loop
from planner.graph.derive import training_step
from planner.graph.flops import FlopCount, count_flops
from planner.model import Model, Pipeline
from planner.pins import Annotation
from planner.pipelining.pieces import PipelineError
from planner.pipelining.stacked import MICRO, stacked
from planner.plan import Plan
from planner.planning import EXACT_AXES, Candidate, Planning
from planner.result import Result
from planner.weighting import Seen


@dataclass
class StackedPlanning(Planning):
    """`model` becomes the one of all stages and microbatches; `original` is that of one."""

    original: Model = field(init=False)
    flops: FlopCount = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.model
        pipeline, axes = self.pipeline, dict(self.mesh.axes)
        if pipeline.axis not in axes:
            raise PipelineError(
                f"the mesh has no axis '{pipeline.axis}' for the pipeline; "
                f"it has {', '.join(axes)}",
                f"name it in the shape: {pipeline.axis}=4,…",
            )
        if sum(n > 1 for n in axes.values()) > EXACT_AXES:
            raise PipelineError(
                f"a pipeline in one program has a mesh of at most {EXACT_AXES} axes; others are "
                "not supported yet",
                "leave pipeline.inside out",
            )
        self.flops = count_flops(training_step(self.original))
        self.model = stacked(
            self.model, pipeline.axis, axes[pipeline.axis], pipeline.interleave
        )
        self.annotation = self._with_stages(self.annotation)
        super().__post_init__()

    @property
    def pipeline(self) -> Pipeline:
        if self.original.pipeline is None:
            raise PipelineError(f"{self.original.name} has no pipeline")
        return self.original.pipeline

    def _with_stages(self, annotation: Annotation) -> Annotation:
        """Stages are split by the pipeline's axis; that microbatches are whole goes unsaid."""
        old, new = self.original.graph.all_tensors(), self.model.graph.all_tensors()
        found = {}
        for name, axes in annotation.items():
            added = name in old and name in new and len(new[name].shape) > len(old[name].shape)
            staged = added and new[name].dims[0] != MICRO
            found[name] = ((self.pipeline.axis,), *axes) if staged else axes
        return found

    def step(self) -> Graph:
        return training_step(self.model, tuple(self.annotation), self.lean)

    def joined(self) -> Seen | None:
        """Nothing: the axis of the stages is joined with no other."""
        return None

    def lowered(self, plan: Plan) -> Candidate:
        found = super().lowered(plan)
        stages, parts = dict(self.mesh.axes)[self.pipeline.axis], self.original.training.parts
        idle = (stages - 1) / (parts * self.pipeline.interleave + stages - 1)
        ticks = [n.name for n in self.model.graph.nodes if isinstance(n, Loop) and n.of_parts]
        loops = [*ticks, *(f"{name}.bwd" for name in ticks)]
        timing = with_bubbles(found.timing, loops, idle)
        return replace(found, timing=timing)

    def result(self, c: Candidate) -> Result:
        return replace(super().result(c), model=self.original, flops=self.flops)
