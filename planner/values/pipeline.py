"""Values of a pipelined program: all stages on all devices, in the order of the table.

Every stage has an interpreter of its own, over the axes that shard it. What crosses between
stages is handed over device by device, to the one at the same place of the next stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from costmodels.pipeline import PipelineProgram, StageProgram
from costmodels.schedule import FORWARD, Task
from planner.values.interpret import Interpreter, Shards


def run_pipeline(
    program: PipelineProgram, inputs: Sequence[Mapping[str, Shards]]
) -> list[dict[str, Shards]]:
    """The outputs of every stage, from its inputs."""
    runs = [
        _StageRun(stage, Interpreter(stage.program))
        for stage in program.stages
    ]  # fmt: skip
    for run, given in zip(runs, inputs, strict=True):
        run.begin(given)
    arrived: dict[Task, dict[str, Shards]] = {}
    for task in _in_order(program, arrived):
        neighbour = task.stage + (-1 if task.phase == FORWARD else 1)
        received = arrived.get(task._replace(stage=neighbour), {})
        arrived[task] = runs[task.stage].task(task, received)
    for run in runs:
        run.leave()
    for run in runs:
        for (parameter, giver), buffer in run.stage.taken.items():
            run.values[buffer] = runs[giver].values[runs[giver].stage.given[parameter]]
    return [run.finish() for run in runs]


def _in_order(program: PipelineProgram, done: Mapping[Task, object]) -> Iterator[Task]:
    """The tasks of the table, each after those that it reads from."""
    left = [list(reversed(tasks)) for tasks in program.table]
    last = len(program.stages) - 1
    while any(left):
        moved = False
        for tasks in left:
            while tasks and _ready(tasks[-1], last, done):
                yield tasks.pop()
                moved = True
        if not moved:
            raise ValueError("the tasks of the schedule wait for each other")


def _ready(task: Task, last: int, done: Mapping[Task, object]) -> bool:
    if task.phase == FORWARD:
        return task.stage == 0 or task._replace(stage=task.stage - 1) in done
    return task.stage == last or task._replace(stage=task.stage + 1) in done


@dataclass
class _StageRun:
    """One stage: what is left between the halves of every microbatch in flight."""

    stage: StageProgram
    interpreter: Interpreter
    saved: dict[int, dict[int, Shards]] = field(default_factory=dict)

    @property
    def values(self) -> dict[int, Shards]:
        return self.interpreter.values

    def begin(self, inputs: Mapping[str, Shards]) -> None:
        for name, buffer in self.stage.program.inputs.items():
            self.values[buffer] = inputs[name]
        self.interpreter.execute(self.stage.parts["before"].block)
        for k in self.stage.microbatches.carries:
            self.values[k.entry] = self.values[k.init]

    def task(self, task: Task, received: Mapping[str, Shards]) -> dict[str, Shards]:
        """Runs one half; returns what it sends."""
        carried = {k.entry: self.values[k.entry] for k in self.stage.microbatches.carries}
        if task.phase == FORWARD:
            for s in self.stage.microbatches.reads:
                whole = self.values[s.outer]
                self.values[s.inner] = {d: a[task.microbatch] for d, a in whole.items()}
        else:
            self.values.update(self.saved.pop(task.microbatch))
            self.values.update(carried)
        for key, buffer in self.stage.received[task.phase].items():
            self.values[buffer] = received[key]
        self.interpreter.execute(self.stage.parts[task.phase].block)
        if task.phase == FORWARD:
            self.saved[task.microbatch] = dict(self.values)
        else:
            moved = {k.entry: self.values[k.exit] for k in self.stage.microbatches.carries}
            self.values.update(moved)
        return {key: self.values[b] for key, b in self.stage.sent[task.phase].items()}

    def leave(self) -> None:
        """After the last microbatch."""
        for k in self.stage.microbatches.carries:
            self.values[k.result] = self.values[k.entry]
        self.interpreter.execute(self.stage.parts["leave"].block)

    def finish(self) -> dict[str, Shards]:
        self.interpreter.execute(self.stage.parts["after"].block)
        return {name: self.values[b] for name, b in self.stage.program.outputs.items()}
