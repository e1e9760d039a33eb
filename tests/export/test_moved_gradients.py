"""Gradients that the plan does not have where compilers would: programs say where and when they are
made."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from given_choices import chosen
from small_models import decoder

import meshes
from planner.export.jax_program import result_program
from planner.export.placement import placement
from planner.planning import plan_model, price_annotations
from planner.sharding.spec import Spec
from planner.source import find

TPU = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"x": 2, "y": 4})


@pytest.mark.slow
def test_they_are_told_where_they_are_made() -> None:
    """On GPUs XLA made the whole gradient of GPT-3's queries on every device otherwise."""
    model = find("gpt3-175b").load()
    mesh = meshes.logical(meshes.resolve(model.mesh or ""), {"data": 256, "model": 4})
    result = plan_model(model, mesh)
    told = placement(result).gradients
    moved = 0
    for kind in "qkv":
        op, weight = f"layers.{kind}", f"layers.w{kind}.cast"
        maker = next(o for o, _ in result.graph.walk() if o.outs[0] == f"{weight}.grad")
        made = result.plan.choices[maker.name].result(maker.rule, 0, ["data", "model"])
        home = result.specs[weight]
        if made.dims[1] == ("model",) and "model" in home.dims[0]:
            moved += 1
            assert told[op, weight].made == made.without_partial()
    assert moved


def test_gradients_of_parameters_lie_where_the_update_has_them() -> None:
    """A parameter that lies whole while its update is split: bound to lie like it, its gradient was
    gathered in every layer. Sums are where they are reduced to, the cast's gradient too."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"layers.wq": ((), (), ())})
    found = chosen(
        result,
        **{"layers.wq.cast.grad": {"B": ("x",)}, "layers.wq[i].grad": {"D": ("x",)}},
    )
    place = placement(found)
    by_x = Spec((("x",), (), ()))
    assert place.apart["layers.wq[i]"] == place.apart["layers.wq.cast"] == (by_x,)
    source = result_program(found)
    assert 'copy(w["wq"], "layers.wq", P("x", None, None))' in source
    assert "layers.wk[i]" not in place.apart


def test_a_copy_and_its_gradient_may_lie_apart() -> None:
    """A table is cast by rows, its gradient added up by columns: bound to lie like the copy, it was
    exchanged."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table": ((), ())})
    found = chosen(result, **{"table.cast": {"V": ("x",)}, "table.grad": {"D": ("x",)}})
    copy = placement(found).uses["table.cast", "table"]
    assert copy.bound
    assert (copy.spec, copy.gradient) == (Spec((("x",), ())), Spec(((), ("x",))))
    assert 'copy(params["table"], P("x", None), P(None, "x"))' in result_program(found)


def test_gradients_of_rows_are_told_how_they_are_read() -> None:
    """Left alone, XLA found ways of its own from the batch to the columns of a table."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table": ((), ())})
    found = chosen(result, **{"table.cast.grad_2": {"D": ("y",)}})
    assert placement(found).apart["x"] == (Spec(((), (), ("y",))),)


def test_gradients_of_rows_are_told_the_places_between() -> None:
    """Where two collectives take them to their reader: XLA's GPU compiler gathered all of them."""
    annotation = {"table": ((), ()), "layers.x.in": (("x",), ("y",), ())}
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, annotation)
    found = chosen(result, **{"table.cast.grad_2": {"D": ("x", "y")}})
    lies = Spec((("x",), ("y",), ()))
    found = replace(found, specs={**found.specs, "layers.x.in.grad.out": lies})
    *way, read = placement(found).apart["x"]
    assert read == Spec(((), (), ("x", "y")))
    assert way
    copies = re.findall(r'"x",\s+P\((.*)\),', result_program(found))
    assert copies[0] == 'None, None, ("x", "y")'  # the innermost has it last
    assert len(copies) == 1 + len(way)


def test_what_is_narrowed_is_gathered_narrow_on_gpus() -> None:
    """XLA's GPU compiler gathered the norm of Llama 3 70B in f32 when it was recomputed."""
    mesh = meshes.logical(meshes.resolve("dgx-a100-80gb:1x8"), {"x": 2, "y": 4})
    model = decoder(8, optimizer="sgd")
    whole = {"layers.x.in": (("x",), ("y",), ()), "layers.ln": (("x",), (), ())}
    made = {"layers.ln": {"B": ("x",), "S": ("y",)}}
    place = placement(chosen(price_annotations(model, mesh, whole), **made))
    assert place.sums["layers.ln"] == Spec((("x",), ("y",), ()))
    told = placement(chosen(price_annotations(model, TPU, whole), **made))
    assert "layers.ln" not in told.sums


@pytest.mark.parametrize("split", [{}, {"B": ("x",)}])
def test_summed_gradients_of_weights_are_made_first(split: dict[str, tuple[str, ...]]) -> None:
    """XLA's TPU compiler puts off those that it adds up over devices, and only those."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"layers.wq": ((), (), ())})
    found = chosen(result, **{"layers.wq.cast.grad": split})
    assert placement(found).first.get("layers.q") == ("layers.wq.cast" if split else None)
    assert ("first=1" in result_program(found)) == bool(split)


@pytest.mark.parametrize(("layers", "kept"), [(1, True), (2, False)])
def test_one_iteration_is_computed_again(layers: int, kept: bool) -> None:
    """Compilers inline such a loop and would find that its recomputation is there already."""
    source = result_program(price_annotations(decoder(8, layers_=layers), TPU, {}))
    assert f"prevent_cse={kept}" in source
    assert f"prevent_cse={not kept}" not in source
