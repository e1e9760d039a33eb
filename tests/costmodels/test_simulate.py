"""The two-stream simulation: laws on random programs, and schedules worked out by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import AXES, MESHES, Draft, mesh_of, programs

import meshes
from costmodels import simulate as module
from costmodels.memory import read_memory
from costmodels.overlap import plan_overlap
from costmodels.pricing import prices
from costmodels.program import (
    MOVES,
    Block,
    CarryBuffers,
    Collective,
    Instruction,
    LoopStep,
    Program,
    StackBuffers,
    Step,
)
from costmodels.simulate import Event, simulate
from meshes import LogicalMesh

ALL = frozenset(MOVES)
FEMTO = 1e-15


def seconds(program: Program, mesh: LogicalMesh) -> tuple[float, float]:
    """Compute and network seconds of a step, added up."""
    table = prices(mesh)
    compute = network = 0.0
    for i, times in program.instructions():
        if isinstance(i, Collective):
            network += times * table.seconds(i)
        else:
            compute += times * table.seconds(i)
    return compute, network


# ---- laws -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_between_the_busier_stream_and_one_thing_after_the_other(program, name):
    for mesh in (mesh_of(name), mesh_of(name, ALL)):
        compute, network = seconds(program, mesh)
        count = sum(times for _, times in program.instructions())
        slack = count * FEMTO + 1e-9 * (compute + network)
        timing = simulate(program, mesh)
        assert timing.compute_s == pytest.approx(compute, abs=slack)
        assert timing.step_time_s <= compute + network + slack
        assert timing.step_time_s >= max(compute, network) - slack
        terms = timing.compute_s + timing.exposed_communication_s + timing.bubble_s
        assert timing.step_time_s == terms
        assert timing.exposed_communication_s >= 0


@settings(max_examples=100, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_a_chip_that_overlaps_nothing_does_one_thing_after_the_other(program, name):
    mesh = mesh_of(name, frozenset())
    compute, network = seconds(program, mesh)
    count = sum(times for _, times in program.instructions())
    timing, serial = simulate(program, mesh), simulate(program, mesh, serial=True)
    slack = count * FEMTO + 1e-9 * (compute + network)
    assert serial.step_time_s == pytest.approx(compute + network, rel=1e-9)
    assert serial.exposed_communication_s == pytest.approx(network, rel=1e-9)
    assert timing.step_time_s == pytest.approx(compute + network, abs=slack)


@settings(max_examples=200, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_skipping_repeated_iterations_changes_nothing(program, name):
    mesh = mesh_of(name, ALL)
    quick = simulate(program, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Simulation, "_skip", lambda *_: 0)
        assert simulate(program, mesh) == quick


@settings(max_examples=150, deadline=None)
@given(programs(), st.sampled_from(MESHES), st.sampled_from((0, 1500, 10**9)))
def test_a_trace_obeys_streams_and_dependencies(program, name, extra):
    mesh = mesh_of(name, ALL)
    windows = plan_overlap(program, mesh, read_memory(program).peak_bytes + extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Simulation, "_skip", lambda *_: 0)
        timing = simulate(program, mesh, trace=True, overlap=windows)
    check_streams(timing.events, timing.step_time_s)
    check_dependencies(program, timing.events)


def check_streams(events: tuple[Event, ...], end: float) -> None:
    """One thing at a time on each stream, all of it within the step."""
    for stream in ("compute", "network"):
        runs = sorted((e.start_s, e.start_s + e.duration_s) for e in events if e.stream == stream)
        for (_, before), (after, _) in pairwise(runs):
            assert after >= before - 1e-12
        assert not runs or runs[-1][1] <= end + 1e-12


def check_dependencies(program: Program, events: tuple[Event, ...]) -> None:
    """Walks the program in order; the n-th execution of an instruction is its n-th event."""
    runs: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda e: e.start_s):
        runs[event.name].append(event)
    seen: Counter[str] = Counter()
    ready = dict.fromkeys(program.inputs.values(), 0.0)

    def run(i: Instruction) -> None:
        known = max((ready[b] for b in i.ins), default=0.0)
        if isinstance(i, Collective) and i.kind not in MOVES:
            end = known
        else:
            name = f"{i.kind} {i.tensor}" if isinstance(i, Collective) else i.kernel.name
            event = runs[name][seen[name]]
            seen[name] += 1
            assert event.start_s >= known - 1e-12
            end = event.start_s + event.duration_s
        ready.update(dict.fromkeys(i.outs, end))

    def walk(block: Block) -> None:
        for step in block:
            if isinstance(step, Step):
                for i in step.instructions:
                    run(i)
                continue
            for i in step.enter.instructions:
                run(i)
            ready.update({k.entry: ready[k.init] for k in step.carries})
            ready.update({s.inner: ready[s.outer] for s in step.reads})
            written: dict[int, float] = {}
            for _ in range(step.times):
                walk(step.body)
                ready.update({k.entry: ready[k.exit] for k in step.carries})
                written |= {
                    s.outer: max(ready[s.inner], written.get(s.outer, 0.0)) for s in step.writes
                }
            ready.update({k.result: ready[k.exit] for k in step.carries})
            ready.update(written)

    walk(program.block)
    assert {name: len(found) for name, found in runs.items()} == dict(seen)


@settings(max_examples=150, deadline=None)
@given(programs(), st.sampled_from(MESHES), st.integers(0, 5000))
def test_windows_stay_within_the_memory_they_were_given(program, name, extra):
    mesh = mesh_of(name, ALL)
    peak = read_memory(program).peak_bytes
    assert read_memory(program, plan_overlap(program, mesh).held).peak_bytes == peak
    wider = plan_overlap(program, mesh, peak + extra)
    assert peak <= read_memory(program, wider.held).peak_bytes <= peak + extra


def test_reading_what_nothing_makes_is_an_error():
    d = Draft()
    program = d.program([Step("s", (d.compute((d.new(),), (d.new(),), 1e6),))], [], [])
    with pytest.raises(ValueError, match="before anything makes it"):
        simulate(program, mesh_of(MESHES[0]))


# ---- known answers --------------------------------------------------------------------------


def of(program: Program, mesh: LogicalMesh, name: str) -> float:
    """Seconds of the instruction called `name`."""
    table = prices(mesh)
    for i, _ in program.instructions():
        if name == (i.tensor if isinstance(i, Collective) else i.kernel.name):
            return table.seconds(i)
    raise KeyError(name)


def weight_layers(
    times: int, size: int, *, gather: int, work: float, room: int = 10_000
) -> Program:
    """A loop whose layers gather their slice of a stack and then need it: FSDP in the small.

    A first kernel of the body does `work` without the weights, a second one the same with them.
    """
    d = Draft()
    x, stack = d.new(), d.new(times * size, "parameters")
    shard, full = d.new(size, alias=stack), d.new(2 * size, "collective_buffers")
    entry, middle, exit_, result = d.new(), d.new(), d.new(), d.new()
    first = Step("first", (d.compute((entry,), (middle,), work),))
    move = d.move("all-gather", shard, full, gather)
    second = Step("second", (move, d.compute((middle, full), (exit_,), work)))
    loop = LoopStep(
        "layers", times, Step("enter", ()), (first, second),
        (CarryBuffers(x, entry, exit_, result),), (StackBuffers(stack, shard),), (),
    )  # fmt: skip
    # Something large before the loop, so that prefetching stays within the plain peak.
    large = Step("large", (d.compute((), (d.new(room),), 0.0),))
    return d.program([large, loop], [x, stack], [result])


A100 = "dgx-a100-80gb:1x4"


@pytest.mark.parametrize("times", [1, 2, 5, 64])
def test_a_short_gather_hides_behind_the_kernel_before_it(times):
    mesh = mesh_of(A100)
    program = weight_layers(times, 1000, gather=4_000_000, work=4e8)
    gather, kernel = of(program, mesh, "t3"), of(program, mesh, "k5")
    assert gather < kernel
    timing = simulate(program, mesh)
    assert timing.step_time_s == pytest.approx(2 * times * kernel, rel=1e-9)
    assert timing.exposed_communication_s == pytest.approx(0, abs=1e-12)
    blocking = simulate(program, mesh_of(A100, frozenset()))
    assert blocking.exposed_communication_s == pytest.approx(times * gather, rel=1e-9)


@pytest.mark.parametrize("times", [1, 2, 3, 64])
def test_a_gather_longer_than_half_a_layer_is_fetched_across_the_back_edge(times):
    """kernel < gather < 2 kernels: only the first layer waits, if the previous one can fetch."""
    mesh = mesh_of(A100)
    program = weight_layers(times, 1000, gather=100_000_000, work=4e8)
    gather, kernel = of(program, mesh, "t3"), of(program, mesh, "k5")
    assert kernel < gather < 2 * kernel
    timing = simulate(program, mesh)
    assert timing.exposed_communication_s == pytest.approx(gather - kernel, rel=1e-6)
    # Where only one layer's weights fit, the gather cannot cross into the previous layer.
    program = weight_layers(times, 1000, gather=100_000_000, work=4e8, room=3000)
    tight = simulate(program, mesh)
    assert tight.exposed_communication_s == pytest.approx(times * (gather - kernel), rel=1e-6)


def test_a_network_bound_loop_takes_the_time_of_its_network():
    mesh = mesh_of(A100)
    program = weight_layers(64, 1000, gather=400_000_000, work=4e8)
    gather, kernel = of(program, mesh, "t3"), of(program, mesh, "k5")
    assert gather > 2 * kernel
    timing = simulate(program, mesh, overlap=plan_overlap(program, mesh, 10**9))
    # Gathers cannot start before the weights of the previous layer are in use.
    assert timing.step_time_s == pytest.approx(64 * gather + kernel, rel=1e-6)


def gradient_layers(times: int, reduce: int, work: float) -> Program:
    """A loop whose layers make a gradient and reduce it, for after the loop."""
    d = Draft()
    x, stack = d.new(), d.new(times * 10, "gradients")
    entry, exit_, result, grad, reduced = d.new(), d.new(), d.new(), d.new(20), d.new(10)
    backward = Step("backward", (d.compute((entry,), (grad,), work),))
    reduction = Step("reduction", (
        d.move("reduce-scatter", grad, reduced, reduce), d.compute((entry,), (exit_,), work),
    ))  # fmt: skip
    last = Step("last", (d.compute((), (d.new(1000),), 0.0),))
    loop = LoopStep(
        "layers", times, Step("enter", ()), (backward, reduction, last),
        (CarryBuffers(x, entry, exit_, result),), (), (StackBuffers(stack, reduced),),
    )  # fmt: skip
    return d.program([loop, Step("after", ())], [x], [result, stack])


@pytest.mark.parametrize("times", [1, 3, 64])
def test_a_reduction_drains_into_the_next_layer_and_only_the_last_is_waited_for(times):
    mesh = mesh_of(A100)
    program = gradient_layers(times, 100_000_000, 4e8)
    reduce, kernel = of(program, mesh, "t6"), of(program, mesh, "k5")
    assert kernel < reduce < 2 * kernel
    timing = simulate(program, mesh, overlap=plan_overlap(program, mesh, 10**9))
    assert timing.exposed_communication_s == pytest.approx(reduce - kernel, rel=1e-6)


def test_a_cast_before_a_gather_does_not_hold_it_back():
    d = Draft()
    x, shard = d.new(), d.new(1000, "parameters")
    busy, cast, full, out = d.new(10), d.new(500), d.new(1000), d.new()
    block = [
        Step("large", (d.compute((), (d.new(10_000),), 0.0),)),
        Step("busy", (d.compute((x,), (busy,), 4e8),)),
        Step("cast", (d.compute((shard,), (cast,), 1e6),)),
        Step("use", (d.move("all-gather", cast, full, 4_000_000), d.compute((full,), (out,), 1e6))),
    ]
    program = d.program(block, [x, shard], [out])
    mesh = mesh_of(A100)
    assert of(program, mesh, "t4") < of(program, mesh, "k2")
    timing = simulate(program, mesh)
    assert timing.exposed_communication_s == pytest.approx(0, abs=1e-12)
    kept = simulate(program, mesh_of(A100, frozenset()))
    assert kept.exposed_communication_s == pytest.approx(of(program, mesh, "t4"), rel=1e-9)


def test_the_network_prefers_what_is_needed_first():
    """Two gathers are ready at the start; the reader of the first never waits for the second."""
    d = Draft()
    x, y = d.new(), d.new()
    a, b, first, second, end = d.new(), d.new(), d.new(), d.new(), d.new()
    block = [
        Step("one", (d.move("all-gather", x, a, 10**8), d.compute((a,), (first,), 4e8))),
        Step("two", (d.move("all-gather", y, b, 10**8), d.compute((b,), (second,), 4e8))),
        Step("end", (d.compute((first, second), (end,), 0.0),)),
    ]
    program = d.program(block, [x, y], [end])
    mesh = mesh_of(A100)
    gather, kernel = of(program, mesh, "t2"), of(program, mesh, "k4")
    timing = simulate(program, mesh, overlap=plan_overlap(program, mesh, 10**9))
    assert timing.step_time_s == pytest.approx(gather + max(gather, kernel) + kernel, rel=1e-9)


def test_a_trace_names_what_ran_and_folds_what_repeats():
    mesh = mesh_of(A100)
    program = weight_layers(64, 1000, gather=4_000_000, work=4e8)
    timing = simulate(program, mesh, trace=True)
    names = [e.name for e in timing.events]
    assert "all-gather t3" in names
    assert [e.kind for e in timing.events].count("repeat") == 1
    assert len(names) < 30
    assert simulate(program, mesh, trace=False).events == ()
    check_streams(timing.events, timing.step_time_s)


# ---- frameworks that issue op by op --------------------------------------------------------------


def dispatched(name: str, dispatch_s: float) -> LogicalMesh:
    topology = meshes.resolve(name)
    chip = replace(topology.chip, dispatch_s=dispatch_s)
    return meshes.logical(replace(topology, chip=chip), dict(AXES))


@settings(max_examples=100, deadline=None)
@given(programs(), st.sampled_from(MESHES), st.floats(1e-9, 1e-3))
def test_the_host_is_a_bound_and_never_a_help(program, name, dispatch_s):
    mesh = dispatched(name, dispatch_s)
    timing, (compute, network) = simulate(program, mesh), seconds(program, mesh)
    table = prices(mesh)
    issued = sum(times for i, times in program.instructions() if table.seconds(i) > 0)
    slack = 1e-9 + sum(times for _, times in program.instructions()) * FEMTO
    assert timing.step_time_s >= max(compute, network, issued * dispatch_s) - slack
    assert timing.step_time_s <= compute + network + issued * dispatch_s + slack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Simulation, "_skip", lambda *_: 0)
        assert simulate(program, mesh) == timing


@pytest.mark.parametrize("times", [2, 64])
def test_small_kernels_take_as_long_as_issuing_them(times):
    mesh = dispatched(A100, 1e-3)
    program = weight_layers(times, 1000, gather=4_000_000, work=4e8)
    assert simulate(program, mesh).step_time_s == pytest.approx(3 * times * 1e-3, rel=0.1)
