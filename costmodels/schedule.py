"""Pipeline schedules: for every device, the order in which it works on stages and microbatches.

Stage c·p + d is the c-th of device d; p devices, in the order of the pipeline. What tasks take and
when they start is decided elsewhere; here is only their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Task(NamedTuple):
    """A half of a stage's work on one microbatch."""

    phase: str
    stage: int
    microbatch: int


Table = tuple[tuple[Task, ...], ...]  # of every device, in its order


class ScheduleError(ValueError):
    """A schedule that cannot be for so many devices and microbatches."""


def schedule(kind: str, devices: int, chunks: int, microbatches: int) -> Table:
    """The table of `kind` (see docs/pipelines.md) for `chunks` stages on each device."""
    if chunks > 1 and microbatches % devices:
        raise ScheduleError(
            f"a pipeline with several stages per device works on groups of {devices} microbatches "
            f"(one per device), {microbatches} do not divide into them"
        )
    return tuple(tuple(_ORDERS[kind](d, devices, chunks, microbatches)) for d in range(devices))


def in_flight(table: Table) -> dict[int, int]:
    """Of every stage the most microbatches that wait for their backward half at one time."""
    most: dict[int, int] = {}
    for tasks in table:
        for counts, task in waiting(tasks):
            now = counts.get(task.stage, 0) + (task.phase == FORWARD)
            most[task.stage] = max(most.get(task.stage, 0), now)
    return most


def most_waiting(tasks: Sequence[Task]) -> int:
    """The most microbatches in flight on a device, all its stages together, counting one that
    is being worked on."""
    return max(sum(counts.values()) + (task.phase == FORWARD) for counts, task in waiting(tasks))


def waiting(tasks: Sequence[Task]) -> Iterator[tuple[dict[int, int], Task]]:
    """Every task of a device with how many microbatches of each of its stages have only their
    forward half done when it starts. The mapping is one and the same, changed on the way."""
    counts: dict[int, int] = {}
    for task in tasks:
        yield counts, task
        change = 1 if task.phase == FORWARD else -1
        counts[task.stage] = counts.get(task.stage, 0) + change


def _forwards(d: int, p: int, chunks: int, microbatches: int) -> list[Task]:
    """Groups of p microbatches go through one chunk after the other."""
    if chunks == 1:
        return [Task(FORWARD, d, i) for i in range(microbatches)]
    return [
        Task(FORWARD, c * p + d, group + i)
        for group in range(0, microbatches, p)
        for c in range(chunks)
        for i in range(p)
    ]


def _backwards(d: int, p: int, chunks: int, microbatches: int) -> list[Task]:
    """The same order with the chunks reversed."""
    return [
        Task(BACKWARD, (chunks - 1 - t.stage // p) * p + d, t.microbatch)
        for t in _forwards(d, p, chunks, microbatches)
    ]


def _all_forward_first(d: int, p: int, chunks: int, microbatches: int) -> list[Task]:
    """What differentiating one loop over the microbatches gives: the last forward half's
    backward half comes first."""
    forwards = _forwards(d, p, chunks, microbatches)
    return [*forwards, *(t._replace(phase=BACKWARD) for t in reversed(forwards))]


def _alternating(d: int, p: int, chunks: int, microbatches: int) -> list[Task]:
    """As many forward halves as it takes until the first backward one can start, then one of
    each in turn (Narayanan et al. 2021; Megatron's count of warm-up tasks)."""
    forwards = _forwards(d, p, chunks, microbatches)
    backwards = _backwards(d, p, chunks, microbatches)
    ahead = p - 1 - d if chunks == 1 else 2 * (p - 1 - d) + (chunks - 1) * p
    ahead = min(ahead, len(forwards))
    if chunks > 1 and microbatches == p:
        ahead = len(forwards)
    steady = [
        t for pair in zip(forwards[ahead:], backwards, strict=False) for t in pair
    ]  # the longer list's rest follows
    return [*forwards[:ahead], *steady, *backwards[len(forwards) - ahead :]]


_ORDERS = {
    "gpipe": _all_forward_first, "circular": _all_forward_first,
    "1f1b": _alternating, "interleaved": _alternating,
}  # fmt: skip
