"""Construct, merge, solve: the best recombination of many choices, found exactly.

Only the pool and its recombination belong here. Choices of the relaxation at different prices
agree on most nodes; where they differ, one uses less memory and another costs less. Freeing
just the strategies that occur in a handful of them leaves a small problem, which presolve and
branch and bound finish with the true limit in about a second (after Blum et al., Construct,
Merge, Solve & Adapt, 2016).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ilp import conditioning
from planner.ilp.lagrangian import Dual
from planner.ilp.work import Work

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

POOL = 60
LEAST, MOST = 2, 8
"""How many choices are merged at once."""
PRICE_SPREAD = 0.6
"""Standard deviation of the logarithm of the factor on the prices."""
SWEEPS = 4
"""Pairs of message sweeps that let messages follow changed prices."""


@dataclass
class Pool:
    """Choices by node; most do not fit, which is what makes them useful together."""

    work: Work
    dual: Dual
    rng: np.random.Generator
    choices: list[Ints] = field(default_factory=list)

    def add(self, choice: Ints) -> None:
        self.choices.append(choice)
        del self.choices[:-POOL]

    def harvest(self, incumbent: Ints) -> None:
        """A new choice at prices scaled at random, improved by one conditioned move."""
        dual = self.dual
        prices = dual.best_prices * np.exp(self.rng.normal() * PRICE_SPREAD)
        cost = dual.messages.unary + dual.profile.price(prices)
        start = incumbent
        if self.rng.random() < 0.75:
            for _ in range(SWEEPS):
                dual.messages.sweep(cost, up=True)
                dual.messages.sweep(cost, up=False)
            start = dual.by_node(dual.rounding.round(cost))
            self.add(start)
        own = dual.split(cost)
        steps, fixed = conditioning.order(self.work, self.rng)
        self.add(conditioning.move(self.work, steps, fixed, start, own))

    def union(self, incumbent: Ints) -> tuple[list[int], list[Mask]]:
        """Nodes on which some chosen members differ from the incumbent, and what they allow."""
        count = min(len(self.choices), int(self.rng.integers(LEAST, MOST + 1)))
        picked = self.rng.choice(len(self.choices), size=count, replace=False)
        return self._span([self.choices[k] for k in picked] + self.choices[-1:], incumbent)

    def pair(self, incumbent: Ints, other: Ints) -> tuple[list[int], list[Mask]]:
        """Where one other choice differs from the incumbent."""
        return self._span([other], incumbent)

    def _span(self, members: list[Ints], incumbent: Ints) -> tuple[list[int], list[Mask]]:
        allowed: list[Mask] = [np.zeros(0, dtype=bool)] * self.work.original
        free: list[int] = []
        for n in self.work.nodes():
            mask = np.zeros(self.work.size(n), dtype=bool)
            mask[[m[n] for m in members]] = True
            mask[incumbent[n]] = True
            allowed[n] = mask
            if mask.sum() > 1:
                free.append(n)
        return free, allowed
