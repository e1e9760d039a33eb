"""The generated JAX program computes the loss and the gradients of the NumPy reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from given_choices import chosen
from small_models import built, conv_net, decoder, experts

import meshes
from planner.architectures import build
from planner.architectures.settings import Decoder
from planner.export.jax_ops import ExportError
from planner.export.jax_program import jax_program, result_program
from planner.export.placement import Copy, Gradient, Placement, Update, placement
from planner.graph import expr as ex
from planner.graph import windows
from planner.graph.builder import Builder
from planner.graph.core import Graph, Loop, Tensor
from planner.graph.derive import training_step
from planner.graph.optimizers import RATE
from planner.model import OPTIMIZERS, Model, Pipeline, Remat, Training
from planner.modelfile import load_model
from planner.pipelining.stacked import stacked
from planner.planning import price_annotations
from planner.sharding.choices import Choice
from planner.sharding.spec import Spec
from planner.values import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "graph"))
import graph_support as support

jax = pytest.importorskip("jax")
MESH = meshes.logical(meshes.resolve("dgx-a100-80gb:1x8"), {"x": 2, "y": 4})


def in_f32(graph: Graph) -> Graph:
    """The same graph with every float tensor in f32, so that JAX can be compared closely."""

    def wide(t: Tensor) -> Tensor:
        return replace(t, dtype="f32") if t.dtype == "bf16" else t

    nodes = tuple(
        replace(n, body=in_f32(n.body)) if isinstance(n, Loop) else n for n in graph.nodes
    )
    return replace(graph, nodes=nodes, tensors={k: wide(t) for k, t in graph.tensors.items()})


def f32(model: Model) -> Model:
    training = replace(model.training, compute="f32")
    return replace(model, graph=in_f32(model.graph), workload=training)


def load(source: str) -> ModuleType:
    module = ModuleType("generated")
    exec(compile(source, "generated.py", "exec"), module.__dict__)
    return module


def arrays(module: ModuleType, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The reference's flat inputs as the program's (params, states, batch)."""

    def get(name: str, row: Any) -> Any:
        return jax.numpy.asarray(inputs[name], row[1])

    params = {n: get(n, row) for n, row in module.PARAMETERS.items()}
    states = {
        n: {k: get(f"{n}.{k}", row) for k, row in rows.items()}
        for n, rows in module.STATES.items()
    }
    batch = {
        n: get(n if n in inputs else f"{n}.all", row) for n, row in module.INPUTS.items()
    }
    return params, states, batch


def check_gradients(
    model: Model, specs: dict[str, Spec] | None = None, mesh: Any = None,
    sliced: Collection[str] = (),
) -> None:
    """Loss and every gradient against the NumPy reading of the derived training step."""
    model = f32(model)
    step = training_step(replace(model, workload=replace(model.training, optimizer="sgd")))
    inputs = reference.random_inputs(step)
    expected = reference.evaluate(step, inputs)
    module = load(jax_program(model, MESH, Placement(specs or {}, sliced=sliced)))
    params, _, batch = arrays(module, inputs)
    loss, grads = jax.jit(
        lambda p, b: jax.value_and_grad(module.loss_fn)(p, b, mesh)
    )(params, batch)
    np.testing.assert_allclose(loss, expected[step.outputs[0]], rtol=1e-4, atol=1e-5)
    for new, old in step.aliases.items():
        gradient = (inputs[old] - expected[new]) / RATE
        scale = max(float(np.abs(gradient).max()), 1e-3)
        np.testing.assert_allclose(grads[old], gradient, rtol=0, atol=2e-4 * scale, err_msg=old)


@pytest.mark.parametrize("case", support.CASES)
def test_every_op_and_layer(case: str) -> None:
    check_gradients(support.model(support.CASES[case]))


