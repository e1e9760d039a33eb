"""Where axes do not divide dimensions, padding changes no value.

Random plans whose choices split unevenly wherever they can, on virtual devices whose padding holds
no numbers: whatever would add it up, or read it beside a window, would not be a number either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod

import numpy as np
import pytest
from random_plans import PlanDrawer, expected, lowered, outputs
from small_models import conv_net, decoder, experts, rearranged, step_of

from costmodels.program import Compute
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.sharding.choices import Choice
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

MESHES = {"2x4": (("x", 2), ("y", 4)), "3x2": (("x", 3), ("y", 2)), "8": (("x", 8),)}
DRAWS = 8  # plans per model and mesh: 24 per model
ODD = {"positions": 5, "vocabulary": 11, "width": 7, "hidden": 14, "heads": 3, "head": 3}
STEPS: dict[str, Callable[[], Graph]] = {
    "decoder": lambda: training_step(decoder(batch=6, remat="full", optimizer="adamw", **ODD)),
    "decoder accumulation": lambda: training_step(
        decoder(batch=12, remat="dots", optimizer="adafactor", accumulation_steps=2, **ODD)
    ),
    "experts": lambda: training_step(experts(batch=6)),
    "conv net": lambda: step_of(
        partial(conv_net, batch=3, height=10, width=14), remat="full", optimizer="momentum"
    ),
    "rearranged": lambda: step_of(partial(rearranged, batch=6, width=5), optimizer="sgd"),
}


class UnevenDrawer(PlanDrawer):
    """Prefers choices that pad something."""

    def __init__(self, flow: Flow, axes: tuple[tuple[str, int], ...]) -> None:
        super().__init__(flow, axes)
        self.padding = {
            node: tuple(o for o in options if isinstance(o, Choice) and self.pads(node, o))
            for node, options in self.options.items()
        }

    def pads(self, node: tuple[str, int | str], choice: Choice) -> bool:
        rule = self.flow.sites[str(node[1])].op.rule
        return any(
            f.size % prod(self.sizes[a] for a in axes)
            for f, axes in zip(rule.factors, choice.split, strict=True)
        )

    def _option(self, rng, node, eager):  # type: ignore[no-untyped-def]
        if self.padding[node] and rng.random() < 0.7:
            return rng.choice(self.padding[node])
        return super()._option(rng, node, eager)


@cache
def prepared(name: str) -> tuple[Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    graph = STEPS[name]()
    inputs = reference.random_inputs(graph)
    return build_flow(graph, {}, uneven=True), inputs, expected(graph, inputs)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # positions that are padding
def test_any_plan_with_padding_computes_what_the_graph_computes(name: str, mesh: str) -> None:
    flow, inputs, wanted = prepared(name)
    drawer = UnevenDrawer(flow, MESHES[mesh])
    for seed in range(DRAWS):
        plan = drawer.draw(seed)
        assert sum(drawer.pads(("op", n), c) for n, c in plan.choices.items()) > 5
        found = outputs(flow, plan, lowered(flow, plan), inputs)
        assert found.keys() == wanted.keys()
        for key, array in wanted.items():
            np.testing.assert_allclose(found[key], array, rtol=1e-7, atol=1e-9, err_msg=key)
