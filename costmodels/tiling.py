"""How arguments and convolutions lie in a TPU's memory, and what its compiler does not store.

Tiles. A TPU moves registers of 8 × 128 numbers, and XLA lays every array in such tiles: of the two
dimensions that vary fastest one is padded to a multiple of 128, the other to a multiple of 8, or to
4 (`T(8,128)`, `T(4,128)` in compiled programs; openxla.org/xla/tiled_layout). Convolutions have
their channels and their samples there, whichever way round takes less. So 64 channels take the
memory of 128, and what passes between convolutions lies as they read it. Arguments have those two
dimensions in tiles with which they take least: a convolution reads a copy of them.

One sample. XLA would cut it into eight blocks along a spatial dimension (`space-to-batch`) and copy
what they share again and again: a U-Net of one 128³ volume took 12.2 GiB so. Exported programs make
the slices along the first spatial dimension the samples instead (5.6 GiB, 39 % of the cycles), and
copy those that a window reads beside each other.

Operands. What is computed point by point, or put together, for convolutions alone is computed
inside of them, in each again: never stored, and no pass of its own. What it is made of is kept
instead. Where a convolution copies what it reads, the copies are what this pass makes.

Seen with libtpu 0.0.52 on v3; `benchmarks/tpu_convolutions.py` compares it with the compiler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count, islice, permutations
from math import prod

from costmodels.program import Block, Buffer, Compute, Kernel, LoopStep, Program, Step

SUBLANES, LANES = 8, 128
# Operands and results of a convolution and its gradients that are no weights: (read, made).
_ACTIVATIONS = {"conv": ((0,), (0,)), "conv_dx": ((0,), (0,)), "conv_dw": ((0, 1), ())}
_POOLS = ("max_pool", "max_pool_dx", "avg_pool", "avg_pool_dx")


def laid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes that an array [samples, space…, channels] takes beside a convolution."""
    rows = 0 if shape[0] > 1 else 1
    ways = []
    for lanes, sublanes in ((-1, rows), (rows, -1)):
        sizes = list(shape)
        sizes[lanes] = _padded(sizes[lanes], LANES)
        few = SUBLANES // 2
        sizes[sublanes] = _padded(sizes[sublanes], few if sizes[sublanes] <= few else SUBLANES)
        ways.append(tuple(sizes))
    return min(ways, key=prod)