@pytest.mark.parametrize(
    "remat", ["none", "full", "dots", "attention", ("layers.q", "layers.h", "layers.ln1.out")]
)
def test_remat_policies_change_no_gradient(remat: Remat) -> None:
    check_gradients(support.transformer(remat=remat))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_bodies_save_what_the_plan_saves(remat: Remat) -> None:
    """JAX by itself keeps far more than is needed, and casts of weights for every layer."""
    model = f32(support.transformer(remat=remat))
    forward = next(n for n in training_step(model).nodes if isinstance(n, Loop))
    tensors = forward.body.tensors
    planned = sorted(np.prod(tensors[s.inner].shape) for s in forward.writes)
    module = load(jax_program(model, MESH, Placement({})))
    params, _, batch = module.shapes()
    traced = jax.make_jaxpr(jax.value_and_grad(module.loss_fn))(params, batch)
    scan = next(e for e in traced.eqns if e.primitive.name == "scan")
    stacks = scan.outvars[scan.params["num_carry"] :]
    assert sorted(np.prod(v.aval.shape[1:]) for v in stacks) == planned


@pytest.mark.parametrize("remat", ["none", "full", "attention"])
def test_softmax_with_the_planned_gradient(remat: Remat) -> None:
    """The program's own function against JAX's: same values, same saved tensors."""
    model = f32(support.transformer(remat=remat))
    step = training_step(replace(model, workload=replace(model.training, optimizer="sgd")))
    inputs = reference.random_inputs(step)
    found = []
    for own, barrier in ((False, False), (True, False), (True, True)):
        module = load(jax_program(model, MESH, Placement({}, barrier=barrier)))
        if not own:
            module.softmax = partial(of_jax, module)
        params, _, batch = arrays(module, inputs)
        traced = jax.make_jaxpr(jax.value_and_grad(module.loss_fn))(params, batch)
        scan = next(e for e in traced.eqns if e.primitive.name == "scan")
        stacks = sorted(v.aval.shape for v in scan.outvars[scan.params["num_carry"] :])
        found.append((jax.value_and_grad(module.loss_fn)(params, batch), stacks))
    (loss, grads), stacks = found[0]
    for (own_loss, own_grads), own_stacks in found[1:]:
        assert own_stacks == stacks
        np.testing.assert_allclose(own_loss, loss, rtol=1e-6)
        for name, g in grads.items():
            np.testing.assert_allclose(own_grads[name], g, rtol=0, atol=1e-6, err_msg=name)


def of_jax(
    module: ModuleType, x: jax.Array, axis: int, dtype: object, label: str | None = None
) -> jax.Array:  # fmt: skip
    found = jax.nn.softmax(x, axis).astype(dtype)
    return found if label is None else module.saved(found, label)


def test_no_mask_of_full_size_goes_through_the_loop() -> None:
    """JAX carries what does not change from layer to layer; jnp.where would make masks and
    constants as large as all scores of it."""
    model = decoder_of({"kv_heads": 2, "vocab": 8})
    module = load(jax_program(model, MESH, Placement({})))
    params, _, batch = module.shapes()
    traced = jax.make_jaxpr(jax.value_and_grad(module.loss_fn))(params, batch)
    scores = 2 * 4 * 8 * 8
    for scan in (e for e in traced.eqns if e.primitive.name == "scan"):
        constants = scan.invars[: scan.params["num_consts"]]
        assert all(np.prod(v.aval.shape) < scores for v in constants)


def test_grouped_scores_are_made_as_they_lie() -> None:
    """The queries are transposed, which are smaller, and nothing of the size of scores is."""
    model = decoder_of({"kv_heads": 2, "sequence": 32})
    source = jax_program(model, MESH, Placement({}))
    words = "".join(source.split())
    assert '"BKGSH,BTKH->BKGST",jnp.transpose(q,(0,2,3,1,4)),k' in words
    check_gradients(model)


def test_ring_attention_and_stages_in_one_program() -> None:
    check_gradients(decoder_of({"attention_blocks": 4, "kv_heads": 2}))
    model = decoder_of({})
    training = replace(model.training, batch=8, pipeline_microbatches=4)
    check_gradients(stacked(replace(model, workload=training), "x", 2))
    check_gradients(stacked(replace(decoder_of({"layers": 8}), workload=training), "x", 2, 2))


