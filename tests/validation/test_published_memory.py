"""Memory of weights and optimizer against the figures of Korthikanti et al. 2022, figure 1.

They count the layers alone, with 18 bytes per parameter: weights and gradients in fp16 and fp32,
and three fp32 arrays of the optimizer.
"""

from __future__ import annotations

import pytest

from costmodels.program import ITEM_BYTES, Program
from planner.validation import suitefile
from planner.validation.predict import simulate_run

PUBLISHED_GIB = 45.5625  # 22B on 8 devices


def test_weights_gradients_and_optimizer_of_22b() -> None:
    run = next(r for r in suitefile.load("megatron").runs if r.id == "korthikanti-22b-full")
    result = simulate_run(run)
    program = result.program
    assert isinstance(program, Program)
    held = {n: program.buffers[b] for n, b in program.inputs.items() if n.startswith("layers.")}
    weights = [held[p.name] for p in result.graph.parameters() if p.name in held]
    assert len(held) == 4 * len(weights)  # each with its master copy and two moments
    gradients = ITEM_BYTES[result.model.training.gradients] * sum(
        buffer.bytes // ITEM_BYTES[buffer.dtype] for buffer in weights
    )
    total = sum(buffer.bytes for buffer in held.values()) + gradients
    assert total / 2**30 == pytest.approx(PUBLISHED_GIB, rel=0.01)
