"""Programs for the cost model's tests: a builder, and random ones that are always well formed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

import meshes
from costmodels.program import (
    CATEGORIES,
    MOVES,
    Buffer,
    CarryBuffers,
    Collective,
    Compute,
    Instruction,
    Kernel,
    LoopStep,
    Program,
    StackBuffers,
    Step,
)

AXES = (("x", 2), ("y", 2))
MESHES = ("tpu-v3:2x1", "tpu-v5p:2x2x1", "dgx-a100-80gb:1x4", "dgx-a100-80gb:2x2")


def mesh_of(name: str, overlap: frozenset[str] | None = None) -> meshes.LogicalMesh:
    """A 2 × 2 mesh; `overlap` replaces what the chip runs asynchronously."""
    topology = meshes.resolve(name)
    if overlap is not None:
        topology = replace(topology, chip=replace(topology.chip, overlap=overlap))
    return meshes.logical(topology, dict(AXES))


@dataclass
class Draft:
    """Buffers under construction."""

    buffers: dict[int, Buffer] = field(default_factory=dict)

    def new(self, size: int = 1, category: str = "temporaries", alias: int | None = None) -> int:
        number = len(self.buffers)
        self.buffers[number] = Buffer(number, (size,), "i8", category, f"t{number}", alias)
        return number

    def compute(self, ins: tuple[int, ...], outs: tuple[int, ...], size: float = 0.0) -> Compute:
        """A kernel that moves `size` bytes through memory."""
        return Compute(Kernel(f"k{outs[0]}", "map", "bf16", size, 0.0), ins, outs)

    def matmul(self, ins: tuple[int, ...], outs: tuple[int, ...], n: int) -> Compute:
        return Compute(Kernel(f"m{outs[0]}", "map", "bf16", 1.0, 0.0, (1, n, n, n)), ins, outs)

    def move(self, kind: str, source: int, result: int, size: int) -> Collective:
        return Collective(kind, ("x",), source, result, size, 0, tensor=f"t{result}")

    def program(self, block, inputs, outputs) -> Program:
        named = {f"in{b}": b for b in inputs}, {f"out{b}": b for b in outputs}
        return Program(AXES, self.buffers, tuple(block), *named)


MOST_BYTES = 60_000_000  # of a kernel or collective: up to some hundred microseconds


@dataclass
class _Random:
    """`steps`: most parts of a block, so that small values give small programs."""

    chance: random.Random
    steps: int
    draft: Draft = field(default_factory=Draft)

    def buffer(self, alias: int | None = None) -> int:
        category = self.chance.choice(CATEGORIES)
        return self.draft.new(self.chance.randint(1, 1000), category, alias)

    def some(self, of: list[int], most: int) -> tuple[int, ...]:
        return tuple(self.chance.sample(of, self.chance.randint(0, min(most, len(of)))))

    def instruction(self, known: list[int]) -> Instruction:
        # Mostly recent values, so that chains arise as casts around collectives are.
        source = self.chance.choice(known[-4:] if self.chance.random() < 0.7 else known)
        result = self.buffer()
        what = self.chance.choice(("move", "move", "matmul", "pass", "pass"))
        size = self.chance.randint(0, MOST_BYTES)
        if what == "move":
            return self.draft.move(self.chance.choice((*MOVES, "slice")), source, result, size)
        others = self.some(known, 1) if self.chance.random() < 0.5 else ()
        if what == "matmul":
            return self.draft.matmul((source, *others), (result,), self.chance.randint(1, 800))
        return self.draft.compute((source, *others), (result,), float(size))

    def step(self, known: list[int], fewest: int, most: int) -> Step:
        made = []
        for _ in range(self.chance.randint(fewest, most)):
            made.append(self.instruction(known))
            known += made[-1].outs
        return Step(f"step{len(self.draft.buffers)}", tuple(made))

    def block(self, known: list[int], depth: int) -> list[Step | LoopStep]:
        parts: list[Step | LoopStep] = [self.step(known, 2, 3)]
        for _ in range(self.chance.randint(0, self.steps)):
            if depth and self.chance.random() < 0.3:
                parts.append(self.loop(known, depth - 1))
            parts.append(self.step(known, 0, 3))  # lowering ends every loop with a step, too
        return parts

    def loop(self, known: list[int], depth: int) -> LoopStep:
        enter = self.step(known, 0, 1)
        inits = self.some(known, 2)
        reads = tuple(StackBuffers(s, self.buffer(alias=s)) for s in self.some(known, 2))
        entries = [self.buffer() for _ in inits]
        inside = [*known, *entries, *(s.inner for s in reads)]
        before = len(inside)
        body = self.block(inside, depth)
        made = inside[before:]
        exits = self.chance.sample(made, len(inits))
        results = [self.buffer() for _ in inits]
        carries = tuple(map(CarryBuffers, inits, entries, exits, results))
        writes = tuple(StackBuffers(self.buffer(), b) for b in self.some(made, 2))
        known += [*results, *(w.outer for w in writes)]
        times = self.chance.choice((1, 2, 3, 7, 12))
        return LoopStep(f"loop{before}", times, enter, tuple(body), carries, reads, writes)


def random_program(seed: int, steps: int, depth: int) -> Program:
    """Steps, loops in loops, carries, stacks, slices, an aliased output."""
    draft = _Random(random.Random(seed), steps)
    inputs = [draft.buffer() for _ in range(draft.chance.randint(1, 3))]
    known = list(inputs)
    block = draft.block(known, depth)
    outputs = [*draft.some(known, 3)]
    if seed % 2:
        donated = draft.buffer(alias=inputs[0])
        update = draft.draft.compute((known[-1], inputs[0]), (donated,), 1e6)
        block.append(Step("update", (update,)))
        outputs.append(donated)
    return draft.draft.program(block, inputs, outputs)


def programs(depth: int = 2) -> st.SearchStrategy[Program]:
    """Any small program that is well formed."""
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(random_program, seeds, st.integers(0, 5), st.integers(0, depth))