def volumes(b: Builder) -> str:
    """Convolutions of volumes, plain, strided, dilated, transposed, and a pooling with ties."""
    x = b.input("x", (2, 8, 4, 5, 3), ("B", "Z", "Y", "X", "C"), "f32")

    def weight(name: str, taps: tuple[int, ...], channels: tuple[int, int]) -> str:
        return b.param(name, (*taps, *channels), ("kz", "ky", "kx", "I", "C"))

    h = windows.conv(b, x, weight("plain", (3, 3, 2), (3, 4)), name="plain.y")
    h = b.pointwise("flat", ex.relu(ex.x(0)), h)  # equal maxima: zeros
    h = windows.max_pool(b, h, window=(2, 2, 1), name="pool.y")
    h = windows.conv(b, h, weight("wide", (2, 3, 1), (4, 2)), dilation=(2, 1, 1), name="wide.y")
    h = windows.conv_transpose(b, h, weight("up", (2, 2, 2), (2, 3)), stride=2, name="up.y")
    h = windows.conv(b, h, weight("down", (3, 2, 2), (3, 2)), stride=(2, 1, 2), name="down.y")
    return support.weighted_sum(b, h)


SLICED = ("plain.y", "pool.y", "wide.y", "up.y", "down.y")


def test_slices_as_samples_change_no_gradient() -> None:
    model = support.model(volumes)
    source = jax_program(model, MESH, Placement({}, sliced=SLICED))
    loss = source.partition("def loss_fn")[2].partition("def update")[0]
    assert loss.count("slicewise(") == len(SLICED)
    check_gradients(model, sliced=SLICED)


def decoder_of(more: dict[str, Any]) -> Model:
    """A small decoder in f32."""
    sizes = {"d_model": 16, "heads": 4, "vocab": 16, "sequence": 8, "layers": 4}
    training = Training(2, "sgd", compute="f32", remat="full")
    return Model("small", build(Decoder(**{**sizes, **more}), 2, training), training, 16)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_train_step_is_the_derived_one(optimizer: str, steps: int) -> None:
    """Loss, new parameters and new states after one step, also over microbatches."""
    model = f32(support.transformer(optimizer=optimizer, accumulation_steps=steps))
    step = training_step(model)
    inputs = reference.random_inputs(step)
    expected = reference.evaluate(step, inputs)
    module = load(jax_program(model, MESH, Placement({})))
    loss, params, states = jax.jit(module.train_step)(*arrays(module, inputs))
    np.testing.assert_allclose(loss, expected[step.outputs[0]], rtol=1e-4)
    found = {**params, **{f"{n}.{k}": a for n, rows in states.items() for k, a in rows.items()}}
    assert found.keys() == set(step.aliases.values())
    for new, old in step.aliases.items():
        np.testing.assert_allclose(found[old], expected[new], rtol=2e-3, atol=2e-5, err_msg=old)


def test_factored_moments() -> None:
    """Adafactor with two dimensions large enough to factor, stacked over layers."""

    def build(b: Builder) -> str:
        x = b.input("x", (2, 128), ("B", "D"), "f32")
        r = b.repeat("layers", 2)
        entry = r.enter(x)
        w = r.param("w", (128, 128), ("D", "E"))
        y = r.einsum("B D, D E -> B E", entry, w, name="y")
        out = r.map("out", [(y, ("B", "D"))], ("B", "D"), ("tanh", ("x", 0)))
        (x,) = r.end_repeat([(x, entry, out)])
        return support.weighted_sum(b, x)

    model = f32(support.model(build, optimizer="adafactor"))
    step = training_step(model)
    inputs = reference.random_inputs(step)
    expected = reference.evaluate(step, inputs)
    module = load(jax_program(model, MESH, Placement({})))
    assert set(module.STATES["layers.w"]) == {"vr", "vc"}
    _, params, states = jax.jit(module.train_step)(*arrays(module, inputs))
    for name, found in (("w.new", params["layers.w"]), ("w.vr.new", states["layers.w"]["vr"]),
                        ("w.vc.new", states["layers.w"]["vc"])):  # fmt: skip
        np.testing.assert_allclose(found, expected[f"layers.{name}"], rtol=1e-3, atol=1e-6)


