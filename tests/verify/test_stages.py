"""Stages with programs of their own: what they compute, and what compilers make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from on_cpu import load

import meshes
from planner.export.jax_ops import ExportError
from planner.export.jax_program import result_program
from planner.graph.derive import received_cotangent
from planner.modelfile import load_model
from planner.pipelining.pieces import Piece, cut
from planner.planning import plan_model
from planner.result import Result
from planner.values import reference
from planner.verify import stages_document, stages_text, verify_stages
from planner.verify.stages import Alone, stages_alone

MICROBATCHES = 4
MODEL = """
name: staged
training: {{batch: {batch}, pipeline_microbatches: 4, optimizer: {optimizer}, compute: {compute}}}
pipeline: {{axis: pipe, schedule: {schedule}}}
architecture: {{kind: decoder, layers: 8, d_model: {width}, heads: 8, vocab: 512, sequence: 256}}
"""
SIZES: dict[str, str | int] = {"batch": 8, "width": 64, "optimizer": "sgd", "compute": "f32"}
SCHEDULES = {"1f1b": {"pipe": 4, "data": 2}, "interleaved": {"pipe": 2, "data": 4}}


@cache
def planned(schedule: str, topology: str = "dgx-a100-80gb:1x8", **sizes: str | int) -> Result:
    model = load_model(MODEL.format(**{**SIZES, **sizes}, schedule=schedule), "staged.yaml")
    mesh = meshes.logical(meshes.resolve(topology), SCHEDULES[schedule])
    return plan_model(model, mesh)


class Stage:
    """A stage's program, run without a mesh on what it gets."""

    def __init__(self, alone: Alone, piece: Piece, inputs: Mapping[str, Any]) -> None:
        import jax

        self.program, self.piece = load(alone.source.text), piece
        self.step = jax.jit(self.program["train_step"])
        self.batch = {n: np.zeros(*row[:2]) for n, row in self.program["INPUTS"].items()}
        self.batch |= {n: inputs[f"{n}.all"] for n in self.batch if f"{n}.all" in inputs}
        self.params = {n: self._own(n, inputs) for n in self.program["PARAMETERS"]}
        self.states = {
            n: {k: self._own(f"{n}.{k}", inputs, n) for k in rows}
            for n, rows in self.program["STATES"].items()
        }

    def _own(self, name: str, inputs: Mapping[str, Any], parameter: str = "") -> Any:
        turns = self.piece.turns.get(parameter or name)
        whole = np.asarray(inputs[name], np.float32)
        return whole if turns is None else whole[turns[0] : turns[1]]

    def run(self) -> tuple[Any, Any, Any]:
        found: tuple[Any, Any, Any] = self.step(self.params, self.states, self.batch)
        return found


