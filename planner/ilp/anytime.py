"""Search at contest scale: dual ascent for bounds and a first choice, then neighbourhoods.

Only the order of the phases and how time is shared among them belong here.

1. Multipliers and messages (`lagrangian`) until a choice fits and prices have settled.
2. If the problem is small, branch and bound to the end (`exact`).
3. Choices of the dual at various prices are merged exactly (`merging`), neighbourhoods of the
   incumbent solved exactly (`lns`), while the dual goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planner.ilp import exact, partner
from planner.ilp.clock import Clock
from planner.ilp.lagrangian import Dual
from planner.ilp.lns import Neighbourhoods
from planner.ilp.merging import Pool
from planner.ilp.partner import Partner
from planner.ilp.work import Infeasible, Work

Ints = NDArray[np.int64]
Progress = Callable[[float, float], None]

SMALL_CELLS = 500_000
"""Finite matrix entries up to which branch and bound is worth trying on the whole."""
DUAL_SHARE = 0.5
"""Part of the time that the first ascent may take once a choice fits."""
FAR = 0.05
"""At a gap above this a limit on the work does not end the first ascent."""
NEAR = 0.005
"""The first ascent ends when its target has come within this share of the bound."""
FIRST_SHARE = 0.1
"""Part of the time in which the dual seeks a first choice before branch and bound."""
PATIENCE_SHARE = 0.3
"""Part of the time after which a choice is sought by putting memory first."""
EXACT_SHARE = 0.5
DUAL_ROUNDS = 150
"""Rounds of the ascent when there is no time limit."""
SEARCH_STEPS = 300
"""Neighbourhoods when there is no time limit."""
MARGIN_SHARE = 0.3
"""Neighbourhoods leave out strategies whose regret exceeds this share of the gap."""
STALLED = 10
"""Steps that have to bring something, where a gap is good enough."""
GUIDE_EVERY = 40
"""Steps between two looks at the dual's regrets."""
NEIGHBOURHOOD_EVERY = 3
"""Every so many steps a neighbourhood follows the merge."""
MEMORY_FIRST = 1e-3
"""Weight of the costs when any choice that fits is wanted."""


