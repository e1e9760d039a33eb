"""A pipelined step computes what the same step with plain gradient accumulation computes.

Twenty random plans per schedule and model: the loss, every new parameter and optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from random_pipelines import PipelineDrawer, StackedDrawer, pipelined
from small_models import decoder, encoder_decoder, experts

from planner.model import Model

DRAWS = 20
QUICK = 3  # of these in every run of the tests
SMALL = {"layers_": 2, "positions": 2, "width": 4, "hidden": 4, "heads": 2}
ODD = {"positions": 3, "vocabulary": 7, "width": 6, "hidden": 5, "heads": 3, "batch": 3}


def padded(model: Model) -> Model:
    return replace(model, uneven=True)


CASES: dict[str, Callable[[], PipelineDrawer | StackedDrawer]] = {
    "1f1b": lambda: PipelineDrawer(
        pipelined(decoder(optimizer="adamw", remat="full"), "1f1b", microbatches=3),
        2, {"x": 2, "y": 2},
    ),
    "1f1b, four stages, nothing recomputed": lambda: PipelineDrawer(
        pipelined(
            decoder(**SMALL, optimizer="momentum", remat="none"), "1f1b", microbatches=6
        ),
        4, {"x": 2},
    ),
    "1f1b, encoder and decoder": lambda: PipelineDrawer(
        pipelined(encoder_decoder(optimizer="sgd", remat="full"), "1f1b"), 4, {"x": 2}
    ),
    "interleaved": lambda: PipelineDrawer(
        pipelined(
            decoder(**{**SMALL, "layers_": 4}, optimizer="adamw", remat="dots"),
            "interleaved", chunks=2,
        ),
        2, {"x": 2},
    ),
    "1f1b, padded": lambda: PipelineDrawer(
        padded(pipelined(decoder(optimizer="adamw", remat="full", **ODD), "1f1b")), 2, {"x": 4}
    ),
    "gpipe in one program, padded": lambda: StackedDrawer(
        padded(pipelined(decoder(optimizer="sgd", remat="none", **ODD), "gpipe")), 2, {"x": 4}
    ),
    "gpipe": lambda: PipelineDrawer(
        pipelined(decoder(**SMALL, optimizer="sgd", remat="full"), "gpipe"), 2, {"x": 2}
    ),
    "gpipe in one program": lambda: StackedDrawer(
        pipelined(decoder(layers_=4, optimizer="adamw", remat="full"), "gpipe"), 2, {"x": 2, "y": 2}
    ),
    "gpipe in one program, encoder and decoder": lambda: StackedDrawer(
        pipelined(encoder_decoder(optimizer="sgd", remat="full"), "gpipe"), 2, {"x": 2, "y": 2}
    ),
    "gpipe in one program, experts": lambda: StackedDrawer(
        pipelined(experts(), "gpipe"), 2, {"x": 4}
    ),
    "circular in one program": lambda: StackedDrawer(
        pipelined(
            decoder(**{**SMALL, "layers_": 8}, optimizer="adamw", remat="full"),
            "circular", chunks=2, microbatches=4,
        ),
        2, {"x": 2, "y": 2},
    ),
    "circular in one program, three rounds, as many microbatches as stages": lambda: StackedDrawer(
        pipelined(
            decoder(**{**SMALL, "layers_": 12}, optimizer="sgd", remat="none"),
            "circular", chunks=3, microbatches=4,
        ),
        4, {"x": 2},
    ),
    "circular": lambda: PipelineDrawer(
        pipelined(
            decoder(**{**SMALL, "layers_": 4}, optimizer="sgd", remat="none"),
            "circular", chunks=2, microbatches=2,
        ),
        2, {"x": 2},
    ),
}  # fmt: skip
SEEDS = [pytest.param(n, marks=[] if n < QUICK else [pytest.mark.slow]) for n in range(DRAWS)]


@cache
def drawer(name: str) -> PipelineDrawer | StackedDrawer:
    return CASES[name]()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # padding cast to positions
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_any_plan_computes_what_accumulation_computes(name: str, seed: int) -> None:
    found, wanted = drawer(name).run(seed), drawer(name).wanted
    assert found.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_allclose(found[tensor], array, rtol=1e-7, atol=1e-9, err_msg=tensor)