def stages_of(result: Result, inputs: Mapping[str, Any]) -> list[Stage]:
    """All stages, each with the layers that it has; equal ones run the same program."""
    programs = {n: alone for alone in stages_alone(result) for n in alone.numbers}
    pieces = cut(result.model.graph, result.plan.starts)
    return [Stage(programs[n], piece, inputs) for n, piece in enumerate(pieces)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_together_compute_a_step(schedule: str) -> None:
    """Activations handed on, cotangents handed back, gradients of the embedding, which first and
    last stage have, exchanged: loss and new parameters are those of the whole step. All
    microbatches are alike, because a stage's program receives the same for each."""
    pytest.importorskip("jax")
    result = planned(schedule)
    inputs = dict(reference.random_inputs(result.graph))
    for name, value in inputs.items():
        if name.endswith(".all"):
            inputs[name] = np.repeat(value[:1], MICROBATCHES, axis=0)
    expected = reference.evaluate(result.graph, inputs)
    stages = stages_of(result, inputs)
    for stage, then in pairwise(stages):
        results, _, _ = stage.run()
        for key, local in stage.piece.sent.items():
            then.batch[then.piece.received[key]] = results[f"{local}.sent"]
    given: dict[tuple[str, int], Any] = {}
    for number in reversed(range(len(stages))):
        stage = stages[number]
        results, _, _ = stage.run()
        given |= {
            (name, number): results[own] for name, (own, _) in stage.program["SHARED"].items()
        }
        for key, local in stage.piece.received.items():
            before = stages[number - 1]
            sent = received_cotangent(before.piece.sent[key])
            before.batch[sent] = results[stage.program["RETURNED"][local]]
    assert {number for _, number in given} == {0, len(stages) - 1}
    new: dict[str, list[Any]] = {}
    for stage in stages:
        stage.batch |= {
            f"{name}.grad.of{number}": g for (name, number), g in given.items()
            if f"{name}.grad.of{number}" in stage.batch
        }  # fmt: skip
        results, params, _ = stage.run()
        for name, p in params.items():
            new.setdefault(name, []).append(p)
    np.testing.assert_allclose(results["loss"], expected[result.graph.outputs[0]], rtol=1e-5)
    for out, name in result.graph.aliases.items():
        whole = new[name][0] if len(new[name]) < len(stages) else np.concatenate(new[name])
        step = np.abs(expected[out] - inputs[name]).max()
        np.testing.assert_allclose(whole, expected[out], rtol=0, atol=1e-3 * step, err_msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_kind_of_stage_is_compiled_on_its_submesh(schedule: str) -> None:
    pytest.importorskip("jax")
    result = planned(schedule)
    v = verify_stages(result, "cpu")
    numbers = [s.alone.numbers for s in v.stages]
    assert numbers == [(0,), (1, 2), (3,)]
    size = SCHEDULES[schedule]["data"]
    for s in v.stages:
        flops = next(r for r in s.found.rows if r.name.startswith("FLOPs"))
        assert flops.error == 0
        arguments = next(r for r in s.found.rows if r.name == "arguments")
        assert arguments.error == pytest.approx(0, abs=1e-4)
        assert s.found.mesh == f"{size} chips, {size} devices, mesh data={size}"
    shown = stages_text(v)
    assert "each stage compiled alone on its submesh; in-flight buffers of the schedule" in shown
    assert "stages 1 … 2, 2 equal ones" in shown
    assert v.ok is ("verdict: yes" in shown)
    found = v.stages[1].found
    on_gpu = replace(found.compiled, backend="gpu")
    needs_more = replace(found, compiled=on_gpu, held_bytes=found.limit_bytes)
    short = replace(v, stages=(v.stages[0], replace(v.stages[1], found=needs_more)))
    assert "stage 1: predicted to fit, but the compiler runs out of memory" in stages_text(short)
    assert not short.ok
    document = stages_document(v)
    assert [s["numbers"] for s in document["stages"]] == [[0], [1, 2], [3]]
    assert document["ok"] is v.ok


def test_what_the_schedule_adds() -> None:
    """The first of four stages has four microbatches in flight with 1F1B: its stash three times
    more. The last has one, and nothing is added."""
    alone = {a.numbers[0]: a for a in stages_alone(planned("1f1b"))}
    assert [a.in_flight for a in alone.values()] == [4, 3, 1]
    assert alone[3].held_bytes == 0
    assert alone[0].held_bytes * 2 == alone[1].held_bytes * 3


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("1f1b", "--set pipeline.schedule=gpipe --set pipeline.inside=false"),
        ("interleaved", "--set pipeline.schedule=circular --set pipeline.interleave=2 "
                        "--set pipeline.inside=false"),
    ],
)  # fmt: skip
def test_export_names_the_nearest_plan_in_one_program(schedule: str, words: str) -> None:
    with pytest.raises(ExportError) as caught:
        result_program(planned(schedule))
    assert str(caught.value).endswith(words)


@pytest.mark.compiler
def test_the_tpu_compiler_agrees_about_every_stage() -> None:
    """On sub-tori of two chips; gradients are reduced once a step."""
    pytest.importorskip("libtpu")
    result = planned("1f1b", "tpu-v4:2x2x2", batch=64, width=512, compute="bf16")
    v = verify_stages(result)
    assert [s.alone.result.mesh.topology.dims for s in v.stages] == [(1, 1, 2)] * 3
    for s in v.stages:
        assert s.found.note == ""
        rows = {r.name: r for r in s.found.rows}
        assert rows["arguments"].error == pytest.approx(0, abs=0.001), stages_text(v)
        assert rows["FLOPs per device"].error == pytest.approx(0, abs=0.001), stages_text(v)
        moved = {r.name: r for r in s.found.collectives}
        assert moved["reduce-scatter over data"].error == pytest.approx(0, abs=0.02), stages_text(v)
