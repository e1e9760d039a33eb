"""Large-neighbourhood search: free a few hundred nodes of the incumbent, solve them exactly.

Only the choice of neighbourhoods and the bookkeeping of their size belong here. Nodes whose
present strategy the dual regrets are freed first, with what surrounds them; strategies the dual
rules out by a wide margin stay out of the sub-problem (a heuristic: the incumbent stays in).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ilp import exact
from planner.ilp.clock import Clock
from planner.ilp.presolve import presolve
from planner.ilp.problem import Vector
from planner.ilp.profile import Profile
from planner.ilp.subproblem import Mask, Part, restrict
from planner.ilp.work import Infeasible, Work

Ints = NDArray[np.int64]

FIRST_SIZE = 150
SMALLEST, LARGEST = 20, 3000
GROW, SHRINK = 1.15, 0.7
"""Free nodes of a neighbourhood: it grows when solved to the end, shrinks when cut short."""
LARGEST_CELLS = 300_000
"""Matrix entries of a neighbourhood: they decide how long its relaxation takes."""
NODES = 400
"""Branch-and-bound nodes for one neighbourhood."""
SECONDS = 8.0
"""Wall clock for one neighbourhood (only where the whole solve has a time limit)."""


@dataclass
class Neighbourhoods:
    """Search state on one working problem. `choice` always fits."""

    work: Work
    profile: Profile
    choice: Ints
    cost: float
    seed: int = 0
    regret: list[Vector] | None = None
    """Per node and strategy; None: unknown."""
    margin: float = np.inf
    size: float = FIRST_SIZE
    tried: int = 0
    found: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.nodes = np.array(self.work.nodes(), dtype=np.int64)
        self.load = self.profile.load_of(self.choice)

    def restart(self, choice: Ints, cost: float) -> None:
        """Another incumbent, which fits."""
        self.choice, self.cost, self.load = choice, cost, self.profile.load_of(choice)

    def step(self, clock: Clock) -> bool:
        """Tries one neighbourhood; True if the incumbent became better."""
        allowed = self._allowed()
        return self.over(self._small(self._pick(), allowed), allowed, clock, resize=True)

    def over(
        self, free: list[int], allowed: list[Mask] | None, clock: Clock, *, resize: bool = False
    ) -> bool:
        """Solves over these nodes and strategies; True if the incumbent became better."""
        part = restrict(self.work, self.choice, self.load, free, allowed)
        better = self._solve(part, clock, resize)
        self.tried += 1
        if better is None:
            return False
        cost = self.work.price(better)
        load = self.profile.load_of(better)
        if not (cost < self.cost and self.profile.fits(load)):
            return False
        self.choice, self.cost, self.load = better, cost, load
        self.found += 1
        return True

    def _solve(self, part: Part, clock: Clock, resize: bool) -> Ints | None:
        try:
            presolve(part.work)
            search = exact.search(
                part.work, clock=clock.within(SECONDS), nodes=NODES, upper=part.cost,
                seed=self.seed,
            )  # fmt: skip
        except Infeasible:
            return None
        if resize:
            done = search.status in ("optimal", "infeasible")
            largest = min(LARGEST, len(self.nodes))
            self.size = float(np.clip(self.size * (GROW if done else SHRINK), SMALLEST, largest))
        if search.choice is None:
            return None
        return part.merge(self.choice, part.work.expand(search.choice))

    # ---- which nodes ------------------------------------------------------------------------

    def _pick(self) -> list[int]:
        """Nodes around a few seeds; how many seeds, and how they are drawn, alternates."""
        count = min(int(self.size), len(self.nodes))
        seeds = int(self.rng.choice([1, 1, 2, 4, 16]))
        starts = self.rng.choice(self.nodes, size=min(seeds, count), replace=False, p=self._odds())
        if self.rng.random() < 0.25:
            return self._window(int(starts[0]), count)
        return self._ball([int(n) for n in starts], count)

    def _small(self, free: list[int], allowed: list[Mask] | None) -> list[int]:
        """The first of these nodes whose matrices are not too large together; at least one."""
        size = {n: self.work.size(n) if allowed is None else int(allowed[n].sum()) for n in free}
        kept: set[int] = set()
        cells = 0
        for n in free:
            cells += size[n] * sum(size[m] for m in self.work.adj[n] if m in kept)
            if kept and cells > LARGEST_CELLS:
                break
            kept.add(n)
        return list(kept)

    def _odds(self) -> Vector | None:
        """Half uniform, half by what the dual regrets in the present strategies."""
        if self.regret is None:
            return None
        weight = np.array([self.regret[n][self.choice[n]] for n in self.nodes.tolist()])
        weight = np.minimum(weight, self.margin)
        if weight.sum() <= 0:
            return None
        odds: Vector = 0.5 / len(weight) + 0.5 * weight / weight.sum()
        return odds

    def _window(self, start: int, count: int) -> list[int]:
        """Consecutive nodes: the numbering follows the program."""
        at = int(np.searchsorted(self.nodes, start))
        lo = max(0, min(at - count // 2, len(self.nodes) - count))
        return [int(n) for n in self.nodes[lo : lo + count]]

    def _ball(self, starts: list[int], count: int) -> list[int]:
        """Nodes by distance from the starts, neighbours in random order."""
        queue = deque(starts)
        seen = set(starts)
        while queue and len(seen) < count:
            near = [m for m in self.work.adj[queue.popleft()] if m not in seen]
            for k in self.rng.permutation(len(near)):
                if len(seen) < count:
                    seen.add(near[k])
                    queue.append(near[k])
        return list(seen)

    def _allowed(self) -> list[Mask] | None:
        """Strategies within the margin of regret; now and then all."""
        if self.regret is None or self.rng.random() < 0.1:
            return None
        return [r <= self.margin for r in self.regret]
