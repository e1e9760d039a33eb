"""Plans with other choices than the solver's, made by hand."""

from __future__ import annotations

from dataclasses import replace

from planner.result import Result
from planner.sharding.choices import Choice


def chosen(result: Result, **splits: dict[str, tuple[str, ...]]) -> Result:
    """`result` with other choices: op → factor → axes."""
    ops = {op.name: op for op, _ in result.graph.walk()}
    choices = {
        name: Choice(tuple(split.get(f.name, ()) for f in ops[name].rule.factors))
        for name, split in splits.items()
    }
    return replace(result, plan=replace(result.plan, choices={**result.plan.choices, **choices}))
