"""Places that gradients pass on their way, and copies that are gathered in part by then."""

from __future__ import annotations

from dataclasses import replace

from given_choices import chosen
from small_models import decoder

import meshes
from planner.export.jax_program import result_program
from planner.export.placement import placement
from planner.planning import price_annotations
from planner.sharding.spec import Spec

MESH = meshes.logical(meshes.resolve("dgx-a100-80gb:1x8"), {"x": 2, "y": 4})


def test_programs_say_the_places_between() -> None:
    """XLA gathered 36 GiB on every device of GPT-3 on data=4, model=128, extra=2."""
    large = decoder(8, positions=1024, width=1024, optimizer="sgd")  # what is small is gathered
    result = price_annotations(large, MESH, {})
    split = {"layers.ln.grad_3": {"D": ("x", "y")}, "layers.ln.grad_4": {"B": ("x",), "T": ("y",)}}
    moved = chosen(result, **split)
    query = placement(moved).gradients["layers.q", "layers.ln"]
    assert query.made == Spec(((), (), ("x", "y")))
    assert [len(place.axes) for place in query.way] == [2]  # one axis has moved, the other not
    assert query.way[0] not in (query.made, Spec((("x",), ("y",), ())))


def test_what_a_recomputation_gathered_in_part_is_not_gathered_again() -> None:
    """The queries' weights were gathered twice there: once in part, once from where they came."""
    result = price_annotations(decoder(8, optimizer="sgd", remat="full"), MESH, {})
    found = chosen(
        result,
        **{"layers.q": {"B": ("x", "y")}, "layers.ln.grad_4": {"B": ("x",)}},
    )
    in_part = Spec((("y",), (), ()))
    lies = {"layers.wq.cast": Spec((("x", "y"), (), ())), "layers.wq.cast~": in_part}
    found = replace(found, specs={**found.specs, **lies})
    told = placement(found).gradients
    name = next(use for use in told if use[0] == "layers.q" and use[1] == "layers.ln")
    assert told[name].through == in_part
    assert told[name].other == Spec(((), (), ()))
    assert '(P("y", None, None), P(None, None, None))' in result_program(found)
