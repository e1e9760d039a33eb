"""Schedules: every half runs once, in an order that never waits for itself; how many microbatches
wait on every stage, by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.schedule import (
    BACKWARD,
    FORWARD,
    ScheduleError,
    Table,
    Task,
    in_flight,
    most_waiting,
    schedule,
)

KINDS = ("gpipe", "1f1b", "interleaved", "circular")


def slots(table: Table) -> int:
    """Slots until all is done, if every task takes one; fails if tasks wait for each other."""
    left = [list(tasks) for tasks in table]
    last = max(t.stage for tasks in table for t in tasks)
    done: set[Task] = set()
    count = 0
    while any(left):
        ready = [tasks[0] for tasks in left if tasks and _ready(tasks[0], last, done)]
        assert ready, "tasks wait for each other"
        for tasks in left:
            if tasks and tasks[0] in ready:
                tasks.pop(0)
        done.update(ready)
        count += 1
    return count


def _ready(task: Task, last: int, done: set[Task]) -> bool:
    if task.phase == FORWARD:
        return task.stage == 0 or task._replace(stage=task.stage - 1) in done
    own = task._replace(phase=FORWARD)
    return own in done and (task.stage == last or task._replace(stage=task.stage + 1) in done)


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(2, 4), st.integers(1, 5))
def test_every_half_of_every_microbatch_runs_once(
    kind: str, devices: int, chunks: int, groups: int
) -> None:
    chunks = chunks if kind in ("interleaved", "circular") else 1
    microbatches = groups * devices
    table = schedule(kind, devices, chunks, microbatches)
    counts = Counter(task for tasks in table for task in tasks)
    stages = range(devices * chunks)
    wanted = {Task(p, s, i) for p in (FORWARD, BACKWARD) for s in stages
              for i in range(microbatches)}  # fmt: skip
    assert counts == Counter(wanted)
    for place, tasks in enumerate(table):
        assert {t.stage % devices for t in tasks} == {place}
    # Nobody can be done before the work and the way through the pipeline and back allow.
    assert slots(table) >= 2 * (microbatches * chunks + devices - 1)


@given(st.integers(1, 6), st.integers(1, 12))
def test_bubbles_of_equal_halves(devices: int, microbatches: int) -> None:
    """p - 1 slots ahead and behind, whichever of the two orders (Narayanan et al. 2021)."""
    for kind in ("gpipe", "1f1b"):
        table = schedule(kind, devices, 1, microbatches)
        assert slots(table) == 2 * (microbatches + devices - 1)


@given(st.integers(2, 5), st.integers(2, 3), st.integers(1, 3))
def test_interleaving_divides_the_bubble(devices: int, chunks: int, groups: int) -> None:
    """In slots of a stage, of which a device has several, it is the p - 1 of one stage."""
    table = schedule("interleaved", devices, chunks, groups * devices)
    assert slots(table) == 2 * (groups * devices * chunks + devices - 1)


def test_microbatches_in_flight() -> None:
    assert in_flight(schedule("1f1b", 4, 1, 8)) == {0: 4, 1: 3, 2: 2, 3: 1}
    assert in_flight(schedule("1f1b", 4, 1, 2)) == {0: 2, 1: 2, 2: 2, 3: 1}
    assert in_flight(schedule("gpipe", 3, 1, 5)) == {0: 5, 1: 5, 2: 5}
    # Megatron: 2 (p - 1 - d) + (chunks - 1) p are ahead, and one is being worked on.
    interleaved = schedule("interleaved", 4, 2, 8)
    assert [most_waiting(tasks) for tasks in interleaved] == [11, 9, 7, 5]


def test_the_order_of_one_device() -> None:
    first = schedule("1f1b", 2, 1, 3)[0]
    assert [f"{t.phase[0]}{t.microbatch}" for t in first] == ["f0", "f1", "b0", "f2", "b1", "b2"]
    chunked = schedule("interleaved", 2, 2, 2)[0]
    assert [f"{t.phase[0]}{t.stage}.{t.microbatch}" for t in chunked] == [
        "f0.0", "f0.1", "f2.0", "f2.1", "b2.0", "b2.1", "b0.0", "b0.1",
    ]  # fmt: skip


def test_groups_have_to_be_whole() -> None:
    with pytest.raises(ScheduleError, match="groups of 4 microbatches"):
        schedule("interleaved", 4, 2, 6)
