"""The cheapest plan that fits, by the ILP: memory constraints added where a program exceeds."""

from __future__ import annotations

from both_prices import Price, lowered_price

from planner.ilp import solve
from planner.plan import Plan, Proof
from planner.sharding.formulate import Space


def cheapest_fitting(space: Space, limit: float | None) -> tuple[Plan, Price] | None:
    """The optimum proven by the solver, and what its lowered program costs; None: nothing fits."""
    active: list[int] = []
    while True:
        outcome = solve(space.problem(limit if active else None, active))
        if outcome.choice is None:
            assert outcome.status == "infeasible"
            return None
        assert outcome.status == "optimal"
        proof = Proof(outcome.status, outcome.cost, outcome.bound, outcome.gap)
        plan = space.plan(outcome.choice.tolist(), proof)
        price = lowered_price(space, plan)
        worst = int(price.profile.argmax())
        if limit is None or price.profile[worst] <= limit:
            return plan, price
        assert worst not in active, "the ILP under-estimates the memory of a step it constrains"
        active = sorted([*active, worst])
