"""What is exposed of the network's time: everything that blocks, nothing that hides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import MESHES, mesh_of, programs

from costmodels.exposure import exposed_shares
from costmodels.program import MOVES, LoopStep
from costmodels.simulate import simulate

ALL = frozenset(MOVES)


@settings(max_examples=100, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_what_blocks_is_exposed(program, name):
    mesh = mesh_of(name)
    if not mesh.chip.overlap:
        assert all(s == pytest.approx(1, abs=1e-6) for s in exposed_shares(program, mesh).values())


@settings(max_examples=200, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_shares_add_up_to_what_the_step_waits_for(program, name):
    mesh = mesh_of(name, ALL)
    timing = simulate(program, mesh, trace=True)
    shares = exposed_shares(program, mesh)
    assert all(0 <= s <= 1 for s in shares.values())
    if any(isinstance(step, LoopStep) for step in program.block):
        return
    network = [e for e in timing.events if e.stream == "network" and e.duration_s > 0]
    exposed = sum(e.duration_s * shares[e.tensor, e.phase] for e in network)
    after = sum(max(0.0, e.start_s + e.duration_s - timing.step_time_s) for e in network)
    slack = 1e-12 + 1e-9 * timing.step_time_s
    assert exposed >= timing.exposed_communication_s - slack
    assert exposed <= timing.exposed_communication_s + after + slack
