"""The zoo's files: parameter counts as published, meshes that exist, sources, assumptions."""

from __future__ import annotations

from math import prod

import pytest
from zoo_support import architecture, document, graph, training

from meshes.resolve import resolve
from planner import zoo
from planner.architectures.settings import Experts
from planner.graph.derive import training_step
from planner.model import OPTIMIZERS, REMAT_POLICIES, Model

TOLERANCE = 0.01
NAMES = zoo.names()


def test_the_named_models_are_there() -> None:
    wanted = {
        "lamda-137b", "bert-480b", "gpt3-175b", "llama3-8b", "llama3-70b", "t5-11b", "vit-22b",
        "resnet-50", "unet-2d", "unet-3d", "gshard-m4", "glam-1.2t", "mixtral-8x7b",
    }  # fmt: skip
    assert wanted <= set(NAMES)


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        zoo.text("../zoo/lamda-137b")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(name: str) -> None:
    published = float(document(name)["published_parameters"])
    assert graph(name).parameter_count == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "billions"), [("glam-1.2t", 96.6), ("mixtral-8x7b", 12.9)]
)
def test_parameters_active_per_token_are_the_published_ones(name: str, billions: float) -> None:
    s = architecture(name)
    assert isinstance(s, Experts)
    active = sum(
        p.elements * (s.top_k if ".expert_" in p.name else s.experts) / s.experts
        for p in graph(name).parameters()
    )
    assert active == pytest.approx(billions * 1e9, rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_where_it_comes_from(name: str) -> None:
    assert document(name)["name"] == name
    assert document(name)["source"]
    assert zoo.text(name).startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_assumed_values_are_those_used_and_within_their_range(name: str) -> None:
    for entry in document(name).get("assumed", ()):
        assert set(entry) == {"key", "value", "low", "high", "why"}
        used = document(name)
        for part in entry["key"].split("."):
            used = used[part]
        assert used == entry["value"]
        if not isinstance(used, str):
            assert float(entry["low"]) <= float(used) <= float(entry["high"])


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_exists_and_divides_the_batch(name: str) -> None:
    mesh = document(name)["mesh"]
    sizes = mesh["shape"].values()
    assert prod(sizes) == resolve(mesh["topology"]).devices
    assert training(name).batch % max(sizes) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_training_step_derives(name: str) -> None:
    settings = training(name)
    assert settings.optimizer in OPTIMIZERS
    assert settings.remat in REMAT_POLICIES
    model = Model(name, graph(name), settings, settings.batch * architecture(name).tokens)
    step = training_step(model)
    trained = {step.tensors[old].name for old in step.aliases.values()}
    assert {p.name for p in graph(name).parameters()} <= trained