SHARDED = """
import sys, jax, numpy as np
source = open(sys.argv[1]).read()
exec(compile(source, "program.py", "exec"))
mesh = make_mesh()
params, states = initialise(jax.random.key(0), mesh)
batch = random_batch(jax.random.key(1), mesh)
step = jax.jit(jax.value_and_grad(loss_fn), static_argnums=2)
part = {name: x[0] for name, x in batch.items()} if "microbatch(" in source else batch
loss, grads = step(params, part, mesh)
alone = jax.device_get((params, part))
expected, expected_grads = step(*alone, None)
np.testing.assert_allclose(loss, expected, rtol=1e-5)
for name, g in grads.items():
    want = expected_grads[name]
    np.testing.assert_allclose(g, want, rtol=0, atol=1e-4 * float(abs(want).max()), err_msg=name)
for name, p in params.items():
    assert p.sharding.is_equivalent_to(NamedSharding(mesh, PARAMETERS[name][2]), p.ndim), name
expected, apart, _ = jax.jit(train_step)(*jax.device_get((params, states, batch)))
loss, params, states = compiled_step(mesh)(params, states, batch)
np.testing.assert_allclose(loss, expected, rtol=1e-5)
for name, p in params.items():
    np.testing.assert_allclose(p, apart[name], rtol=0, atol=0.1 * RATE, err_msg=name)
print("same")
"""


def test_sharded_over_eight_devices_is_the_same(tmp_path: Path) -> None:
    """Annotations and resharded copies change no value."""
    place = Placement(
        {
            "layers.w1": Spec(((), ("x",), ())), "layers.w2": Spec(((), (), ("y",))),
            "ids": Spec((("x",), ())), "targets": Spec((("x",), ())),
            "layers.x.in": Spec((("x",), (), ("y",))), "layers.q": Spec((("x",), (), (), ())),
            "logits": Spec((("x",), ("y",), ())),
        },
        {
            ("layers.h", "layers.w1"): Copy(Spec(((), ()))),
            ("layers.q", "layers.x.in"): Copy(Spec((("x",), ("y",), ())), bound=True),
        },
        {"layers.h": Spec((("x",), (), ("y",)))},
    )
    run_sharded(jax_program(f32(support.transformer(optimizer="adamw")), MESH, place), tmp_path)


def test_gradients_made_as_planned_are_the_same(tmp_path: Path) -> None:
    """Products with gradients split otherwise than they are, softmax with its own gradient."""
    place = Placement(
        {
            "layers.w1": Spec(((), ("y",), ())), "ids": Spec((("y",), ())),
            "targets": Spec((("y",), ())), "layers.x.in": Spec((("y",), ("x",), ())),
            "layers.h": Spec((("y",), ("x",), ())), "logits": Spec((("y",), ("x",), ())),
        },
        gradients={
            ("layers.h", "layers.w1.cast"): Gradient(
                (Spec((("y",), (), ())), Spec((("y",), (), ("x",)))), (Spec((("y",), (), ())),),
                Spec(((), ("x",))),
            ),
            ("logits", "table.cast"): Gradient(home=Spec(((), ("y",)))),
        },
        together={"logits"},
    )  # fmt: skip
    source = jax_program(f32(support.transformer(optimizer="adamw")), MESH, place)
    assert '(P("y", None, None), P("y", None, "x")), P("y", None, None), P(None, "x")' in source
    assert "together=True" in source
    run_sharded(source, tmp_path)


