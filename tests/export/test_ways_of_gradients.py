"""Places that gradients pass on their way, and copies that are gathered in part by then."""

from __future__ import annotations

from dataclasses import replace

import pytest
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


def test_a_cotangent_passes_the_places_between() -> None:
    """XLA gathered 108 GiB of a gradient over one axis that two all-to-alls would have moved (GPT-3
    on data=256, model=2, extra=2)."""
    large = decoder(8, positions=1024, width=1024, hidden=4096, optimizer="sgd")
    result = price_annotations(large, MESH, {"layers.h": (("x",), ("y",), ())})
    moved = chosen(result, **{"layers.w1.cast.grad": {"F": ("y", "x")}})
    told = placement(moved).gradients["layers.h", "layers.w1.cast"]
    lies = result.specs["layers.h.grad"]
    assert (lies, told.cotangent[-1]) == (
        Spec((("x",), ("y",), ())), Spec(((), (), ("y", "x"))),
    )  # fmt: skip
    assert [sorted(place.axes) for place in told.cotangent] == [["x", "y"]] * 2
    source = result_program(moved)
    assert 'P("x", None, "y"), P(None, None, ("y", "x"))' in source


def test_sums_are_scattered_as_far_as_planned() -> None:
    """XLA reduces a whole sum over axes that do not split where it is told to lie."""
    result = price_annotations(decoder(8, optimizer="sgd"), MESH, {})
    parted = chosen(
        result,
        **{
            "layers.w1.cast.grad": {"B": ("x",), "S": ("y",)},
            "layers.w1[i].grad": {"F": ("y",)},
        },
    )
    way = placement(parted).gradients["layers.h", "layers.w1.cast"].way
    assert [set(place.axes) for place in way] == [{"x", "y"}]


@pytest.mark.parametrize(("home", "moves"), [((("x",), ("y",)), 2), ((("x",), ()), 1)])
def test_updates_elsewhere_are_written_by_places(
    home: tuple[tuple[str, ...], ...], moves: int
) -> None:
    """XLA gathered a stack of weights, 54 GiB, to update it two all-to-alls away."""
    large = decoder(8, width=512, hidden=1024, optimizer="adam")
    result = price_annotations(large, MESH, {"layers.w1": home})
    there = {"layers.w1.new": {"F": ("x", "y") if moves == 2 else ("x",)}}
    place = placement(chosen(result, **there))
    source = result_program(chosen(result, **there))
    found = place.updates["layers.w1"]
    updated = Spec(((), (), ("x", "y")[:moves]))
    assert found.gradient[-1] == updated  # or else it is moved once for each moment
    assert len(found.gradient) == moves
    assert (len(found.parameter), len(found.new)) == ((2, 2) if moves == 2 else (0, 0))
    if moves == 2:
        assert found.parameter[-1] == found.new[0] == updated
    assert "moved_update(name, p, grads, states, mesh)" in source


def test_updates_where_all_lies_are_as_they_were() -> None:
    result = price_annotations(decoder(8, optimizer="adam"), MESH, {"layers.w1": (("x",), ())})
    place = placement(chosen(result, **{"layers.w1.new": {"D": ("x",)}}))
    assert "layers.w1" not in place.updates


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_gradients_pass_what_lies_between_their_maker_and_the_update(optimizer: str) -> None:
    """XLA gathered T5's tables, 256 MiB in f32, once for each moment; one exchange was planned."""
    large = decoder(8, vocabulary=1024, width=512, optimizer=optimizer)
    result = price_annotations(large, MESH, {"table": (("x",), ())})
    by_row = Spec((("x",), ()))
    result = replace(result, specs={**result.specs, "table.grad": by_row})
    update = {"table.new": {"V": ("x",)}}
    elsewhere = placement(chosen(result, **update, **{"table.grad": {"D": ("x",)}}))
    assert elsewhere.updates["table"].gradient[-1] == by_row
    alike = placement(chosen(result, **update, **{"table.grad": {"V": ("x",)}}))
    assert "table" not in alike.updates


def test_parameters_are_held_as_microbatches_read_them() -> None:
    """XLA gathered two stacks of Llama 3 70B in each of 16 microbatches, 350 GiB instead of 17."""
    model = decoder(8, optimizer="sgd", accumulation_steps=2)
    result = price_annotations(model, MESH, {"layers.w1": (("x",), ())})
    homes = {**result.plan.homes, "layers.w1@accumulate": Spec(((), (), ()))}
    read = {**result.specs, "layers.w1[i]": Spec(((), ()))}
    found = replace(result, plan=replace(result.plan, homes=homes), specs=read)
    place = placement(found)
    assert place.held["layers.w1"] == (Spec(((), (), ())),)
    assert place.tensors["layers.w1"] == result.specs["layers.w1"] == Spec(((), ("x",), ()))
    assert '"layers.w1": (P(None, None, None),),' in result_program(found)


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
    assert told[name].other == (in_part, Spec(((), (), ())))
    assert '(P("y", None, None), P(None, None, None))' in result_program(found)
