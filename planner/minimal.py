"""The fewest annotations from which propagation recovers a plan.

Annotations are dropped as long as what propagation makes of the rest is, priced, within
MAX_SLOWDOWN and MAX_GROWTH of what all annotations are, and none can be dropped in the end.
Both are priced as annotations are read, which bind gradients too; a plan itself may be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from planner.annotations import Axes, annotated, stacked_dims
from planner.errors import InputError
from planner.pins import PinError
from planner.planning import Options, Unsolved, price_annotations
from planner.progress import Progress
from planner.result import Result
from planner.sharding.formulate import Unsatisfiable
from planner.sharding.propagate import propagate
from planner.sharding.spec import Spec

MAX_SLOWDOWN = 0.01  # plans within 1 % of the step time count as equally good
MAX_GROWTH = 0.05  # of the peak memory: a plan that fits may not eat all the room that is left
Names = tuple[str, ...]


@dataclass(frozen=True)
class Minimal:
    """`annotations` are the ones that are left, `result` the plan that they stand for, `full` the
    one of all `count` annotations of the plan. Like layers count as one and have one."""

    annotations: Mapping[str, Axes]
    result: Result
    full: Result
    count: int


def minimal(
    result: Result, options: Options | None = None, progress: Progress | None = None
) -> Minimal:
    """Raises InputError for a pipeline, or if the annotations of the plan stand for no plan."""
    if result.model.pipeline is not None:
        raise InputError("--minimal is not for pipelines", "their stages are programs of their own")
    annotations = {a.name: a.axes for a in annotated(result)}
    search = _Search(result, annotations, options or Options(), progress)
    full = search.priced(tuple(annotations))
    if full is None:
        raise InputError(f"{result.model.name}: no plan keeps all of its annotations")
    names = search.smallest(tuple(annotations), full)
    found = search.priced(names)
    return Minimal({n: annotations[n] for n in names}, found or full, full, len(annotations))


def completed(result: Result, annotations: Mapping[str, Axes]) -> dict[str, Axes]:
    """What propagation makes of a few annotations: the axes of every tensor of the model."""
    graph = result.model.graph
    tensors = graph.all_tensors()
    given = {}
    for name, axes in annotations.items():
        whole = len(tensors[name].shape) - len(axes)  # stacked dimensions are left out
        given[name] = Spec((*((),) * whole, *axes))
    specs = propagate(graph, given, dict(result.mesh.axes))
    names = [a.name for a in annotated(result)]
    return {name: specs[name].dims[stacked_dims(tensors[name]) :] for name in names}


@dataclass
class _Search:
    result: Result
    annotations: Mapping[str, Axes]
    options: Options
    progress: Progress | None
    seen: dict[tuple[tuple[str, Axes], ...], Result | None] = field(default_factory=dict)

    def smallest(self, names: Names, full: Result) -> Names:
        """Drops halves, quarters, … and in the end single ones, until no single one can go."""
        size = len(names) // 2 or 1
        while True:
            before = len(names)
            for part in _parts(names, size):
                rest = tuple(n for n in names if n not in part)
                if self.recovers(rest, full):
                    names = rest
                    self.say(f"{len(names)} annotations")
            # Dropping one may make another superfluous: singles are tried until none can go.
            if size == 1 and len(names) == before:
                return names
            size = max(size // 2, 1)

    def recovers(self, names: Names, full: Result) -> bool:
        found = self.priced(names)
        if found is None:
            return False
        limit_s = full.timing.step_time_s * (1 + MAX_SLOWDOWN)
        limit_bytes = full.memory.peak_bytes * (1 + MAX_GROWTH)
        return (
            found.timing.step_time_s <= limit_s
            and found.memory.peak_bytes <= limit_bytes
            and found.fits == full.fits
        )

    def priced(self, names: Names) -> Result | None:
        """The plan that the annotations stand for; None if they stand for none."""
        axes = completed(self.result, {n: self.annotations[n] for n in names})
        key = tuple(axes.items())
        if key not in self.seen:
            self.seen[key] = self._price(axes)
        return self.seen[key]

    def _price(self, axes: Mapping[str, Axes]) -> Result | None:
        model, mesh = self.result.model, self.result.mesh
        try:
            return price_annotations(model, mesh, axes, self.options)
        except (PinError, Unsatisfiable, Unsolved):  # such a completion is no plan
            return None

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)


def _parts(names: Names, size: int) -> Iterator[frozenset[str]]:
    """Last ones first: what flows forward from earlier tensors is dropped before these."""
    for stop in range(len(names), 0, -size):
        yield frozenset(names[max(stop - size, 0) : stop])
