"""Where a plan makes gradients, as far as a generated program can say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from planner.graph.core import Op
from planner.result import Result
from planner.sharding.spec import Spec


class Gradients:
    """Of the tensors of a step, found by their names."""

    def __init__(self, result: Result) -> None:
        self.choices = result.plan.choices
        self.order = [name for name, _ in result.mesh.axes]
        self.makers: dict[str, tuple[Op, int]] = {}  # gradient → what makes it
        self.terms: dict[str, dict[str, tuple[Op, int]]] = {}  # tensor → gradient → its maker
        self.readers: dict[str, list[Op]] = {}
        for op, _ in result.graph.walk():
            if op.phase == "forward" or op.name not in self.choices:
                continue
            for name in dict.fromkeys(op.ins):
                self.readers.setdefault(name, []).append(op)
            for k, out in enumerate(op.outs):
                if named := re.fullmatch(r"(.*)\.grad(_\d+)?", out):
                    self.makers[out] = self.terms.setdefault(named[1], {})[out] = (op, k)

    def of(self, name: str) -> Spec | None:
        """Where all terms of a gradient are added up, or the only one lies; None where the plan
        says several places."""
        terms = self.terms.get(name, {})
        added = {x for op, _ in terms.values() for x in op.ins}
        last = [out for out in terms if out not in added]
        lies = _only(self._place(out) for out in last)
        return lies or _only(_only(self._read(out)) for out in last)

    def made(self, gradient: str) -> Spec | None:
        """Where a gradient is made; None if loops do."""
        return self._made(*self.makers[gradient]) if gradient in self.makers else None

    def of_use(self, op: Op, name: str) -> Spec | None:
        """Where the term of the gradient lies that one reader of the tensor is the cause of."""
        made = [out for out, (maker, _) in self.terms.get(name, {}).items() if _of(maker, op)]
        return self._place(made[0]) if len(made) == 1 else None

    def unreduced(self, name: str, other: str) -> Spec | None:
        """Where the term that is made of `other`, too, lies before it is reduced; None if it is no
        sum over devices."""
        maker = self._maker(name, other)
        made = None if maker is None else self._made(*maker)
        return made.without_partial() if made and made.partial else None

    def made_of(self, name: str, other: str) -> tuple[Spec | None, Spec | None]:
        """How `other` is read where the one term is made that is made of it, too, and where that
        term lies before it is reduced."""
        maker = self._maker(name, other)
        if maker is None:
            return None, None
        op, k = maker
        read = self.choices[op.name].operand(op.rule, op.ins.index(other))
        return read, self._made(op, k).without_partial()

    def sums(self, name: str) -> int:
        """How many terms of a gradient are made as sums over devices."""
        return sum(bool(self._made(*maker).partial) for maker in self.terms.get(name, {}).values())

    def read_by(self, name: str, other: str) -> tuple[str, Spec | None]:
        """What the one term of a gradient is made of besides `other`, and how that is read."""
        maker = self._maker(name, other)
        if maker is None or len(maker[0].ins) != 2:
            return "", None
        op, _ = maker
        at = 1 - op.ins.index(other)
        spec = self.choices[op.name].operand(op.rule, at)
        return op.ins[at], None if spec.partial else spec

    def _maker(self, name: str, other: str) -> tuple[Op, int] | None:
        """What makes the one term of a gradient that is made of `other`, too."""
        found = [maker for maker in self.terms.get(name, {}).values() if other in maker[0].ins]
        return found[0] if len(found) == 1 else None

    def _made(self, op: Op, k: int) -> Spec:
        return self.choices[op.name].result(op.rule, k, self.order)

    def _place(self, gradient: str) -> Spec | None:
        """Sums are where their reader has them."""
        made = self._made(*self.makers[gradient])
        return made if not made.partial else _only(self._read(gradient))

    def _read(self, gradient: str) -> Iterator[Spec | None]:
        for op in self.readers.get(gradient, ()):
            for i in (i for i, name in enumerate(op.ins) if name == gradient):
                spec = self.choices[op.name].operand(op.rule, i)
                yield None if spec.partial else spec


def _only(specs: Iterable[Spec | None]) -> Spec | None:
    found = {*specs}
    return found.pop() if len(found) == 1 else None


def _of(maker: Op, op: Op) -> bool:
    """Whether a gradient is made of that of one of the results of `op`."""
    made = [re.compile(rf"{re.escape(out)}\.grad(_\d+)?(\..*)?") for out in op.outs]
    return any(pattern.fullmatch(name) for pattern in made for name in maker.ins)
