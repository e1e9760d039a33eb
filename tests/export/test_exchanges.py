"""Products and sums that a plan moves once they are made: programs say where that is."""

from __future__ import annotations

from given_choices import chosen
from small_models import decoder

import meshes
from planner.export.jax_program import result_program
from planner.export.placement import Copy, Gradient, placement
from planner.planning import price_annotations
from planner.sharding.spec import Spec

TPU = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"x": 2, "y": 4})
BY_BATCH, BY_HEAD = Spec((("x",), (), (), ())), Spec(((), (), ("x",), ()))


def test_products_are_made_before_they_are_exchanged() -> None:
    """XLA exchanged what a product of experts read, four times as large as what it made."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"layers.q": BY_HEAD.dims})
    by_batch = chosen(result, **{"layers.q": {"B": ("x",)}})
    assert placement(by_batch).sums["layers.q"] == BY_BATCH
    as_it_lies = chosen(result, **{"layers.q": {"N": ("x",)}})
    assert "layers.q" not in placement(as_it_lies).sums


def test_what_is_exchanged_for_a_sum_is_named() -> None:
    """XLA gathered both operands of the gradient of a GShard's experts over the batch."""
    split = {"layers.q": {"B": ("x",)}, "layers.wq.cast.grad": {"B": ("x",)}}
    by_head, by_batch = (
        chosen(price_annotations(decoder(8, optimizer="sgd"), TPU, {"layers.q": s.dims}), **split)
        for s in (BY_HEAD, BY_BATCH)
    )
    told = placement(by_head).gradients["layers.q", "layers.wq.cast"]
    assert (told.cotangent[-1], told.made) == (BY_BATCH, Spec(((), (), ())))
    assert ("layers.q", "layers.wq.cast") not in placement(by_batch).gradients


def test_sums_are_made_before_they_split_what_is_split() -> None:
    """XLA reduced those of GLaM's tokens whole and gathered them over the batch."""
    split = {"B": ("x",), "N": ("y",)}

    def told(lies: Spec) -> Gradient | None:
        result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"layers.ln": lies.dims})
        found = chosen(result, **{"layers.q": split, "layers.ln.grad_3": split})
        return placement(found).gradients.get(("layers.q", "layers.ln"))

    further = told(Spec((("x", "y"), (), ())))
    assert further is not None
    assert further.made == Spec((("x",), (), ()))
    assert told(Spec((("x",), ("y",), ()))) is None


def test_tables_that_are_looked_up_whole_add_up_rows_where_they_are() -> None:
    """XLA exchanged the gradients of T5's rows by batch for columns, and added to a part."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table": ((), ("x",))})
    whole = Spec(((), ()))
    use = ("x", "table.cast")
    summed = chosen(result, **{"table.cast.grad_2": {"B": ("x",)}})
    by_column = chosen(result, **{"table.cast.grad_2": {"D": ("x",)}})
    assert placement(summed).uses[use] == Copy(whole, True)
    assert use not in placement(by_column).uses


def test_sums_are_scattered_before_an_axis_moves_on() -> None:
    """XLA reduced the gradient of a table whole that two axes were to split, one each way."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {})
    batch = {"layers.h": {"B": ("x", "y")}, "layers.w1.cast.grad": {"B": ("x", "y")}}
    use = ("layers.h", "layers.w1.cast")
    apart = chosen(result, **batch, **{"layers.w1[i].grad": {"D": ("x",), "F": ("y",)}})
    assert placement(apart).gradients[use].way == [Spec(((), ("y", "x")))]
    beside = chosen(result, **batch, **{"layers.w1[i].grad": {"F": ("x", "y")}})
    assert use not in placement(beside).gradients


def test_tables_are_gathered_where_the_plan_gathers_them() -> None:
    """XLA looked Mixtral's up by columns instead, and exchanged the rows."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table.cast": ((), ("x",))})
    whole = chosen(result, **{"x": {"B": ("x",)}})
    assert placement(whole).uses["x", "table.cast"].spec == Spec(((), ()))
    by_column = chosen(result, **{"x": {"D": ("x",)}})
    assert ("x", "table.cast") not in placement(by_column).uses


def test_tables_are_cut_before_they_are_gathered() -> None:
    """XLA gathered rows first, all columns of each: 500 MiB of LaMDA's table instead of 8."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table.cast": (("x",), ())})
    found = chosen(result, **{"x": {"D": ("y",)}})
    told = placement(found).uses["x", "table.cast"]
    assert (*told.way, told.spec) == (Spec((("x",), ("y",))), Spec(((), ("y",))))


def test_rows_found_by_columns_are_exchanged_afterwards() -> None:
    by_batch = {"layers.x.in": (("x",), (), ()), "x": (("x",), (), ())}
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, by_batch)
    assert placement(chosen(result, **{"x": {"D": ("x",)}})).sums["x"] == Spec(((), (), ("x",)))
    assert "x" not in placement(chosen(result, **{"x": {"B": ("x",)}})).sums


def test_gradients_of_tables_are_made_of_indices_where_the_plan_has_them() -> None:
    """XLA moved the gradients of GShard's rows back to where the indices had been looked up."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"ids": (("x", "y"), ())})
    use, batch = ("x", "table.cast"), {"B": ("x", "y")}
    mixed = chosen(result, **{"x": batch, "table.cast.grad_2": {"B": ("x",), "D": ("y",)}})
    told = placement(mixed).gradients[use]
    assert (told.other, told.made) == ((Spec((("x",), ())),), Spec(((), ("y",))))
    assert "lookup(" in result_program(mixed)
    alike = chosen(result, **{"x": batch, "table.cast.grad_2": batch})
    assert use not in placement(alike).gradients
    assert "lookup(" not in result_program(alike)


def test_terms_of_a_gradient_are_added_up_where_they_are_read() -> None:
    """A table's two gradients are made in different places, and go to a third: bound to lie like
    the table, GLaM's were gathered."""
    result = price_annotations(decoder(8, optimizer="sgd"), TPU, {"table": ((), ())})
    split = {"table.cast.grad": {"V": ("x",)}, "table.cast.grad_2": {"D": ("y",)}}
    found = chosen(result, **split, **{"table.grad": {"D": ("x", "y")}})
    assert placement(found).apart["table.cast"] == (Spec(((), ("x", "y"))),)
