"""Search at contest scale: dual ascent for bounds and a first choice, then neighbourhoods.

Only the order of the phases and how time is shared among them belong here.

1. Multipliers and messages (`lagrangian`) until a choice fits and a share of the time is gone.
2. If the problem is small, branch and bound to the end (`exact`).
3. Choices of the dual at various prices are merged exactly (`merging`), neighbourhoods of the
   incumbent solved exactly (`lns`), while the dual goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ilp import exact
from planner.ilp.clock import Clock
from planner.ilp.lagrangian import Dual
from planner.ilp.lns import Neighbourhoods
from planner.ilp.merging import Pool
from planner.ilp.work import Infeasible, Work

Ints = NDArray[np.int64]
Progress = Callable[[float, float], None]

SMALL_CELLS = 500_000
"""Finite matrix entries up to which branch and bound is worth trying on the whole."""
DUAL_SHARE = 0.15
"""Part of the time that the first ascent may take once a choice fits."""
FIRST_SHARE = 0.1
"""Part of the time in which the dual seeks a first choice before branch and bound."""
PATIENCE_SHARE = 0.5
"""Part of the time after which a choice is sought by putting memory first."""
EXACT_SHARE = 0.5
DUAL_ROUNDS = 150
"""Rounds of the ascent when there is no time limit."""
SEARCH_STEPS = 300
"""Neighbourhoods when there is no time limit."""
MARGIN_SHARE = 0.3
"""Neighbourhoods leave out strategies whose regret exceeds this share of the gap."""
GUIDE_EVERY = 40
"""Steps between two looks at the dual's regrets."""
NEIGHBOURHOOD_EVERY = 3
"""Every so many steps a neighbourhood follows the merge."""
MEMORY_FIRST = 1e-3
"""Weight of the costs when any choice that fits is wanted."""


