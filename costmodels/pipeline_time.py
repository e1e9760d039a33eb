"""Seconds of a pipelined step: the halves of every stage simulated once, then the table played.

A task starts when its device is free and what it reads has arrived from the neighbouring stage. A
transfer takes a collective-permute along the axis; on a chip that overlaps this kind it runs
beside computation, otherwise sender and receiver wait for it. Within a task nothing is in flight
at the edges, as at the edges of a loop.

    step_time_s = compute_s + exposed_communication_s + bubble_s

on the device that ends last: exposed communication is what its tasks wait for the network and
blocking transfers, bubbles are the time in which it has nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from costmodels.pipeline import PipelineProgram
from costmodels.pricing import prices
from costmodels.program import Program
from costmodels.schedule import BACKWARD, FORWARD, Task
from costmodels.simulate import Event, Timing, simulate
from meshes import LogicalMesh


def simulate_pipeline(
    program: PipelineProgram, mesh: LogicalMesh, *, trace: bool = False
) -> Timing:
    """Time of one step on the device that takes longest; the table's tasks as events if asked
    for. Raises ValueError for a table in which tasks wait for each other."""
    play = _Play(program, _durations(program, mesh), trace)
    return play.timing(play.last())


def slowest(program: PipelineProgram, mesh: LogicalMesh) -> int:
    """The position along the axis whose devices end last."""
    return _Play(program, _durations(program, mesh), False).last()


@dataclass(frozen=True)
class _Stage:
    """Seconds of one stage's parts, and of what it sends after each half."""

    parts: dict[str, Timing]
    transfer: dict[str, float]
    exchange: float
    blocking: bool


def _durations(program: PipelineProgram, mesh: LogicalMesh) -> list[_Stage]:
    table = prices(mesh)
    known: dict[int, dict[str, Timing]] = {}  # stages of one kind share their parts
    found = []
    for number, stage in enumerate(program.stages):
        parts = known.get(id(stage.program))
        if parts is None:
            parts = {name: _timed(part, mesh) for name, part in stage.parts.items()}
            known[id(stage.program)] = parts
        transfer = {
            phase: sum(table.seconds(move) for move in program.crossings(number, phase))
            for phase in (FORWARD, BACKWARD)
        }
        exchange = sum(table.seconds(move) for move in program.exchanges(number))
        blocking = "collective-permute" not in mesh.chip.overlap
        found.append(_Stage(parts, transfer, exchange, blocking))
    return found


def _halves(stages: Sequence[_Stage]) -> dict[str, list[_Half]]:
    """By phase and stage; activations come from the stage before, gradients from the one after."""
    sent: dict[str, list[dict[int, float]]] = {
        phase: [{} for _ in stages] for phase in (FORWARD, BACKWARD)
    }
    found: dict[str, list[_Half]] = {FORWARD: [], BACKWARD: []}
    for number, stage in enumerate(stages):
        for phase, source in ((FORWARD, number - 1), (BACKWARD, number + 1)):
            reads = sent[phase][source] if 0 <= source < len(stages) else None
            transfer = stage.transfer[phase]
            found[phase].append(
                _Half(
                    reads, sent[phase][number], stage.parts[phase].step_time_s, transfer,
                    transfer if stage.blocking else 0.0,
                )
            )  # fmt: skip
    return found


def with_bubbles(timing: Timing, loops: Collection[str], share: float) -> Timing:
    """`timing` of a pipeline in one program: `share` of the iterations of `loops` are bubbles."""
    idle = [timing.loops[name] for name in loops if name in timing.loops]
    compute = timing.compute_s - share * sum(loop.compute_s for loop in idle)
    exposed = timing.exposed_communication_s - share * sum(
        loop.exposed_communication_s for loop in idle
    )
    bubble = share * sum(loop.step_time_s for loop in idle)
    return replace(
        timing, compute_s=compute, exposed_communication_s=exposed, bubble_s=bubble,
        step_time_s=compute + exposed + bubble,
    )  # fmt: skip


def _timed(part: Program, mesh: LogicalMesh) -> Timing:
    return simulate(part, mesh) if part.block else Timing(0.0, 0.0, 0.0)


