"""Pipelined programs: closed forms of the step time, and memory against unrolled schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pipelines import PipelineDrawer, pipelined
from small_models import decoder
from small_pipelines import pipeline, unrolled
from small_programs import mesh_of

from costmodels.memory import read_memory
from costmodels.pipeline_memory import StageMemory, device_memory, read_pipeline_memory
from costmodels.pipeline_time import simulate_pipeline, slowest
from costmodels.pricing import prices
from costmodels.schedule import BACKWARD, FORWARD
from costmodels.simulate import simulate

MESH = mesh_of("dgx-a100-80gb:1x4")
BLOCKING = mesh_of("tpu-v3:2x1", overlap=frozenset())
BYTES = st.floats(1e6, 1e9)


def halves(program, mesh) -> list[tuple[float, float]]:
    """Seconds of the halves of every stage."""
    return [
        tuple(simulate(s.parts[p], mesh).step_time_s for p in (FORWARD, BACKWARD))
        for s in program.stages
    ]


def transfer(program, mesh) -> float:
    return prices(mesh).seconds(program.crossings(0, FORWARD)[0])


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_two_equal_stages(kind: str) -> None:
    """(m + p - 1)(f + b), and the way there and back: once, or with only two microbatches in
    flight (1F1B) once for every two."""
    m = 5
    trips = 3 if kind == "1f1b" else 1
    program = pipeline(kind, [(1e8, 2e8)] * 2, m)
    (f, b), t = halves(program, MESH)[0], transfer(program, MESH)
    assert t > 0
    timing = simulate_pipeline(program, MESH)
    assert timing.step_time_s == pytest.approx((m + 1) * (f + b) + 2 * t * trips)
    assert timing.compute_s == pytest.approx(m * (f + b))
    assert timing.bubble_s == pytest.approx(f + b + 2 * t * trips)
    assert timing.exposed_communication_s == 0
    assert slowest(program, MESH) == 0  # the last half is its backward one


def test_blocking_transfers_are_exposed() -> None:
    program = pipeline("1f1b", [(1e8, 2e8)] * 2, 3)
    timing = simulate_pipeline(program, BLOCKING)
    # The first stage sends three activations, and its last half waits for nobody.
    assert timing.exposed_communication_s == pytest.approx(3 * transfer(program, BLOCKING))


def test_the_slowest_stage_sets_the_pace() -> None:
    program = pipeline("1f1b", [(1e7, 1e7), (1e9, 2e9)], 20)
    (first, last), timing = halves(program, MESH), simulate_pipeline(program, MESH)
    ends = sum(first) + 2 * transfer(program, MESH)
    assert timing.step_time_s == pytest.approx(20 * sum(last) + ends)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([("1f1b", 2), ("gpipe", 2), ("interleaved", 4), ("circular", 4)]),
    st.lists(st.tuples(BYTES, BYTES), min_size=4, max_size=4), st.integers(1, 4),
)  # fmt: skip
def test_laws(kind: tuple[str, int], work: list[tuple[float, float]], groups: int) -> None:
    """Between the busiest device's work and everything one after the other; terms add up."""
    schedule, stages = kind
    program = pipeline(schedule, work[:stages], 2 * groups)
    seconds = [2 * groups * (f + b) for f, b in halves(program, MESH)]
    timing = simulate_pipeline(program, MESH)
    busiest = max(sum(seconds[s] for s in program.stages_at(d)) for d in range(2))
    crossings = 2 * (stages - 1) * 2 * groups * transfer(program, MESH)
    assert busiest * (1 - 1e-9) <= timing.step_time_s <= (sum(seconds) + crossings) * (1 + 1e-9)
    total = timing.compute_s + timing.exposed_communication_s + timing.bubble_s
    assert timing.step_time_s == pytest.approx(total)


def test_tasks_of_a_trace_do_not_overlap() -> None:
    program = pipeline("interleaved", [(1e8, 2e8)] * 4, 4)
    events = simulate_pipeline(program, MESH, trace=True).events
    assert len(events) == 4 * 4 * 2
    for row in ("x 00", "x 01"):
        ends = 0.0
        for event in (e for e in events if e.stream == row):
            assert event.start_s >= ends - 1e-15
            ends = event.start_s + event.duration_s


# ---- memory --------------------------------------------------------------------------------------


def test_stashes_of_microbatches_in_flight() -> None:
    """100 bytes wait per microbatch in flight: p - s of them with 1F1B, all with GPipe."""
    for kind, first in (("1f1b", 2), ("gpipe", 6)):
        program = pipeline(kind, [(1e6, 1e6)] * 2, 6)
        memory = read_pipeline_memory(program)
        assert memory.parts["activations"] == 100 * first
        assert sum(memory.parts.values()) == memory.peak_bytes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "chunks", "remat"),
    [("1f1b", 1, "full"), ("gpipe", 1, "none"), ("interleaved", 2, "none")],
)
def test_memory_is_that_of_the_unrolled_schedule(
    kind: str, chunks: int, remat: str, seed: int
) -> None:
    """But for what a loop keeps to its end, though in its last turn nobody reads it any more."""
    model = decoder(layers_=2 * chunks, optimizer="adamw", remat=remat)
    drawer = PipelineDrawer(pipelined(model, kind, chunks), 2, {"x": 2})
    program, _ = drawer.draw(seed)
    alone = [StageMemory.of(stage) for stage in program.stages]
    for place in range(2):
        found = device_memory(program, alone, place)
        flat = read_memory(unrolled(program, place))
        assert flat.peak_bytes <= found.memory.peak_bytes <= 1.02 * flat.peak_bytes
        assert sum(found.memory.parts.values()) == found.memory.peak_bytes
        assert max(max(p) for p in found.profiles.values()) == found.memory.peak_bytes