def test_updates_made_elsewhere_are_the_same(tmp_path: Path) -> None:
    """A parameter, its gradient and the new parameter pass places on the way."""
    rows, columns = Spec(((), ("y",), ())), Spec(((), (), ("y",)))
    between = Spec(((), ("x",), ()))
    place = Placement(
        {"layers.w1": rows, "ids": Spec((("x",), ())), "targets": Spec((("x",), ()))},
        updates={"layers.w1": Update((between, columns), (columns,), (columns, between))},
    )
    source = jax_program(f32(support.transformer(optimizer="momentum")), MESH, place)
    assert "moved_update(name, p, grads, states, mesh)" in source
    run_sharded(source, tmp_path)


def test_parameters_held_for_all_microbatches_are_the_same(tmp_path: Path) -> None:
    rows, whole = Spec(((), ("y",), ())), Spec(((), (), ()))
    place = Placement(
        {"layers.w1": rows, "ids": Spec((("x",), ())), "targets": Spec((("x",), ()))},
        held={"layers.w1": (Spec(((), (), ("y",))), whole)},
    )
    model = f32(support.transformer(optimizer="momentum", accumulation_steps=2))
    source = jax_program(model, MESH, place)
    assert "jax.value_and_grad(loss_fn)(read, part, mesh)" in source
    assert source.index("read = {") < source.index("def microbatch")
    run_sharded(source, tmp_path)


@pytest.mark.parametrize(("dtype", "written"), [("f32", "float32"), ("bf16", "bfloat16")])
def test_gradients_add_up_in_their_type(dtype: str, written: str) -> None:
    model = support.transformer(optimizer="momentum", accumulation_steps=2, gradients=dtype)
    source = jax_program(model, MESH, Placement({}))
    assert f"annotate(jnp.zeros(p.shape, jnp.{written}), PARAMETERS[n][2], mesh)" in source


def test_copies_and_gradients_that_lie_apart_are_the_same(tmp_path: Path) -> None:
    """Copies on their way into loops and ops, copies that a product reads itself, gradients that
    do not lie like their tensors."""
    by_x, by_both = Spec((("x",), (), ())), Spec((("x",), ("y",), ()))
    place = Placement(
        {
            "x": Spec(((), ("y",), ())), "layers.x.in": by_x, "layers.h": by_x, "logits": by_x,
            "layers.act": by_both, "layers.w1.cast": Spec(((), ("y",))),
        },
        uses={
            ("layers", "x"): Copy(by_x, True, (Spec((("y",), (), ())),)),
            ("layers.h", "layers.w1.cast"): Copy(Spec(((), ()))),
            ("layers.y", "layers.act"): Copy(by_x, True, (Spec((("x",), (), ("y",))),)),
        },
        gradients={
            ("layers.h", "layers.w1.cast"): Gradient((by_x,), (by_x,), Spec(((), ()))),
            ("layers.h", "layers.middle"): Gradient((by_x,), (Spec(((), ("y",))),), by_both),
        },
        apart={"layers.x.in": (Spec((("x",), (), ("y",))),), "layers.w1.cast": ()},
    )  # fmt: skip
    source = jax_program(f32(support.transformer(optimizer="adamw")), MESH, place)
    assert 'shard(shard(x, P("y", None, None)), P("x", None, None))' in source
    assert 'copy(x_in, "layers.x.in", P("x", None, "y"))' in source
    assert "reads=(None, P(None, None))" in source
    run_sharded(source, tmp_path)


def test_every_result_of_an_op_is_placed() -> None:
    """Left open, a router's gates and choices made XLA gather masks made of them."""
    model = experts(batch=8)
    gates = next(o for o, _ in model.graph.walk() if len(o.outs) == 2)
    source = jax_program(model, MESH, Placement({n: Spec((("x",), (), ())) for n in gates.outs}))
    for name in gates.outs:
        assert re.search(rf'(\w+) = shard\(\1, "{name}"\)', source), name


def test_only_gpus_are_told_more() -> None:
    """Gradients made together, a barrier in softmax, narrowing before gathering: where a plan for
    a GPU says so, the same plan for a TPU leaves it to the compiler."""
    model = decoder_of({})
    on_tpu = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"x": 2, "y": 4})
    gpu, tpu = (placement(price_annotations(model, m, {})) for m in (MESH, on_tpu))
    assert (gpu.barrier, "logits" in gpu.together) == (True, True)
    assert (tpu.barrier, tpu.together) == (False, set())


