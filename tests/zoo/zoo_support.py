"""Reads zoo files without the model-file front end, so that the zoo is tested by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from planner import zoo
from planner.architectures import ARCHITECTURES, Architecture, build
from planner.graph.core import Graph
from planner.model import Training


@cache
def document(name: str) -> dict[str, Any]:
    return yaml.safe_load(zoo.text(name))


def architecture(name: str) -> Architecture:
    settings = document(name)["architecture"]
    return ARCHITECTURES[settings["kind"]](**settings)


def training(name: str) -> Training:
    return Training(**document(name)["training"])


@cache
def graph(name: str) -> Graph:
    settings = training(name)
    batch = settings.batch // settings.accumulation_steps
    return build(architecture(name), batch, settings)
