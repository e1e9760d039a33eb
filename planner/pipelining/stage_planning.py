"""Planning one kind of stage: an ordinary step, whose memory holds several microbatches.

The other stages of a device are taken for copies of this one until all are planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from costmodels.collectives import collective_seconds
from costmodels.compiled import in_parts_as_compiled
from costmodels.pipeline import StageProgram
from costmodels.pipeline_memory import StageMemory, read_alike
from costmodels.program import ITEM_BYTES
from costmodels.schedule import BACKWARD, FORWARD
from costmodels.simulate import Timing, simulate
from meshes import LogicalMesh
from planner.graph.core import Graph, Op
from planner.graph.derive import given_gradient, piece_step
from planner.lowering.lower import lower
from planner.pipelining.pieces import Piece
from planner.pipelining.stages import microbatch_loop, received_stacks, sent_stacks, stage_program
from planner.plan import Plan
from planner.planning import ENOUGH_GAP, Candidate, Planning
from planner.sharding.flow import Flow, Home, build_flow
from planner.sharding.formulate import HomeSeconds
from planner.sharding.spec import Spec
from planner.weighting import GUESSES, PLAIN, Counts

UPDATE = "update"  # the phase in which gradients of shared parameters cross
Crossing = tuple[str, str]  # (phase, key): what crosses, and when


@dataclass
class StagePlanning(Planning):
    """`mesh` has the axes that shard a stage, `whole` the pipeline's `axis` too. `crossing`:
    specs that are settled. `copies`: the most microbatches in flight on a device, all its
    `chunks` stages together."""

    piece: Piece | None = None
    whole: LogicalMesh | None = None
    axis: str = ""
    crossing: Mapping[Crossing, Spec] = field(default_factory=dict)
    copies: int = 1
    chunks: int = 1
    settling: bool = False  # what crosses may lie anyhow, but alike on both sides

    @property
    def own(self) -> Piece:
        if self.piece is None:
            raise ValueError("a stage is planned from a piece of a model")
        return self.piece

    # ---- the step ---------------------------------------------------------------------------

    def step(self) -> Graph:
        return piece_step(
            self.own.graph, self.model.training, tuple(self.annotation), self.own.boundary,
            self.lean,
        )  # fmt: skip

    def laid_out(self) -> Flow:
        pins = self.pins()
        for key, names in self.edges.items():
            if key in self.crossing:
                pins.update(dict.fromkeys(names, self.crossing[key]))
        alike = {names[0]: names[1] for names in self.edges.values() if len(names) > 1}
        flow = build_flow(
            self.graph, pins, alike if self.settling else None, self.model.uneven,
            self.reduces_once(),
        )  # fmt: skip
        self._even_crossing(flow)
        self._count_copies(flow)
        return flow

    def reduces_once(self) -> bool:
        """Unasked, yes: what runs the stages calls their programs part by part."""
        return self.model.training.reduce_once is not False

    @cached_property
    def edges(self) -> dict[Crossing, list[str]]:
        """Labels of the homes that hold what crosses. On both sides it lies alike."""
        piece = self.own
        found: dict[Crossing, list[str]] = {}
        for stacks in (sent_stacks(self.graph, piece), received_stacks(piece)):
            for phase, names in stacks.items():
                for key, stack in names.items():
                    found.setdefault((phase, key), []).append(stack)
        first = 1 if piece.boundary.loss else 0
        for i, (parameter, givers) in enumerate(piece.boundary.shared.items()):
            found[UPDATE, parameter] = [
                f"{self.graph.outputs[first + i]}@output",
                *(given_gradient(parameter, giver) for giver in givers),
            ]
        return found

    def home_seconds(self) -> HomeSeconds:
        """What crosses costs by how it lies, too."""
        held = super().home_seconds()
        crossing = {name: phase for (phase, _), names in self.edges.items() for name in names}

        def seconds(home: Home, specs: Sequence[Spec]) -> NDArray[np.float64]:
            phase = crossing.get(home.tensor)
            if phase is None or self.whole is None:
                return held(home, specs)
            times, sizes = (1 if phase == UPDATE else home.shape[0]), dict(self.mesh.axes)
            item = ITEM_BYTES[home.dtype]
            size = [prod(s.local_shape(home.shape, sizes)) // times * item for s in specs]
            each = collective_seconds(self.whole, "collective-permute", (self.axis,), size)
            return held(home, specs) + times * np.asarray(each)

        return seconds

    def _even_crossing(self, flow: Flow) -> None:
        """What a stage sends is an argument of another one's program."""
        passing = {name for names in self.edges.values() for name in names}
        for home in flow.homes:
            home.uneven = home.uneven and home.tensor not in passing

    def _count_copies(self, flow: Flow) -> None:
        """Stashes exist once per microbatch in flight, what stays once per stage; what crosses
        is no stack in memory."""
        passing = {name for names in self.edges.values() for name in names}
        site = flow.loops[microbatch_loop(self.graph).name]
        body, stop = site.enter + 1, site.stop
        split = min(
            (flow.sites[n.name].step if isinstance(n, Op) else flow.loops[n.name].enter)
            for n in site.loop.body.nodes
            if n.phase != FORWARD
        )
        for home in flow.homes:
            if home.tensor in passing:
                home.live.clear()
            else:
                self._copy(home, body, split, stop)

    def _copy(self, home: Home, body: int, split: int, stop: int) -> None:
        for (start, end), copies in list(home.live):
            if not start < split < end:
                continue
            if start >= body and self.copies > 1:
                home.live.append(((body, stop), copies * (self.copies - 1)))
            elif start < body and self.chunks > 1:
                home.live.append(((start, end), copies * (self.chunks - 1)))

    # ---- readings ---------------------------------------------------------------------------

    def lowered(self, plan: Plan) -> Candidate:
        stage = self.stage(plan)
        memory = read_alike(StageMemory.of(stage), self.copies, self.chunks)
        return Candidate(plan, stage.program, memory, self._timed(stage))

    def countings(self, seen: Sequence[Candidate]) -> Iterator[Counts]:
        """Guesses only: what a stage exposes depends on the others."""
        yield from (self.counts(weights) for weights in GUESSES)

    def stage(self, plan: Plan) -> StageProgram:
        program = in_parts_as_compiled(lower(self.flow, plan, self.resharder), self.mesh)
        return stage_program(program, self.graph, self.own)

    def _timed(self, stage: StageProgram) -> Timing:
        """The stage's own work of a step, without waiting for other stages."""
        compute = exposed = 0.0
        for name, part in stage.parts.items():
            times = stage.microbatches.times if name in (FORWARD, BACKWARD) else 1
            timing = simulate(part, self.mesh)
            compute += times * timing.compute_s
            exposed += times * timing.exposed_communication_s
        return Timing(compute + exposed, compute, exposed)

    def settled(self) -> dict[Crossing, Spec]:
        """How what crosses lies best, if all stages were like this one (`settling` is set)."""
        outcome = self.solved(None, self.counts(PLAIN), ENOUGH_GAP)
        plan = self.candidate_plan(outcome)
        found = {}
        for key, names in self.edges.items():
            home = next(h for h in self.flow.homes if h.tensor in names)
            found[key] = Spec(plan.homes[home.tensor].dims[home.lead :])
        return found
