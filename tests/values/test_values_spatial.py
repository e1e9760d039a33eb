"""Convolution and pooling over sharded space: halo exchange computes what the whole op computes.

Geometries are drawn: strides, dilations, transposed convolution, uneven windows (where shards of
the result are not aligned with those of the operand), sizes that axes do not divide. Every op whose
space can be split is.
"""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_plans import PlanDrawer, expected, lowered, outputs
from small_models import weighted_sum

from costmodels.program import Collective
from planner.graph import windows
from planner.graph.builder import Builder, GraphError
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.model import Model, Training
from planner.sharding.choices import Choice, OpChoices
from planner.sharding.flow import build_flow
from planner.sharding.halo import split_windows
from planner.values import reference

AXES = (("x", 2), ("y", 4))
KINDS = ("conv", "conv_transpose", "max_pool", "avg_pool")


class SpaceDrawer(PlanDrawer):
    """Draws only choices that split space, where an op has any."""

    def __init__(self, flow, axes):  # type: ignore[no-untyped-def]
        super().__init__(flow, axes)
        for site in flow.sites.values():
            node = ("op", site.op.origin or site.op.name)
            split = [c for c in self.options[node] if split_windows(site.op.rule, c.split)]
            if split:
                self.options[node] = tuple(split)


@st.composite
def steps(draw: st.DrawFn) -> Graph:
    kind = draw(st.sampled_from(KINDS))
    rank = draw(st.integers(1, 2))
    spatial = tuple(draw(st.sampled_from([7, 8, 9, 10, 11, 12, 15, 16])) for _ in range(rank))
    taps = draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", 1]))
    b = Builder("f32")
    x = b.param("image", (2, *spatial, 4), ("B", *("HW"[:rank]), "C"))
    try:
        if kind in ("max_pool", "avg_pool"):
            pool = getattr(windows, kind)
            y = pool(b, x, window=taps, stride=stride, padding=padding)
        else:
            dilation = draw(st.integers(1, 2))
            names = ("kh", "kw")[:rank]
            w = b.param("w", (*(taps,) * rank, 4, 2), (*names, "I", "O"))
            conv = getattr(windows, kind)
            y = conv(b, x, w, stride=stride, dilation=dilation, padding=padding)
    except GraphError:
        assume(False)
    loss = weighted_sum(b, y)
    return training_step(Model("m", b.graph([loss]), Training(2, optimizer="sgd"), 2))


@settings(max_examples=120, deadline=None)
@given(steps(), st.booleans(), st.integers(0, 10**6))
def test_split_space_computes_what_the_whole_op_computes(
    graph: Graph, uneven: bool, seed: int
) -> None:
    flow = build_flow(graph, {}, uneven=uneven)
    drawer = SpaceDrawer(flow, AXES)
    split = [
        c for options in drawer.options.values() for c in options
        if isinstance(c, Choice) and any(c.split)
    ]  # fmt: skip
    assume(split)
    inputs = reference.random_inputs(graph)
    wanted = expected(graph, inputs)
    plan = drawer.draw(seed)
    found = outputs(flow, plan, lowered(flow, plan), inputs)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-7, atol=1e-9, err_msg=name)


def strided(padding: str) -> Graph:
    b = Builder("f32")
    x = b.param("image", (2, 16, 4), ("B", "H", "C"))
    w = b.param("w", (3, 4, 2), ("k", "I", "O"))
    y = windows.conv(b, x, w, stride=2, padding=padding)
    return training_step(
        Model("m", b.graph([weighted_sum(b, y)]), Training(2, optimizer="sgd"), 2)
    )


def test_a_strided_convolution_hands_over_one_row() -> None:
    """3 taps, stride 2, "same": one row of padding after the end, so each shard of the result
    needs the first row of the next one's block, and nothing of the one before."""
    graph = strided("same")
    flow = build_flow(graph, {})
    drawer = PlanDrawer(flow, AXES)
    choices = drawer.options["op", "conv"]
    split = next(
        c for c in choices
        if isinstance(c, Choice) and c.split[3] == ("y",) and sum(map(len, c.split)) == 2
    )  # fmt: skip
    op = next(op for op, _ in graph.walk() if op.kind == "conv")
    assert [f.name for f in op.rule.factors][3:5] == ["H", "H.out"]
    assert split.split[3] == split.split[4]
    assert split.describe(op.rule) == "H:y"
    drawer.options["op", "conv"] = (split,)
    program = lowered(flow, drawer.draw(1))
    moves = [
        (i.kind, i.axes, i.shift, i.width, i.bytes)
        for i, _ in program.instructions()
        if isinstance(i, Collective) and i.shift and i.tensor.startswith("image")
        and i.phase == "forward"
    ]  # fmt: skip
    batch = program.buffers[program.inputs["image"]].shape[0]
    assert batch in (1, 2)
    assert moves == [("collective-permute", ("y",), -1, 1, 2 * 1 * 4 * 4)]


def test_a_filter_gradient_over_split_space_is_a_partial_sum() -> None:
    op = next(op for op, _ in strided("same").walk() if op.kind == "conv_dw")
    split = [c for c in OpChoices(op, AXES).choices if split_windows(op.rule, c.split)]
    assert split
    for choice in split:
        axes = {a for w in split_windows(op.rule, choice.split) for a in choice.split[
            op.rule.windows[w][0]]}
        assert axes <= set(choice.result(op.rule, 0, ["x", "y"]).partial)


def test_no_shard_reads_beyond_its_neighbours() -> None:
    """Blocks shorter than the halo: the choice does not exist, instead of being wrong."""
    b = Builder("f32")
    x = b.param("image", (2, 8, 4), ("B", "H", "C"))
    w = b.param("w", (8, 4, 2), ("k", "I", "O"))
    y = windows.conv(b, x, w, padding="same")
    graph = b.graph([weighted_sum(b, y)])
    op = next(op for op, _ in graph.walk() if op.kind == "conv")
    parts = {
        tuple(c.split[op.rule.windows[0][0]]) for c in OpChoices(op, AXES).choices
    }
    assert parts == {(), ("x",)}  # blocks of 4 have halos of 3 and 4, blocks of 2 too few rows
