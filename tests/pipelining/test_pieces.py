"""Cutting: balanced cuts against brute force, equal layers, what crosses, what is shared."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import decoder, encoder_decoder

import meshes
from planner.graph.fuse import fuse_graph
from planner.pipelining.cuts import balanced, stage_starts
from planner.pipelining.pieces import PipelineError, cut, units

MESH = meshes.logical(meshes.resolve("dgx-a100-80gb:1x2"), {"x": 2})


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 4))
def test_no_cut_is_better(weights: list[float], stages: int) -> None:
    if len(weights) < stages:
        return

    def heaviest(starts: tuple[int, ...]) -> float:
        ends = (*starts[1:], len(weights))
        return max(sum(weights[a:b]) for a, b in zip(starts, ends, strict=True))

    found = balanced(weights, stages)
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    cuts = combinations(range(1, len(weights)), stages - 1)
    assert heaviest(found) == pytest.approx(min(heaviest((0, *c)) for c in cuts))


def test_equal_layers_are_cut_equally() -> None:
    graph = fuse_graph(decoder(layers_=8).graph)
    pieces = cut(graph, stage_starts(graph, 4, MESH))
    assert [piece.layers for piece in pieces] == [2, 2, 2, 2]
    assert [piece.turns["layers.w1"] for piece in pieces] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    kinds = [piece.kind for piece in pieces]
    assert kinds[1] == kinds[2]
    assert len(set(kinds)) == 3


def test_layers_that_do_not_divide_are_balanced() -> None:
    graph = fuse_graph(decoder(layers_=7, vocabulary=4096, positions=64, width=64).graph)
    layers = [piece.layers for piece in cut(graph, stage_starts(graph, 3, MESH))]
    assert sum(layers) == 7
    assert layers[-1] == min(layers)  # the softmax weighs as much as layers do


def test_what_crosses() -> None:
    """The decoder's layers read the encoder's result: it goes through all of their stages."""
    graph = fuse_graph(encoder_decoder().graph)
    row = units(graph)
    starts = [0, *(i for i, u in enumerate(row) if u.turn == 1)]
    first, second, third = cut(graph, starts)
    assert list(first.sent) == ["encoder.encoder_x"]
    assert set(second.sent) == {"encoder.encoder_x", "decoder.decoder_x"}
    assert set(third.received.values()) == {"encoder.encoder_x", "decoder.decoder_x.received"}
    assert first.boundary.shared == {"table": (1,)}
    assert second.boundary.shared == {"table": (0,)}
    assert third.boundary.shared == {}


def test_too_many_stages() -> None:
    graph = fuse_graph(decoder(layers_=2).graph)
    with pytest.raises(PipelineError, match="into 9 stages"):
        stage_starts(graph, 9, MESH)