@dataclass
class _Device:
    """How far one device has come: the clock, and how it spent its time."""

    tasks: Sequence[Task]
    done: int = 0
    clock: float = 0.0
    compute: float = 0.0
    exposed: float = 0.0

    def spend(self, timing: Timing) -> None:
        self.clock += timing.step_time_s
        self.compute += timing.compute_s
        self.exposed += timing.exposed_communication_s

    def wait(self, seconds: float) -> None:
        self.clock += seconds
        self.exposed += seconds


class _Half(NamedTuple):
    """The tasks of one stage and phase: what each takes, and by microbatch when what it reads has
    arrived (None: it reads nothing) and when what it sends has."""

    reads: dict[int, float] | None
    sent: dict[int, float]
    seconds: float
    transfer: float
    blocked: float  # how long the sender waits for the transfer


@dataclass
class _Play:
    program: PipelineProgram
    stages: list[_Stage]
    trace: bool
    halves: dict[str, list[_Half]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    devices: list[_Device] = field(default_factory=list)

    def timing(self, place: int) -> Timing:
        """How the device at `place` spent the step."""
        device = self.devices[place]
        bubble = max(device.clock - device.compute - device.exposed, 0.0)
        total = device.compute + device.exposed + bubble
        return Timing(total, device.compute, device.exposed, bubble, tuple(self.events))

    def last(self) -> int:
        """Plays the table; the position of the device that ends last."""
        self.devices = devices = [_Device(tasks) for tasks in self.program.table]
        self.halves = _halves(self.stages)
        for place, device in enumerate(devices):
            for stage in self.program.stages_at(place):
                device.spend(self.stages[stage].parts["before"])
        moving = True
        while moving:
            advanced = [self._advance(device, place) for place, device in enumerate(devices)]
            moving = any(advanced)
        stuck = [d for d in devices if d.done < len(d.tasks)]
        if stuck:
            raise ValueError(f"the schedule never gets to {stuck[0].tasks[stuck[0].done]}")
        for place, device in enumerate(devices):
            self._account(device, self.program.stages_at(place))
        self._close(devices)
        return max(range(len(devices)), key=lambda place: devices[place].clock)

    def _advance(self, device: _Device, place: int) -> bool:
        """Runs tasks of a device until one has to wait for a task that has not run yet.

        Tens of thousands run in a step: only the clock is kept here, and in local names."""
        start, clock, tasks, halves = device.done, device.clock, device.tasks, self.halves
        done, count, trace = start, len(tasks), self.trace
        while done < count:
            task = tasks[done]
            phase, stage, micro = task
            reads, sent, seconds, transfer, blocked = halves[phase][stage]
            if reads is not None:
                ready = reads.get(micro)
                if ready is None:
                    break
                if ready > clock:
                    clock = ready
            if trace:
                self._record(task, place, clock)
            clock += seconds
            sent[micro] = clock + transfer
            clock += blocked
            done += 1
        device.done, device.clock = done, clock
        return done > start

    def _record(self, task: Task, place: int, start: float) -> None:
        name = f"{task.phase} {task.stage}.{task.microbatch}"
        row = f"{self.program.axis} {place:02}"
        seconds = self.halves[task.phase][task.stage].seconds
        self.events.append(Event(name, row, start, seconds, task.phase, "task"))

    def _account(self, device: _Device, stages: Iterable[int]) -> None:
        """What the tasks of `stages` spent their time with."""
        for stage in stages:
            for phase, halves in self.halves.items():
                half, timing = halves[stage], self.stages[stage].parts[phase]
                count = len(half.sent)
                device.compute += count * timing.compute_s
                device.exposed += count * (timing.exposed_communication_s + half.blocked)

    def _close(self, devices: Sequence[_Device]) -> None:
        """What is done once a step after the last microbatch: exchanges, updates."""
        for place, device in enumerate(devices):
            for stage in self.program.stages_at(place):
                device.spend(self.stages[stage].parts["leave"])
        ends = [device.clock for device in devices]
        for place, device in enumerate(devices):
            for stage in self.program.stages_at(place):
                for _, giver in self.program.stages[stage].taken:
                    device.clock = max(device.clock, ends[self.program.place(giver)])
                device.wait(self.stages[stage].exchange)
        for place, device in enumerate(devices):
            for stage in self.program.stages_at(place):
                device.spend(self.stages[stage].parts["after"])