@dataclass
class Anytime:
    """The search on one presolved problem. `choice` (indexed by node, not expanded) fits.

    A choice that costs at most the share `gap` above the bound ends it.
    """

    work: Work
    clock: Clock
    seed: int = 0
    work_limit: int | None = None
    gap: float = 0.0
    report: Callable[[float, float, Ints | None], None] | None = None
    try_exact: bool = True
    choice: Ints | None = None
    cost: float = np.inf
    bound: float = -np.inf
    status: str = "stopped"
    inner: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def run(self) -> exact.Search:
        """Until optimal, infeasible or out of time; the choice is expanded."""
        try:
            self._phases()
        except Infeasible:
            self.status = "infeasible"
        if self.status == "optimal":
            self.bound = self.cost
        status = self.status
        if status == "stopped" and self.choice is not None:
            status = "feasible"
        return exact.Search(status, self.choice, self.bound)

    def _phases(self) -> None:
        if not self.work.nodes():
            found = exact.search(self.work)
            if found.choice is not None:
                self.take_inner(found.choice, found.bound, found.bound)
            self.status = found.status
            return
        small = self.try_exact and cells(self.work) <= SMALL_CELLS
        dual = None
        if small and self.clock.limited:
            # Branch and bound may find nothing for long: there must be something to write.
            dual = Dual(self.work)
            self._first(dual)
        if small and self._exact(self.clock.share(EXACT_SHARE)):
            return
        dual = Dual(self.work) if dual is None else dual
        self._ascend(dual)
        if dual.choice is None and self.choice is None:
            self._memory_first()
        if self.choice is None:
            return
        if small and self.clock.limited and self._exact(self.clock.share(EXACT_SHARE)):
            return
        self._improve(dual)

    # ---- phases -----------------------------------------------------------------------------

    def _exact(self, clock: Clock) -> bool:
        """Branch and bound on everything; True when it finished or came close enough."""
        found = exact.search(
            self.work, clock=clock, nodes=self.work_limit, gap=self.gap, upper=self.cost,
            seed=self.seed,
        )  # fmt: skip
        if found.choice is not None:
            self.take_inner(found.choice, self.work.price(found.choice), found.bound)
        if found.status == "optimal":
            self.status = "optimal"
            return True
        if found.status == "infeasible":
            self.status = "infeasible" if self.choice is None else "optimal"
            return True
        self.take(None, np.inf, found.bound)
        # Cut short by the work limit, not by the clock, with something to show: that is all.
        spent = self.work_limit is not None and not clock.over()
        return self._closed() or (spent and self.choice is not None)

    def _first(self, dual: Dual) -> None:
        """Rounds of the dual until a choice fits."""
        clock = self.clock.share(FIRST_SHARE)
        while dual.choice is None and not clock.over():
            dual.step()
        self.take_dual(dual)

    def _ascend(self, dual: Dual) -> None:
        share, patience = self.clock.share(DUAL_SHARE), self.clock.share(PATIENCE_SHARE)
        rounds = DUAL_ROUNDS if self.work_limit is None else min(self.work_limit, DUAL_ROUNDS)
        while not patience.over():
            dual.step()
            self.take_dual(dual)
            if self._closed():
                return
            if self._bounded and dual.rounds >= rounds:
                return
            if share.over() and self.choice is not None and self.clock.limited:
                return

    def _memory_first(self) -> None:
        """A choice that fits, at hardly any regard for cost."""
        dual = Dual(self.work.weighted(MEMORY_FIRST))
        for _ in range(10 * DUAL_ROUNDS):
            if self.clock.over() or dual.choice is not None:
                break
            dual.step()
        if dual.choice is not None:
            self.take_inner(dual.choice, self.work.price(dual.choice), -np.inf)

    def _improve(self, dual: Dual) -> None:
        """Dual rounds, merges and neighbourhoods in turn; each gets time as it succeeds."""
        rng = np.random.default_rng(self.seed)
        state = Neighbourhoods(self.work, dual.profile, self.inner, self.cost, self.seed)
        pool = Pool(self.work, dual, rng)
        moves = Moves(self, dual, state, pool)
        limit = SEARCH_STEPS if self.work_limit is None else self.work_limit
        steps = 0
        while not self.clock.over() and not self._closed():
            if self._bounded and steps >= limit:
                return
            moves.step(steps)
            steps += 1

    # ---- bookkeeping ------------------------------------------------------------------------

    @property
    def _bounded(self) -> bool:
        """Whether a fixed amount of work ends the search."""
        return self.work_limit is not None or not self.clock.limited

    def take_dual(self, dual: Dual) -> None:
        if dual.choice is not None and dual.cost < self.cost:
            self.take_inner(dual.choice, dual.cost, dual.bound)
        self.take(None, np.inf, dual.bound)

    def take_inner(self, choice: Ints, cost: float, bound: float) -> None:
        """A choice of the remaining nodes."""
        self.inner = choice
        self.take(self.work.expand(choice), cost, bound)

    def take(self, choice: Ints | None, cost: float, bound: float) -> None:
        better = choice is not None and cost < self.cost
        news = better or bound > self.bound
        if better:
            self.choice, self.cost = choice, cost
        self.bound = max(self.bound, min(bound, self.cost))
        if news and self.report is not None:
            self.report(self.cost, self.bound, self.choice if better else None)

    def _closed(self) -> bool:
        """Bound and cost agree to rounding, or as much as was asked for."""
        if self.choice is None:
            return False
        between = self.cost - self.bound
        if between <= 1e-12 * abs(self.cost):
            self.status = "optimal"
            return True
        return between <= self.gap * abs(self.cost)


@dataclass
class Moves:
    """One step of improvement after the other on an `Anytime` that has a choice."""

    search: Anytime
    dual: Dual
    state: Neighbourhoods
    pool: Pool

    def step(self, number: int) -> None:
        """A dual round or a harvest feeds the pool, a merge uses it; at times a neighbourhood."""
        search, state = self.search, self.state
        if number % GUIDE_EVERY == 0:
            self._guide()
        if number % 2 and not self.dual.settled():
            self.dual.step()
            self.pool.add(self.dual.by_node(self.dual.last))
            search.take_dual(self.dual)
            if search.cost < state.cost:
                state.restart(search.inner, search.cost)
        else:
            self.pool.harvest(state.choice)
        better = state.over(*self.pool.union(state.choice), search.clock)
        if number % NEIGHBOURHOOD_EVERY == NEIGHBOURHOOD_EVERY - 1 and not search.clock.over():
            better = state.step(search.clock) or better
        if better:
            search.take_inner(state.choice, state.cost, search.bound)

    def _guide(self) -> None:
        """Regrets for the neighbourhoods, and the bound that comes with them."""
        bound, regret = self.dual.regrets()
        self.state.regret = self.dual.split(regret)
        self.state.margin = MARGIN_SHARE * max(self.state.cost - bound, 0.0)
        self.search.take(None, np.inf, self.dual.bound)


def cells(work: Work) -> int:
    """Finite matrix entries: what the size of the integer program follows."""
    return sum(
        int(np.isfinite(c).sum()) for n in work.nodes() for m, c in work.adj[n].items() if n < m
    )
