"""Propagation of annotations: laws on random subsets, and answers known by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import meshes
from planner.annotations import axes_by_name
from planner.minimal import completed
from planner.modelfile import load_model
from planner.planning import plan_model
from planner.result import Result
from planner.sharding.propagate import propagate
from planner.sharding.spec import Spec, replicated
from tests.support.small_models import decoder

SIZES = {"x": 2, "y": 2}
TEXT = """
training: {batch: B, optimizer: adam}
graph:
  inputs: {x: "f32[B, D]", y: "f32[B, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]"}
  ops:
    - h = einsum("B D, D F -> B F", x, w_in)
    - z = einsum("B F, F D -> B D", relu(h), w_out)
    - loss = mean(square(z - y))
dims: {B: 32, D: 256, F: 1024}
"""


def planned() -> Result:
    on = meshes.logical(meshes.resolve("dgx-a100-80gb:1x4"), SIZES)
    return plan_model(decoder(batch=8, width=16, hidden=32), on)


RESULT = planned()
NAMES = sorted(axes_by_name(RESULT))
SUBSETS = st.sets(st.sampled_from(NAMES))


def test_the_data_and_the_columns_of_weights_go_everywhere() -> None:
    """By hand: rows of the batch over x, hidden units over y; only two tensors say so."""
    graph = load_model(TEXT, "mlp").graph
    found = propagate(graph, {"x": Spec((("x",), ())), "w_in": Spec(((), ("y",)))}, SIZES)
    assert found["h"] == Spec((("x",), ("y",)))
    assert found["w_out"] == Spec((("y",), ()))
    assert found["z"] == found["y"] == Spec((("x",), ()))


def test_what_is_large_wins() -> None:
    """The batch and the columns want the same axis: the activation is the larger operand."""
    graph = load_model(TEXT.replace("B: 32", "B: 4096"), "mlp").graph
    given = {"x": Spec((("x",), ())), "w_in": Spec(((), ("x",)))}
    assert propagate(graph, given, SIZES)["h"] == Spec((("x",), ()))
    assert propagate(graph, given, SIZES, smallest=True)["h"] == Spec(((), ("x",)))


def test_nothing_given_splits_nothing() -> None:
    graph = RESULT.model.graph
    tensors = graph.all_tensors()
    assert propagate(graph, {}, SIZES) == {n: replicated(len(t.shape)) for n, t in tensors.items()}


def test_all_annotations_propagate_to_themselves() -> None:
    assert completed(RESULT, axes_by_name(RESULT)) == axes_by_name(RESULT)


@settings(max_examples=60, deadline=None)
@given(SUBSETS, st.randoms(use_true_random=False))
def test_laws(names, random) -> None:
    """Given specs are kept, the order of saying them means nothing, completing twice changes
    nothing, and what comes out is a sharding: even, and no axis used twice."""
    annotations = axes_by_name(RESULT)
    some = {n: annotations[n] for n in sorted(names)}
    found = completed(RESULT, some)
    assert {n: found[n] for n in some} == some
    shuffled = list(some.items())
    random.shuffle(shuffled)
    assert completed(RESULT, dict(shuffled)) == found
    assert completed(RESULT, found) == found
    tensors = RESULT.model.graph.all_tensors()
    for name, axes in found.items():
        spec = Spec(axes)
        assert len(set(spec.axes)) == len(spec.axes)
        shape = tensors[name].shape
        assert spec.fits(shape[len(shape) - len(axes) :], SIZES)
