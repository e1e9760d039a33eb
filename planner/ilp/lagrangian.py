"""Multipliers for the memory limit: bounds, and choices that fit.

Only the dual side belongs here. With a price λ_t ≥ 0 per time point,

    bound(λ) = min over choices of cost + Σ_t λ_t (load_t − limit)   ≤   optimum,

and the minimum is itself bounded from below by message passing (`messages`). λ moves along the
overload of the rounded choices, smoothed, with steps aimed at a target slightly above the best
bound (a level method: Brännlund 1995); the target comes closer whenever progress stops.

The choices to keep come from the same messages at prices raised further (`extra`) where the
recent choices did not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ilp.clock import Clock
from planner.ilp.messages import Messages
from planner.ilp.problem import Vector
from planner.ilp.profile import Profile
from planner.ilp.rounding import Rounding
from planner.ilp.work import Work

Ints = NDArray[np.int64]

UNLIMITED = Clock()
MOST_SWEEPS = 10
SETTLED = 0.02
"""Messages follow a change of prices until a pair of sweeps gains less than this share of the
target's distance, at most MOST_SWEEPS pairs: stale messages would hide the slope."""
FIRST_TARGET = 0.3
"""The first target is this share above the best bound."""
CLOSER = 0.6
"""Factor on the distance of the target when STALLED rounds brought no progress."""
LAST_TARGET = 1e-6
STALLED = 8
MEMORY_OF_LOADS = 0.7
"""Weight of the past in the smoothed overload."""
LONGEST_STEP = 0.3
"""Longest step of Σ λ·limit, as a share of the bound (a guard before loads settle)."""
EXTRA_FADES = 0.9
EXTRA_GAIN = 0.1
"""`extra` prices: what remains of them per round, and what an overload adds (as a share of
the bound per limit)."""


@dataclass
class Dual:
    """State of the ascent on one working problem."""

    work: Work
    clock: Clock = UNLIMITED
    """Sweeps end with it: on the largest problems a round takes seconds."""
    messages: Messages = field(init=False)
    rounding: Rounding = field(init=False)
    profile: Profile = field(init=False)
    bound: float = -np.inf
    cost: float = np.inf
    choice: Ints | None = None
    rounds: int = 0

    def __post_init__(self) -> None:
        self.messages = Messages(self.work)
        self.rounding = Rounding(self.messages)
        self.profile = Profile(self.work)
        points = len(self.work.base)
        self.prices = np.zeros(points)
        self.best_prices = np.zeros(points)
        self.extra = np.zeros(points)
        self.average: Vector | None = None
        self.last: Ints = np.zeros(len(self.messages.nodes), dtype=np.int64)
        self.distance = FIRST_TARGET
        self.stalled = 0
        self.unit = self.work.limit if np.isfinite(self.work.limit) and self.work.limit > 0 else 1.0

    # ---- one round --------------------------------------------------------------------------

    def step(self) -> None:
        """One round: messages, bound, rounded choices, and new prices."""
        cost = self.messages.unary + self.profile.price(self.prices)
        fixed = self.work.offset + float(self.prices @ (self.work.base - self.work.limit))
        bound = -np.inf
        for _ in range(MOST_SWEEPS):
            before = bound
            self.messages.sweep(cost, up=True)
            bound = fixed + self.messages.sweep(cost, up=False)
            if bound - before < SETTLED * self.distance * abs(bound) or self.clock.over():
                break
        self._credit(bound)
        load = self._try(cost)
        if len(load):
            self._try_extra(cost, load)
            self._move(bound, (load - self.work.limit) / self.unit)
        self.rounds += 1

    def _credit(self, bound: float) -> None:
        self.stalled += 1
        if bound > self.bound:
            if bound > self.bound + 0.1 * self.distance * abs(self.bound):
                self.stalled = 0
            self.bound = bound
            self.best_prices = self.prices.copy()

    def _try(self, cost: Vector) -> Vector:
        """Rounds, keeps the choice if it is the best that fits, returns its load."""
        at = self.rounding.round(cost)
        x = np.zeros(self.messages.labels)
        x[self.messages.first[:-1] + at] = 1.0
        load = self.profile.load(x)
        self.last = at
        price = self.rounding.cost(at) + self.work.offset
        if price < self.cost and self.profile.fits(load):
            self.cost = price
            self.choice = self.by_node(at)
        return load

    def _try_extra(self, cost: Vector, load: Vector) -> None:
        """A second choice at raised prices, until something fits and now and then after."""
        if self.choice is not None and self.rounds % 3:
            return
        self.extra *= EXTRA_FADES
        self._raise_extra(load)
        load = self._try(cost + self.profile.price(self.extra))
        self._raise_extra(load)

    def _raise_extra(self, load: Vector) -> None:
        peaks = self.profile.peaks(load)
        over = (load[peaks] - self.work.limit) / self.unit
        self.extra[peaks] += EXTRA_GAIN * abs(self.bound) / self.unit * np.minimum(over, 1.0)

    def _move(self, bound: float, over: Vector) -> None:
        """A step along the smoothed overload at its peaks and where a price is set."""
        if self.stalled > STALLED:
            self.distance *= CLOSER
            self.stalled = 0
            self.prices = self.best_prices.copy()
            self.average = None
            return
        past = over if self.average is None else self.average
        self.average = MEMORY_OF_LOADS * past + (1 - MEMORY_OF_LOADS) * over
        where = self.prices > 0
        where[self.profile.peaks(self.average * self.unit + self.work.limit)] = True
        slope = np.where(where, self.average, 0.0)
        norm = max(float(slope @ slope), 1e-6)
        target = self.bound + self.distance * abs(self.bound)
        longest = LONGEST_STEP * abs(self.bound) / np.sqrt(norm)
        step = min((target - bound) / norm, longest) / self.unit
        self.prices = np.maximum(0.0, self.prices + step * slope)

    def settled(self) -> bool:
        """Whether the target has come so close that more rounds hardly move the bound."""
        return self.distance < LAST_TARGET

    # ---- views ------------------------------------------------------------------------------

    def by_node(self, at: Ints) -> Ints:
        """A choice indexed by node, from one by position."""
        choice = np.zeros(self.work.original, dtype=np.int64)
        choice[self.messages.nodes] = at
        return choice

    def split(self, labels: Vector) -> list[Vector]:
        """Per-label values as one vector per node (empty for nodes that are gone)."""
        parts: list[Vector] = [np.zeros(0)] * self.work.original
        first = self.messages.first[1:-1]
        for n, part in zip(self.messages.nodes, np.split(labels, first), strict=True):
            parts[n] = part
        return parts

    # ---- what the dual knows ----------------------------------------------------------------

    def regrets(self, sweeps: int = 3) -> tuple[float, Vector]:
        """A bound, and per label what choosing it adds to that bound at least.

        At the best prices. While a node is processed in the backward pass, its belief holds
        exact minima of every chain through it, and the bound is no less than after the forward
        pass; so bound + (belief − least belief) holds for every choice with that label.
        """
        m = self.messages
        cost = m.unary + self.profile.price(self.best_prices)
        fixed = self.work.offset + float(self.best_prices @ (self.work.base - self.work.limit))
        for _ in range(sweeps):
            m.sweep(cost, up=False)
            bound = fixed + m.sweep(cost, up=True)
        regret = np.zeros(m.labels)
        for batch in m.backward:
            belief = m.belief(batch, cost)
            least = np.minimum.reduceat(belief, batch.label_start)
            regret[batch.label_at] = belief - least[batch.node_of_label]
            m.send(batch, belief)
        self.bound = max(self.bound, bound)
        return bound, regret
