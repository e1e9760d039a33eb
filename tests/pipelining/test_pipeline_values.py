"""A pipelined step computes what the same step with plain gradient accumulation computes.

Twenty random plans per schedule and model: the loss, every new parameter and optimizer state.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from random_pipelines import PipelineDrawer, pipelined
from small_models import decoder, encoder_decoder

DRAWS = 20
CASES = {
    "1f1b": lambda: pipelined(decoder(layers_=4, optimizer="adamw", remat="full"), "1f1b"),
    "1f1b, nothing recomputed": lambda: pipelined(
        decoder(layers_=3, optimizer="momentum", remat="none"), "1f1b", microbatches=3
    ),
    "1f1b, encoder and decoder": lambda: pipelined(
        encoder_decoder(optimizer="sgd", remat="full"), "1f1b", microbatches=3
    ),
    "gpipe": lambda: pipelined(decoder(layers_=2, optimizer="sgd", remat="full"), "gpipe"),
    "circular": lambda: pipelined(
        decoder(layers_=4, optimizer="sgd", remat="none"), "circular", chunks=2
    ),
    "interleaved": lambda: pipelined(
        decoder(layers_=4, optimizer="adamw", remat="dots"), "interleaved", chunks=2
    ),
}


@cache
def drawer(name: str) -> PipelineDrawer:
    return PipelineDrawer(CASES[name](), 2, {"x": 2, "y": 2})


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("name", CASES)
def test_any_plan_computes_what_accumulation_computes(name: str, seed: int) -> None:
    found, wanted = drawer(name).run(seed), drawer(name).wanted
    assert found.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_allclose(found[tensor], array, rtol=1e-7, atol=1e-9, err_msg=tensor)
