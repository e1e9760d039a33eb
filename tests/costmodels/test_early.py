"""Sums over parts of a batch, moved to where their summands are made."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from small_models import decoder

import meshes
from costmodels.early import sums_at_once
from costmodels.memory import read_memory
from costmodels.program import LoopStep, Program
from planner.planning import plan_model


def places(program: Program) -> dict[str, int]:
    (parts,) = (s for s in program.block if isinstance(s, LoopStep))
    return {step.name: i for i, step in enumerate(parts.body)}


def mixed(program: Program) -> Counter[tuple[object, int]]:
    return Counter((i.outs, n) for i, n in program.instructions())


@pytest.mark.parametrize(("machine", "early"), [("dgx-a100-80gb:1x8", True), ("tpu-v3:2x2", False)])
def test_only_for_gpus_what_is_known_is_summed_before_the_layers_go_backward(
    machine: str, early: bool
) -> None:
    mesh = meshes.logical(meshes.resolve(machine), {"x": 2, "y": 4})
    result = plan_model(decoder(16, accumulation_steps=2), mesh)
    at = places(result.program)
    assert (at["loss.sum"] < at["layers.bwd"]) is early
    assert at["table.grad.sum"] > at["layers.bwd"]


def test_nothing_is_lost_and_never_more_memory_is_taken() -> None:
    mesh = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"x": 2, "y": 4})
    program = plan_model(decoder(16, accumulation_steps=2), mesh).program
    moved = sums_at_once(program)
    assert moved.block != program.block
    assert mixed(moved) == mixed(program)
    assert read_memory(moved).peak_bytes <= read_memory(program).peak_bytes
    whole = replace(program, block=tuple(s for s in program.block if not isinstance(s, LoopStep)))
    assert sums_at_once(whole) == whole