def test_a_gradient_split_otherwise_than_its_product_is_named() -> None:
    """The product is split by batch, the gradient of its weight by what the product makes."""
    model = decoder_of({})
    result = price_annotations(model, MESH, {"layers.in": (("x",), ("y",), ())})
    ops = {op.name: op for op, _ in result.graph.walk()}
    name = next(n for n in ops if n.startswith("layers.w_in") and n.endswith(".grad"))
    split = tuple(
        {"B": ("x",), "F": ("y",)}.get(f.name, ()) for f in ops[name].rule.factors
    )  # fmt: skip
    choices = {**result.plan.choices, name: Choice(split)}
    found = placement(replace(result, plan=replace(result.plan, choices=choices))).gradients
    gradient = found["layers.in", name.removesuffix(".grad")]
    assert gradient.made == Spec(((), ("y",)))
    assert gradient.cotangent == (Spec((("x",), (), ("y",))),)


def test_sums_that_are_reduced_whole_and_cut_are_named() -> None:
    """One all-reduce over both axes is faster than a scatter over one and a sum over the other,
    which is what compilers make of a weight's gradient that the product splits alike."""
    batch, head = {"B": ("x", "y")}, {"N": ("y",)}
    tpu = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"x": 2, "y": 4})
    result = price_annotations(decoder(8, optimizer="sgd"), tpu, {})
    plan = {"layers.q": batch, "layers.wq.cast.grad": batch}
    cut = chosen(result, **plan, **{"layers.wq[i].grad": head})
    summed = chosen(result, **plan, **{"layers.wq[i].grad": {}})
    found = placement(cut).gradients["layers.q", "layers.wq.cast"]
    assert found.made == Spec(((), (), ()))
    assert found.cotangent == (Spec((("x", "y"), (), (), ())),)
    assert ("layers.q", "layers.wq.cast") not in placement(summed).gradients


def test_a_gradient_made_with_more_axes_lies_apart() -> None:
    """Not if these axes are pending: sums are scattered where the activation lies, too."""
    result = price_annotations(decoder_of({}), MESH, {"layers.ln1.out": (("x",), (), ())})
    split = {"B": ("x",), "D": ("y",)}
    apart = placement(chosen(result, **{"layers.ln1.out.grad_4": split})).apart
    assert apart["layers.ln1.out"] == (Spec((("x",), (), ("y",))),)
    assert "layers.ln1.out" not in placement(
        chosen(result, **{"layers.ln1.out.grad_4": {"B": ("x",)}})
    ).apart


def test_uneven_activations_are_padded_by_the_compiler(tmp_path: Path) -> None:
    """Batch 6, 3 heads, 11 words over 2 × 4 devices: uneven in the program, which computes the
    same; its arguments, which JAX takes only in equal shards, lie evenly."""
    sizes = {"positions": 5, "vocabulary": 11, "width": 8, "heads": 3, "head": 2}
    model = replace(f32(decoder(6, optimizer="adamw", **sizes)), uneven=True)
    wanted = {
        "x": (("y",), (), ()), "layers.q": (("x",), (), ("y",), ()),
        "layers.h": (("x", "y"), (), ()), "logits": ((), (), ("x", "y")),
    }  # fmt: skip
    result = price_annotations(model, MESH, wanted)
    given = {name: result.specs[name].dims for name in wanted}
    assert given == wanted
    assert all(
        result.specs[t.name].fits(t.shape, dict(MESH.axes))
        for t in (result.graph.tensors[n] for n in result.graph.inputs)
    )
    run_sharded(result_program(result), tmp_path)


TURNED = """
training: {batch: B, optimizer: sgd, compute: f32}
graph:
  inputs: {x: "f32[B, S, D]"}
  params: {w: "[D, F]"}
  ops:
    - h = einsum("B S D, D F -> B S F", x, w)
    - s = sum(square(h), over=[F])
    - loss = mean(square(s)) + mean(h)
dims: {B: 8, S: 4, D: 16, F: 32}
"""


