"""The zoo's files: parameter counts as published, meshes that exist, sources, assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
import yaml
from zoo_support import model, step

from meshes.resolve import resolve
from planner import zoo

TOLERANCE = 0.01
NAMES = zoo.names()


def test_the_named_models_are_there() -> None:
    wanted = {
        "lamda-137b", "bert-480b", "gpt3-175b", "llama3-8b", "llama3-70b", "t5-11b", "vit-22b",
        "resnet-50", "unet-2d", "unet-3d", "gshard-m4", "glam-1.2t", "mixtral-8x7b",
        "wide-resnet-50-2",
    }  # fmt: skip
    assert wanted <= set(NAMES)


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        zoo.text("../zoo/lamda-137b")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(name: str) -> None:
    published = model(name).published_parameters
    assert model(name).graph.parameter_count == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "billions"), [("glam-1.2t", 96.6), ("mixtral-8x7b", 12.9)]
)
def test_parameters_active_per_token_are_the_published_ones(name: str, billions: float) -> None:
    settings = yaml.safe_load(zoo.text(name))["architecture"]
    share = settings["top_k"] / settings["experts"]
    active = sum(
        p.elements * (share if ".expert_" in p.name else 1)
        for p in model(name).graph.parameters()
    )
    assert active == pytest.approx(billions * 1e9, rel=TOLERANCE)


def test_the_documented_table_has_every_model_and_its_parameters() -> None:
    text = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    table = {row[1].strip(" `"): float(row[3]) for row in rows if len(row) > 5}
    assert set(table) == set(NAMES)
    for name, parameters in table.items():
        assert model(name).graph.parameter_count == pytest.approx(parameters, rel=0.005), name


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_where_it_comes_from(name: str) -> None:
    written = yaml.safe_load(zoo.text(name))
    assert written["name"] == name
    assert written["source"]
    assert zoo.text(name).startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_assumed_numbers_are_within_their_range(name: str) -> None:
    for entry in model(name).assumed:
        assert entry.why
        if isinstance(entry.value, int | float):
            assert entry.low <= entry.value <= entry.high, entry


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_exists_and_divides_the_batch(name: str) -> None:
    m = model(name)
    assert m.mesh is not None
    assert isinstance(m.shape, Mapping)
    assert prod(m.shape.values()) == resolve(m.mesh).devices
    assert m.training.batch % max(m.shape.values()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_training_step_derives(name: str) -> None:
    trained = set(step(name).aliases.values())
    assert {p.name for p in model(name).graph.parameters()} <= trained
