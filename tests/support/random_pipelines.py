"""Random valid plans of pipelined models, run on virtual devices and compared with the same model
under plain gradient accumulation."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from random_plans import PlanDrawer, expected, run_plan

import meshes
from costmodels.pipeline import PipelineProgram
from costmodels.program import Program
from planner.graph.derive import training_step
from planner.model import Model, Pipeline
from planner.pipelining.cuts import stage_starts
from planner.pipelining.pieces import Piece, cut
from planner.pipelining.planning import PipelinePlanning
from planner.pipelining.stacked import stacked
from planner.pipelining.stage_planning import UPDATE, Crossing, StagePlanning
from planner.plan import Plan
from planner.planning import Options
from planner.sharding.flow import build_flow
from planner.sharding.spec import Spec, all_specs
from planner.values import reference
from planner.values.interpret import Shards, shard, unshard
from planner.values.pipeline import run_pipeline

Arrays = Mapping[str, np.ndarray]
AXIS = "pipe"


def pipelined(model: Model, schedule: str, chunks: int = 1, microbatches: int = 4) -> Model:
    """`model`, whose graph is that of one microbatch, as a pipeline."""
    training = replace(
        model.training, batch=model.training.batch * microbatches,
        pipeline_microbatches=microbatches,
    )  # fmt: skip
    return replace(model, workload=training, pipeline=Pipeline(AXIS, schedule, chunks))


class PipelineDrawer:
    """Random crossings, choices and specs of one model on `devices` × the inner axes."""

    def __init__(self, model: Model, devices: int, inner: Mapping[str, int]) -> None:
        size = devices * int(np.prod(list(inner.values())))
        mesh = meshes.logical(meshes.resolve(f"dgx-a100-80gb:1x{size}"), {AXIS: devices, **inner})
        self.planning = PipelinePlanning(model, mesh, Options(), {}, None)
        self.axes = self.planning.inner.axes
        self.stages = len(self.planning.table) * self.planning.pipeline.interleave
        self.whole = training_step(model)
        self.inputs = reference.random_inputs(self.whole)
        self.wanted = expected(self.whole, self.inputs)
        starts = stage_starts(self.planning.forward, self.stages, self.planning.inner)
        self.pieces = [
            (piece, self.planning.stage(piece, {})) for piece in cut(self.planning.forward, starts)
        ]

    def draw(self, seed: int) -> tuple[PipelineProgram, list[tuple[Piece, StagePlanning, Plan]]]:
        """What crosses lies at random; every stage has a random plan of its own."""
        rng = random.Random(seed)
        crossing: dict[Crossing, Spec] = {}
        drawn = []
        for piece, free in self.pieces:
            for key, names in free.edges.items():
                if key not in crossing:
                    crossing[key] = self._spec(rng, free, key[0], names[0])
            stage = self.planning.stage(piece, crossing)
            plan = PlanDrawer(stage.flow, self.axes).draw(rng.randrange(1000))
            drawn.append((piece, stage, plan))
        programs = tuple(stage.stage(plan) for _, stage, plan in drawn)
        axes = self.planning.mesh.axes
        return PipelineProgram(axes, AXIS, programs, self.planning.table), drawn

    def _spec(self, rng: random.Random, stage: StagePlanning, phase: str, name: str) -> Spec:
        home = next(h for h in stage.flow.homes if h.tensor == name)
        shape = home.shape if phase == UPDATE else home.shape[1:]
        return rng.choice(all_specs(shape, dict(self.axes)))

    def run(self, seed: int) -> dict[str, np.ndarray]:
        """Every output of the step, put together from all stages and devices."""
        program, drawn = self.draw(seed)
        results = run_pipeline(
            program,
            [self._given(*d, s.program) for d, s in zip(drawn, program.stages, strict=True)],
        )
        found: dict[str, list[np.ndarray]] = {}
        for (_, stage, plan), outputs in zip(drawn, results, strict=True):
            for name, parts in outputs.items():
                found.setdefault(name, []).append(
                    unshard(parts, self._out_spec(stage, plan, name), self.axes)
                )
        return {name: _joined(name, parts, self.wanted[name]) for name, parts in found.items()}

    def _given(
        self, piece: Piece, stage: StagePlanning, plan: Plan, program: Program
    ) -> dict[str, Shards]:
        given = {}
        for name in program.inputs:
            whole = np.asarray(self.inputs[name], dtype=float)
            owner = next((p for p in piece.turns if name == p or name.startswith(f"{p}.")), None)
            if owner is not None:
                first, stop = piece.turns[owner]
                whole = whole[first:stop]
            given[name] = shard(whole, _home(stage, plan, name), self.axes)
        return given

    def _out_spec(self, stage: StagePlanning, plan: Plan, name: str) -> Spec:
        old = stage.graph.aliases.get(name)
        if old is None:
            return Spec(((),) * len(stage.graph.tensors[name].shape))
        return _home(stage, plan, old)


def _home(stage: StagePlanning, plan: Plan, tensor: str) -> Spec:
    home, lead = stage.flow.home_of[tensor]
    spec = plan.homes[stage.flow.homes[home].tensor]
    return Spec(spec.dims[lead:], spec.partial)


def _joined(name: str, parts: list[np.ndarray], like: np.ndarray) -> np.ndarray:
    """Layers one after the other; copies of a shared parameter must be equal."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape == like.shape:
        for other in parts[1:]:
            np.testing.assert_allclose(parts[0], other, rtol=1e-9, atol=1e-12, err_msg=name)
        return parts[0]
    return np.concatenate(parts)


class StackedDrawer:
    """The same for a pipeline that is one program."""

    def __init__(self, model: Model, devices: int, inner: Mapping[str, int]) -> None:
        rounds = model.pipeline.interleave if model.pipeline else 1
        self.stages = (rounds, devices) if rounds > 1 else (devices,)
        self.axes = ((AXIS, devices), *inner.items())
        whole = training_step(model)
        inputs = reference.random_inputs(whole)
        step = training_step(stacked(model, AXIS, devices, rounds))
        self.flow = build_flow(step, {}, uneven=model.uneven)
        self.wanted = {
            name: self.in_stages(name, array) for name, array in expected(whole, inputs).items()
        }
        self.inputs = {
            name: self.in_stages(name, inputs[name if name in inputs else f"{name}.all"])
            for name in step.inputs
        }

    def in_stages(self, name: str, array: np.ndarray) -> np.ndarray:
        """Stacked parameters and their states: [layers] → [rounds, layers of a stage, stages]."""
        step = self.flow.graph
        like = step.tensors.get(step.aliases.get(name, name))
        if like is None or len(like.shape) == array.ndim:
            return array
        last = len(self.stages)
        return np.moveaxis(array.reshape(*self.stages, -1, *array.shape[1:]), last, last - 1)

    def run(self, seed: int) -> dict[str, np.ndarray]:
        plan = PlanDrawer(self.flow, self.axes).draw(seed)
        found = run_plan(self.flow, plan, self.inputs)
        loss = next(name for name, array in found.items() if array.ndim == 0)
        (own,) = self.wanted.keys() - found.keys()
        return {own if name == loss else name: array for name, array in found.items()}
