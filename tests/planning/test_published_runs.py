"""Published utilizations of GSPMD against simulations of the published annotations.

Dense models and GLaM: weights and activations as GSPMD's "2-D finalized" (Xu et al. 2021, table
1; the specs of Lingvo's DenseLm configurations), experts over x. GShard: everything by batch, or
by groups, but expert layers by expert (Lepikhin et al. 2021, section 3.2). Remat and mesh as in
the model files.
"""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

import meshes
from planner import zoo
from planner.modelfile import load_model
from planner.planning import plan_model, price_annotations

# Hardware FLOPs utilization, recomputation included: Google AI blog on GSPMD, 2021.
PUBLISHED_HFU = {
    "lamda-137b": 0.565, "bert-480b": 0.63, "gshard-m4": 0.468, "glam-1.2t": 0.538,
}  # fmt: skip
POINTS = 0.04


@pytest.mark.parametrize("name", PUBLISHED_HFU)
def test_published_annotation_has_the_published_utilization(name: str) -> None:
    model = load_model(zoo.text(name), name)
    mesh = meshes.logical(meshes.resolve(model.mesh or ""), dict(model.shape or {}))
    text = (files("planner.zoo") / "published" / f"{name}.json").read_text(encoding="utf-8")
    given = price_annotations(model, mesh, json.loads(text))
    assert given.fits
    assert abs(given.hfu - PUBLISHED_HFU[name]) <= POINTS
    found = plan_model(model, mesh)
    assert found.fits
    assert found.plan.proof.gap < 0.01
    assert found.timing.step_time_s <= given.timing.step_time_s
