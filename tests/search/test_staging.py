"""Pipelines in the search of shapes: degrees and microbatches, and what becomes of the best."""

from __future__ import annotations

import meshes
from planner.model import Model
from planner.modelfile import load_model
from planner.search import staging

MODEL = """
mesh: "v100-8:2x2"
training: {batch: 16, optimizer: sgd, compute: f16}
pipeline: {axis: pipe, schedule: 1f1b}
architecture: {kind: decoder, layers: 4, d_model: 256, heads: 8, vocab: 512, sequence: 64}
"""


def model(*overrides: str) -> Model:
    return load_model(MODEL, "model.yaml", overrides)


def test_every_candidate_has_all_devices_and_parts_of_the_batch() -> None:
    found = list(staging.staged(model(), meshes.resolve("dgx-a100-80gb:4x8")))
    assert len({(m.axes, setting) for m, setting in found}) == len(found)
    for mesh, setting in found:
        stages = dict(mesh.axes)["pipe"]
        assert mesh.devices == 32
        assert stages > 1
        key, _, count = setting.partition("=")
        assert key == "training.pipeline_microbatches"
        assert 16 % int(count) == 0
        assert int(count) % stages == 0
    assert {dict(m.axes)["pipe"] for m, _ in found} == {2, 4, 8}  # 16 stages: 32 parts at least


def test_a_given_number_of_microbatches_is_kept() -> None:
    topology = meshes.resolve("dgx-a100-80gb:1x4")
    found = staging.staged(model("training.pipeline_microbatches=8"), topology)
    assert {setting for _, setting in found} == {""}


def test_no_pipeline_no_stages() -> None:
    text = MODEL.replace("pipeline: {axis: pipe, schedule: 1f1b}", "")
    plain = load_model(text, "model.yaml")
    topology = meshes.resolve("v100-8:2x2")
    assert list(staging.staged(plain, topology)) == []
    assert staging.unstaged(plain, meshes.every_mesh(topology)) == meshes.every_mesh(topology)