def test_a_gradient_that_lies_otherwise_is_made_of_what_was_copied(tmp_path: Path) -> None:
    """Squares are added up by batch, their gradient is made by features: of the operand, which is
    whole, and not of the slice that was read, which would have to be exchanged."""
    model = load_model(TURNED, "turned")
    whole, features = Spec((("x",), (), ())), Spec((("x",), (), ("y",)))
    batch = Spec((("x", "y"), (), ()))
    copies = {("s.square", "h"): Copy(batch, True, (), features)}
    source = jax_program(model, MESH, Placement({"h": whole}, copies))
    assert "reread( lambda v: jnp.square(v), h, " in " ".join(source.split())
    run_sharded(source, tmp_path)
    plain = {("s.square", "h"): Copy(batch, True)}
    assert "reread" not in jax_program(model, MESH, Placement({"h": whole}, plain))


def test_rows_of_tables_and_their_gradients_are_the_same(tmp_path: Path) -> None:
    """A table that is gathered for its rows, whose gradient is made of indices elsewhere."""
    rows, columns = Spec((("y",), (), ())), Spec(((), ("x",)))
    place = Placement(
        {"table": columns, "ids": Spec((("y",), ())), "x": rows},
        uses={("x", "table.cast"): Copy(Spec(((), ())), True, (Spec(((), ("y",))),))},
        gradients={("x", "table.cast"): Gradient((), (Spec((("x",), ())),), columns)},
        apart={"x": (Spec((("x",), (), ("y",))),)},
    )
    source = jax_program(f32(support.transformer(optimizer="adamw")), MESH, place)
    assert "lookup(" in source
    run_sharded(source, tmp_path)


@pytest.mark.slow
def test_uneven_space_is_padded_by_the_compiler(tmp_path: Path) -> None:
    """Rows and columns of strided, dilated and transposed convolutions, with their halos."""
    model = f32(built(partial(conv_net, height=14, width=12), remat="full", optimizer="sgd"))
    graph, sizes = model.graph.all_tensors(), dict(MESH.axes)
    space = Spec(((), ("x",), ("y",), ()))
    wanted = {
        name: space.dims for name, t in graph.items()
        if t.dims[:1] == ("B",) and len(t.shape) == 4 and space.fits(t.shape, sizes, True)
        and t.role == "activation"
    }  # fmt: skip
    uneven = [name for name in wanted if not space.fits(graph[name].shape, sizes)]
    assert len(uneven) >= 4, uneven
    result = price_annotations(replace(model, uneven=True), MESH, wanted)
    run_sharded(result_program(result), tmp_path)


def run_sharded(source: str, tmp_path: Path) -> None:
    """Eight devices compute the loss and gradients that one does."""
    program = tmp_path / "program.py"
    program.write_text(source.partition('if __name__ == "__main__"')[0], encoding="utf-8")
    (tmp_path / "run.py").write_text(SHARDED, encoding="utf-8")
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(program)], env=environment, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]


def test_mesh_of_another_size_is_refused() -> None:
    module = load(jax_program(support.transformer(), MESH, Placement({})))
    with pytest.raises(ValueError, match="there are 3 devices"):
        module.make_mesh([Device(i) for i in range(3)])


def test_pipelined_programs_are_refused() -> None:
    model = replace(support.transformer(pipeline_microbatches=4), pipeline=Pipeline("x"))
    with pytest.raises(ExportError, match="schedule=gpipe --set pipeline"):
        jax_program(model, MESH, Placement({}))


def test_lines_are_short() -> None:
    """The file is meant to be read."""
    source = jax_program(support.transformer(optimizer="adafactor"), MESH, Placement({}))
    assert max(map(len, source.splitlines())) <= 100


class Device:
    """What make_mesh needs to know of a device that has no torus coordinates."""

    def __init__(self, number: int) -> None:
        self.process_index, self.id = 0, number
