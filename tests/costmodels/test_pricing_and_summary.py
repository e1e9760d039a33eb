"""One price per instruction and mesh, and the table of collectives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import MESHES, Draft, mesh_of, programs

from costmodels.collectives import collective_seconds
from costmodels.pricing import instruction_seconds, is_network, kernel_seconds, prices
from costmodels.program import CarryBuffers, Collective, Compute, LoopStep, Step
from costmodels.summary import beyond_fit, collectives, totals


@settings(max_examples=100, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_remembered_prices_are_the_models_own(program, name):
    mesh = mesh_of(name)
    for i, _ in program.instructions():
        if isinstance(i, Compute):
            assert instruction_seconds(mesh, i) == kernel_seconds(mesh.chip, i.kernel)
        elif is_network(i):
            assert instruction_seconds(mesh, i) == collective_seconds(mesh, i.kind, i.axes, i.bytes)
        else:
            assert instruction_seconds(mesh, i) == 0


def test_meshes_do_not_share_prices():
    d = Draft()
    move = d.move("all-gather", d.new(), d.new(), 10**8)
    seconds = {instruction_seconds(mesh_of(name), move) for name in MESHES}
    assert len(seconds) == len(MESHES)
    assert prices(mesh_of(MESHES[0])) is prices(mesh_of(MESHES[0]))


@settings(max_examples=100, deadline=None)
@given(programs(), st.sampled_from(MESHES))
def test_the_table_holds_every_execution_once(program, name):
    mesh = mesh_of(name)
    rows = collectives(program, mesh)
    executed = [(i, n) for i, n in program.instructions() if is_network(i)]
    assert sum(r.count for r in rows) == sum(n for _, n in executed)
    assert sum(r.total_bytes for r in rows) == sum(i.bytes * n for i, n in executed)
    assert len({(r.kind, r.axes, r.bytes, r.tensor) for r in rows}) == len(rows)
    assert [r.total_s for r in rows] == sorted((r.total_s for r in rows), reverse=True)
    per_kind = totals(rows)
    assert sum(size for size, _ in per_kind.values()) == sum(r.total_bytes for r in rows)
    assert set(per_kind) == {i.kind for i, _ in executed}


def test_equal_collectives_of_a_loop_are_one_row():
    d = Draft()
    x, entry, a, b, exit_, result = (d.new() for _ in range(6))
    moves = tuple(
        Collective("all-reduce", ("x",), s, r, 1000, tensor="h")
        for s, r in ((entry, a), (a, b))
    )
    body = (Step("body", (*moves, d.compute((b,), (exit_,)))),)
    loop = LoopStep("l", 8, Step("e", ()), body, (CarryBuffers(x, entry, exit_, result),), (), ())
    mesh = mesh_of(MESHES[0])
    (row,) = collectives(d.program([loop], [x], [result]), mesh)
    assert (row.kind, row.axes, row.tensor) == ("all-reduce", ("x",), "h")
    assert (row.bytes, row.count) == (1000, 16)
    assert row.seconds == pytest.approx(collective_seconds(mesh, "all-reduce", ("x",), 1000))


@pytest.mark.parametrize(
    ("side", "outside"), [(32, True), (64, False), (25600, False), (30000, True)]
)
def test_products_beyond_what_was_fitted_count_by_their_time(side, outside):
    d = Draft()
    a, b, c = d.new(), d.new(), d.new()
    product, pass_ = d.matmul((a,), (b,), side), d.compute((b,), (c,), 1e9)
    program = d.program((Step("all", (product, pass_)),), (a,), (c,))
    mesh = mesh_of("tpu-v3:2x1")
    seconds = [instruction_seconds(mesh, i) for i in (product, pass_)]
    share = seconds[0] / sum(seconds) if outside else 0
    assert beyond_fit(program, mesh) == pytest.approx(share)
    assert beyond_fit(program, mesh_of("dgx-a100-80gb:1x4")) == 0  # nobody says