@dataclass
class Anytime:
    """The search on one presolved problem. `choice` (indexed by node, not expanded) fits.

    A choice that costs at most the share `gap` above the bound ends it; so does `look` (choice,
    bound), asked of every better one within the share `look_gap`, if it says that going on is not
    worth while, and a bound of `hopeless`.
    """

    work: Work
    clock: Clock
    seed: int = 0
    work_limit: int | None = None
    gap: float = 0.0
    look_gap: float = 0.0
    look: Callable[[Ints, float], bool] | None = None
    hopeless: float = np.inf
    report: Callable[[float, float, Ints | None], None] | None = None
    try_exact: bool = True
    pair: bool = False
    """Whether a second process may help."""
    choice: Ints | None = None
    cost: float = np.inf
    bound: float = -np.inf
    status: str = "stopped"
    looked: float = np.inf
    """Cost of the last choice that `look` was asked of."""
    futile: bool = False
    """Whether `look` or `hopeless` has ended the search."""
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
            dual = Dual(self.work, self.clock)
            self._first(dual)
        if small and self._exact(self.clock.share(EXACT_SHARE)):
            return
        dual = Dual(self.work, self.clock) if dual is None else dual
        if small and self.clock.limited:
            self._ascend(dual, None)
            if self.choice is not None and self._exact(self.clock.share(EXACT_SHARE)):
                return
        with self._company(dual) as other:
            self._ascend(dual, other)
            if self.choice is None and not self.futile:
                self._memory_first(dual, other)
            if self.choice is not None:
                self._improve(self._moves(dual), other)

    # ---- phases -----------------------------------------------------------------------------

    def _exact(self, clock: Clock) -> bool:
        """Branch and bound on everything; True when it finished or came close enough."""
        for gap in sorted({max(self.look_gap, self.gap), self.gap}, reverse=True):
            found = exact.search(
                self.work, clock=clock, nodes=self.work_limit, gap=gap, upper=self.cost,
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
            if self._closed():
                return True
            if self.cost - self.bound > gap * abs(self.cost):
                break
        # Cut short by the work limit, not by the clock, with something to show: that is all.
        return self.work_limit is not None and not clock.over() and self.choice is not None

    def _first(self, dual: Dual) -> None:
        """Rounds of the dual until a choice fits."""
        clock = self.clock.share(FIRST_SHARE)
        while dual.choice is None and not clock.over():
            dual.step()
        self.take_dual(dual)

    def _ascend(self, dual: Dual, other: Partner | None) -> None:
        share, patience = self.clock.share(DUAL_SHARE), self.clock.share(PATIENCE_SHARE)
        rounds = DUAL_ROUNDS if self.work_limit is None else min(self.work_limit, DUAL_ROUNDS)
        while not (patience if self.choice is None else share).over():
            dual.step()
            self.take_dual(dual)
            self._talk(dual, other)
            if self._closed():
                return
            if self._bounded and dual.rounds >= (DUAL_ROUNDS if self._far() else rounds):
                return
            if self.choice is not None and dual.distance < NEAR:
                return

    def _memory_first(self, dual: Dual, other: Partner | None) -> None:
        """A choice that fits, at hardly any regard for cost."""
        cheap = Dual(self.work.weighted(MEMORY_FIRST), self.clock)
        for _ in range(10 * DUAL_ROUNDS):
            if self.clock.over() or self.choice is not None:
                return
            if other is not None and other.orphaned():
                return
            cheap.step()
            if cheap.choice is not None:
                self.adopt(cheap.choice, dual)
            self._talk(dual, other)

    @contextlib.contextmanager
    def _company(self, dual: Dual) -> Iterator[Partner | None]:
        """A second process, where there may and can be one and there is anything left to do."""
        late = self.clock.over() or self._closed()
        if late or self._bounded or not (self.pair and partner.possible()):
            yield None
            return
        points = len(self.work.base)
        with partner.beside(self.work.original, points, partial(self._second, dual)) as other:
            yield other

    def _second(self, dual: Dual, other: Partner) -> None:
        """The second process: a first choice by other means, then improvement while the first
        process still seeks the right prices. It says nothing to anybody else."""
        self.report = None
        if self.choice is None:
            self._memory_first(dual, other)
        if self.choice is not None:
            moves = self._moves(dual)
            moves.assist(self.seed + 1)
            self._improve(moves, other)

    def _talk(self, dual: Dual, other: Partner | None) -> None:
        """Before there is anything to merge: the better choice counts."""
        if other is None:
            return
        choice = other.new_choice()
        if choice is not None:
            self.adopt(choice, dual)
        if self.choice is not None:
            other.show_choice(self.inner)
        other.show_prices(dual.best_prices)

    def adopt(self, choice: Ints, dual: Dual) -> None:
        """Takes a choice of the remaining nodes if it fits and is the best."""
        cost = self.work.price(choice)
        if cost < self.cost and dual.profile.fits(dual.profile.load_of(choice)):
            self.take_inner(choice, cost, -np.inf)

    def _moves(self, dual: Dual) -> Moves:
        state = Neighbourhoods(self.work, dual.profile, self.inner, self.cost, self.seed)
        return Moves(self, dual, state, Pool(self.work, dual, np.random.default_rng(self.seed)))

    def _improve(self, moves: Moves, other: Partner | None) -> None:
        """Dual rounds, merges and neighbourhoods in turn."""
        limit = SEARCH_STEPS if self.work_limit is None else self.work_limit
        steps, between = 0, np.inf
        while not self.clock.over() and not self._closed():
            if self._bounded and steps >= limit:
                return
            if self._bounded and steps % STALLED == 0:
                # Who is content with a gap does not wait for what is less than half of it.
                last, between = between, self.cost - self.bound
                if last - between < self.gap * abs(self.cost) / 2:
                    return
            moves.step(steps)
            steps += 1
            if other is not None:
                if other.orphaned():
                    return
                moves.exchange(other)

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

    def _far(self) -> bool:
        """Whether neighbourhoods of the choice would hardly lead to where the bound is."""
        return self.choice is None or self.cost - self.bound > FAR * abs(self.cost)

    def _closed(self) -> bool:
        """Bound and cost agree to rounding, or as much as was asked for; or there is no point."""
        self.futile = self.futile or self.bound >= self.hopeless
        if self.futile:
            return True
        if self.choice is None:
            return False
        between = self.cost - self.bound
        if between <= 1e-12 * abs(self.cost):
            self.status = "optimal"
            return True
        near = between <= self.look_gap * abs(self.cost)
        if self.look is not None and near and self.cost < self.looked:
            self.looked = self.cost
            self.futile = not self.look(self.choice, self.bound)
        return self.futile or between <= self.gap * abs(self.cost)


@dataclass
class Moves:
    """One step of improvement after the other on an `Anytime` that has a choice."""

    search: Anytime
    dual: Dual
    state: Neighbourhoods
    pool: Pool
    leads: bool = True
    """Whether the dual goes on here; else its prices come from the other process."""

    def assist(self, seed: int) -> None:
        """Other random numbers, and prices by somebody else."""
        self.leads = False
        self.state.rng = np.random.default_rng(seed)
        self.pool.rng = np.random.default_rng(seed)

    def exchange(self, other: Partner) -> None:
        """Shows what is new here; a choice shown by the other side is merged at once."""
        choice, prices = other.new_choice(), other.new_prices()
        if choice is not None:
            self.pool.add(choice)
            if self.state.over(*self.pool.pair(self.state.choice, choice), self.search.clock):
                self.search.take_inner(self.state.choice, self.state.cost, self.search.bound)
        other.show_choice(self.state.choice)
        if self.leads:
            other.show_prices(self.dual.best_prices)
        elif prices is not None:
            self.dual.best_prices = prices

    def step(self, number: int) -> None:
        """A dual round or a harvest feeds the pool, a merge uses it; at times a neighbourhood."""
        search, state = self.search, self.state
        if number % GUIDE_EVERY == 0:
            self._guide()
        if self.leads and number % 2 and not self.dual.settled():
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