def laid_argument(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes that an argument of a program takes; vectors have no padding worth counting."""
    if len(shape) < 2:
        return shape
    ways = []
    for lanes, sublanes in permutations(range(len(shape)), 2):
        sizes = list(shape)
        sizes[lanes] = _padded(sizes[lanes], LANES)
        rows = next((few for few in (1, 2, 4) if sizes[sublanes] <= few), SUBLANES)
        sizes[sublanes] = _padded(sizes[sublanes], rows)
        ways.append(tuple(sizes))
    return min(ways, key=prod)


def tile_arguments(program: Program) -> Program:
    """The program with the sizes that its inputs take in memory."""
    buffers = dict(program.buffers)
    for number in program.inputs.values():
        b = buffers[number]
        buffers[number] = replace(b, laid=laid_argument(b.shape))
    return replace(program, buffers=buffers)


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def tile_convolutions(program: Program) -> Program:
    """The program with the sizes of such buffers, with copies of arguments and of what is moved,
    and with those that are not stored."""
    shapes = _beside_convolutions(program)
    if not shapes:
        return program
    remade = _remade(program)
    arguments = shapes.keys() & set(program.inputs.values())
    buffers = {
        number: replace(b, laid=shapes[number]) if number in shapes.keys() - arguments else b
        for number, b in program.buffers.items()
    }  # fmt: skip
    fresh = count(max(buffers) + 1)

    def copies(of: int, times: int) -> tuple[int, ...]:
        b = program.buffers[of]
        numbers = tuple(islice(fresh, times))
        for number in numbers:
            buffers[number] = Buffer(
                number, b.shape, b.dtype, "temporaries", f"{b.tensor}.copy", laid=shapes[of]
            )
        return numbers

    lasting = [number for of in sorted(arguments) for number in copies(of, 1)]
    scratch = {}
    for i, _ in program.instructions():
        if isinstance(i, Compute) and i.kernel.copies[1]:
            position, times = i.kernel.copies
            of = i.outs[0] if position < 0 else i.ins[position]
            scratch[i.outs[0]] = copies(of, times + (of in remade))
    moved = {b for i, _ in program.instructions() if i.outs[0] in scratch for b in i.ins}
    return replace(
        program, buffers=buffers, block=_without_passes(program.block, remade.keys() - moved),
        copies=(*program.copies, *lasting), remade={**program.remade, **remade}, scratch=scratch,
    )  # fmt: skip


def _activations(kernel: Kernel, ins: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[int]:
    read, made = _ACTIVATIONS.get(kernel.kind, ((), ()))
    yield from (ins[k] for k in read)
    yield from (outs[k] for k in made)


def _beside_convolutions(program: Program) -> dict[int, tuple[int, ...]]:
    """Sizes of what convolutions read and make, and of arrays of the same shape, or at the other
    end of a pooling, that are computed of those."""
    found: dict[int, tuple[int, ...]] = {}
    passes = []
    for i, _ in program.instructions():
        if isinstance(i, Compute) and i.kernel.kind in _ACTIVATIONS:
            for b in _activations(i.kernel, i.ins, i.outs):
                found[b] = laid(program.buffers[b].shape)
        elif isinstance(i, Compute):
            passes.append((i.kernel.kind in _POOLS, (*i.ins, *i.outs)))
    if not found:
        return found
    passes += [(False, group) for group in _handed_on(program.block)]
    size = -1
    while size != len(found):
        size = len(found)
        for pools, group in passes:
            shapes = {program.buffers[b].shape for b in group if b in found}
            for b in group if shapes else ():
                shape = program.buffers[b].shape
                if pools or shape in shapes:
                    found.setdefault(b, laid(shape))
    for outer, inner in _stacks(program.block):
        if inner in found:
            whole = program.buffers[outer].shape
            found[outer] = (*whole[: len(whole) - len(found[inner])], *found[inner])
    return found


def _loops(block: Block) -> Iterator[LoopStep]:
    """Every loop, after those in its body."""
    for step in block:
        if isinstance(step, LoopStep):
            yield from _loops(step.body)
            yield step


def _handed_on(block: Block) -> Iterator[tuple[int, ...]]:
    for loop in _loops(block):
        yield from ((k.init, k.entry, k.exit, k.result) for k in loop.carries)


def _stacks(block: Block) -> Iterator[tuple[int, int]]:
    for loop in _loops(block):
        yield from ((s.outer, s.inner) for s in (*loop.reads, *loop.writes))


def _remade(program: Program) -> Mapping[int, tuple[int, ...]]:
    """Buffers that only convolutions read, or what is computed in them → what they are made of."""
    readers: dict[int, list[Compute | None]] = defaultdict(list)
    makers = []
    for i, _ in program.instructions():
        for b in i.ins:
            readers[b].append(i if isinstance(i, Compute) else None)
        if isinstance(i, Compute) and _pointwise(program, i):
            makers.append(i)
    needed = {*program.inputs.values(), *program.outputs.values(), *_crossing(program.block)}
    found: dict[int, tuple[int, ...]] = {}
    for i in reversed(makers):  # readers come before what they read
        made = i.outs[0]
        if made in needed or program.buffers[made].alias is not None or not readers[made]:
            continue
        if all(r is not None and _inside(r, made, found) for r in readers[made]):
            found[made] = i.ins
    return found


def _crossing(block: Block) -> Iterable[int]:
    for group in (*_handed_on(block), *_stacks(block)):
        yield from group


def _without_passes(block: Block, fused: Collection[int]) -> Block:
    """The block where what is computed inside of convolutions takes no time of its own."""
    found: list[Step | LoopStep] = []
    for step in block:
        if isinstance(step, LoopStep):
            found.append(replace(step, body=_without_passes(step.body, fused)))
            continue
        instructions = (
            replace(i, kernel=replace(i.kernel, bytes=0.0, vector_flops=0.0))
            if isinstance(i, Compute) and i.outs[0] in fused else i for i in step.instructions
        )  # fmt: skip
        found.append(replace(step, instructions=tuple(instructions)))
    return tuple(found)


def _pointwise(program: Program, i: Compute) -> bool:
    """Whether a step makes one array, of parts or point by point."""
    if i.kernel.kind not in ("map", "concat") or i.kernel.matmul is not None or len(i.outs) != 1:
        return False
    made = program.buffers[i.outs[0]]
    return all(prod(program.buffers[b].shape) <= prod(made.shape) for b in i.ins)


def _inside(reader: Compute, buffer: int, remade: Mapping[int, tuple[int, ...]]) -> bool:
    read, _ = _ACTIVATIONS.get(reader.kernel.kind, ((), ()))
    if read:
        return all(k in read for k, b in enumerate(reader.ins) if b == buffer)
    return any(b in remade for b in reader.outs)
