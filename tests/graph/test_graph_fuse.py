"""Fusing keeps values, and removes what it should."""

from __future__ import annotations

import numpy as np
from graph_support import expressions, transformer
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph import expr as ex
from planner.graph import layers
from planner.graph.builder import Builder, contraction_sizes
from planner.graph.core import Graph, Op
from planner.graph.fuse import MAX_OPERANDS, MAX_SIZE, fuse_graph
from planner.values import reference

SIZE = 3  # of every dimension, so that any tensor can be read under any labels


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random maps over random earlier tensors: elementwise, broadcasting, reducing, products."""
    b = Builder()
    pool = [
        b.input(f"in{i}", [SIZE] * len(dims), tuple(dims), "f32")
        for i, dims in enumerate(["ABC", "AB", "C"])
    ]
    for i in range(draw(st.integers(2, 8))):
        names = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
        ranks = [len(b.lookup(n).shape) for n in names]
        labels = [draw(st.permutations("ABC"))[:rank] for rank in ranks]
        everything = sorted(set().union(*labels))
        value = draw(expressions(len(names), everything))
        out = draw(st.permutations(everything))
        if draw(st.booleans()):
            out = out[: draw(st.integers(0, len(out)))]
        combiner = draw(st.sampled_from(["sum", "sum", "max"]))
        pairs = list(zip(names, labels, strict=True))
        pool.append(b.map(f"t{i}", pairs, out, value, combiner=combiner))
    others = draw(st.sets(st.sampled_from(pool), max_size=2))
    return b.graph(sorted({pool[-1], *others}))


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_fusing_keeps_values(graph: Graph) -> None:
    fused = fuse_graph(graph)
    inputs = reference.random_inputs(graph)
    before, after = reference.evaluate(graph, inputs), reference.evaluate(fused, inputs)
    for name in graph.outputs:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-9, atol=1e-9)
    assert len(fused.nodes) <= len(graph.nodes)
    assert all(len(n.ins) <= MAX_OPERANDS for n in fused.nodes)


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_fusing_twice_changes_nothing(graph: Graph) -> None:
    once = fuse_graph(graph)
    assert len(fuse_graph(once).nodes) == len(once.nodes)


def chain() -> tuple[Builder, str]:
    b = Builder()
    x = b.input("x", (4, 8), ("B", "S"), "f32")
    h = b.pointwise("a", ("tanh", ex.x(0)), x)
    return b, b.pointwise("b", ("exp", ex.x(0)), h)


def test_a_chain_becomes_one_op_and_its_intermediate_disappears() -> None:
    b, last = chain()
    fused = fuse_graph(b.graph([last]))
    (op,) = fused.nodes
    assert isinstance(op, Op)
    assert op.ins == ("x",)
    assert op.attrs["exprs"] == (("exp", ("tanh", ex.x(0))),)
    assert "a" not in fused.tensors


def test_what_is_read_twice_or_kept_stays() -> None:
    b, last = chain()
    assert len(fuse_graph(b.graph(["a", last])).nodes) == 2
    b.pointwise("c", ("neg", ex.x(0)), "a")
    assert len(fuse_graph(b.graph([last, "c"])).nodes) == 3


def test_a_diamond_becomes_one_op() -> None:
    """Once its reader is merged, what both read has one reader left."""
    b, last = chain()
    b.pointwise("c", ("add", ex.x(0), ex.x(1)), last, "a")
    fused = fuse_graph(b.graph(["c"]))
    assert [n.ins for n in fused.nodes] == [("x",)]


def test_expressions_stay_small() -> None:
    """Every silu reads its operand twice: thirty in a row would have 2³⁰ nodes."""
    b = Builder()
    x = b.input("x", (4,), ("S",), "f32")
    for _ in range(30):
        x = b.pointwise("silu", ex.silu(ex.x(0)), x)
    fused = fuse_graph(b.graph([x]))
    sizes = [ex.size(n.attrs["exprs"][0]) for n in fused.nodes if isinstance(n, Op)]
    assert max(sizes) <= MAX_SIZE
    assert 1 < len(sizes) < 30


def test_contractions_keep_their_operands() -> None:
    b, last = chain()
    w = b.input("w", (8, 5), ("S", "F"), "f32")
    product = b.einsum("B S, S F -> B F", last, w)
    fused = fuse_graph(b.graph([b.pointwise("act", ("tanh", ex.x(0)), product)]))
    assert [contraction_sizes(n) is not None for n in fused.nodes if isinstance(n, Op)] == [
        False, True, False,
    ]  # fmt: skip


def test_a_reduction_absorbs_its_elementwise_operand() -> None:
    b, last = chain()
    total = b.map("total", [(last, ("B", "S"))], ("B",), ex.x(0))
    assert len(fuse_graph(b.graph([total])).nodes) == 1


def test_an_outer_product_of_one_tensor_is_not_merged_wrongly() -> None:
    """x·xᵀ reads one producer under two labelings; substituting one would transpose it."""
    b = Builder()
    x = b.input("x", (3, 3), ("A", "B"), "f32")
    h = b.pointwise("h", ("tanh", ex.x(0)), x)
    out = b.map("out", [(h, ("A", "B")), (h, ("B", "A"))], ("A", "B"), ex.sub(ex.x(0), ex.x(1)))
    graph = b.graph([out])
    inputs = reference.random_inputs(graph)
    t = np.tanh(inputs["x"])
    found = reference.evaluate(fuse_graph(graph), inputs)[out]
    np.testing.assert_allclose(found, t - t.T)


def test_loops_are_fused_inside() -> None:
    graph = transformer().graph
    fused = fuse_graph(graph)
    inputs = reference.random_inputs(graph)
    name = graph.outputs[0]
    before, after = reference.evaluate(graph, inputs), reference.evaluate(fused, inputs)
    np.testing.assert_allclose(after[name], before[name], rtol=1e-12)
    assert len(list(fused.walk())) < len(list(graph.walk()))


def test_softmax_stays_recognisable() -> None:
    b = Builder()
    x = b.param("x", (2, 3), ("A", "B"))
    p = layers.softmax(b, b.pointwise("h", ("tanh", ex.x(0)), x), "B")
    fused = fuse_graph(b.graph([p]))
    marked = [n for n in fused.nodes if isinstance(n, Op) and n.attrs.get("vjp") == "softmax"]
    assert [n.outs for n in marked] == [(p,)]
