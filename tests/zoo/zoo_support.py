"""The zoo's models, loaded once."""

from __future__ import annotations

from functools import cache

from planner import zoo
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.model import Model
from planner.modelfile import load_model


@cache
def model(name: str) -> Model:
    return load_model(zoo.text(name), f"{name}.yaml")


@cache
def step(name: str) -> Graph:
    return training_step(model(name))
