"""A plan that was found is never slower than what experts write by hand.

Hand plans go through the same completion and the same simulator; the planner never sees them.
"""

from __future__ import annotations

import pytest
from hand_plans import PATTERNS, hand_annotation

import meshes
from planner import zoo
from planner.modelfile import load_model
from planner.planning import plan_model, price_annotations

TOLERANCE = 1.001  # simulated times this close are equal
# So many accumulation steps that at least one hand plan fits; others keep those of their file.
STEPS = {
    ("bert-480b", "tpu-v3:32x32"): 2, ("gpt3-175b", "tpu-v4:8x8x8"): 2,
    ("llama3-8b", "tpu-v4:4x4x4"): 32, ("llama3-8b", "tpu-v5e:8x8"): 64,
    ("vit-22b", "tpu-v4:8x8x16"): 2, ("vit-22b", "dgx-h100:16x8"): 4,
    ("vit-22b", "tpu-v5p:4x4x8"): 4,
}  # fmt: skip
CASES = [
    (model, mesh, shape)
    for model, meshes_of in {
        "lamda-137b": [("tpu-v3:32x32", (32, 64)), ("tpu-v4:8x8x16", (64, 16)),
                       ("tpu-v3:16x16", (16, 32)), ("tpu-v5e:16x16", (16, 16))],
        "bert-480b": [("tpu-v4:8x16x16", (256, 8)), ("tpu-v4:8x8x8", (64, 8)),
                      ("tpu-v5p:8x8x8", (64, 8)), ("tpu-v3:32x32", (32, 64))],
        "gpt3-175b": [("dgx-a100-80gb:128x8", (128, 8)), ("dgx-h100:64x8", (64, 8)),
                      ("tpu-v4:8x8x8", (64, 8)), ("tpu-v3:32x32", (128, 16))],
        "llama3-8b": [("dgx-h100:16x8", (16, 8)), ("tpu-v4:4x4x4", (16, 4)),
                      ("tpu-v5e:8x8", (8, 8)), ("dgx-a100-80gb:8x8", (8, 8))],
        "vit-22b": [("tpu-v4:8x8x16", (128, 8)), ("dgx-h100:16x8", (16, 8)),
                    ("tpu-v5p:8x8x8", (64, 8)), ("tpu-v5p:4x4x8", (16, 8))],
    }.items()
    for mesh, shape in meshes_of
]  # fmt: skip


def test_there_are_twenty_pairs() -> None:
    assert len(CASES) >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology", "shape"), CASES)
def test_found_plan_is_never_slower(name: str, topology: str, shape: tuple[int, int]) -> None:
    steps = STEPS.get((name, topology))
    overrides = [f"training.accumulation_steps={steps}"] if steps else []
    model = load_model(zoo.text(name), name, overrides)
    sizes = dict(zip(("x", "y"), shape, strict=True))
    mesh = meshes.logical(meshes.resolve(topology), sizes)
    hand = {
        label: price_annotations(
            model, mesh, hand_annotation(model.graph, pattern, sizes, "x", "y")
        )
        for label, pattern in PATTERNS.items()
    }
    fitting = {label: r.timing.step_time_s for label, r in hand.items() if r.fits}
    assert fitting
    found = plan_model(model, mesh)
    assert found.fits
    assert {
        label: seconds
        for label, seconds in fitting.items()
        if found.timing.step_time_s > seconds * TOLERANCE
    } == {}
