"""The generated JAX program computes the loss and the gradients of the NumPy reference."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import meshes
from planner.export.jax_program import jax_program
from planner.export.placement import Placement
from planner.graph.core import Graph, Loop, Tensor
from planner.graph.derive import training_step
from planner.graph.optimizers import RATE
from planner.model import Model
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
    return replace(model, graph=in_f32(model.graph), training=training)


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


def check_gradients(model: Model, specs: dict[str, Spec] | None = None, mesh: Any = None) -> None:
    """Loss and every gradient against the NumPy reading of the derived training step."""
    model = f32(model)
    step = training_step(replace(model, training=replace(model.training, optimizer="sgd")))
    inputs = reference.random_inputs(step)
    expected = reference.evaluate(step, inputs)
    module = load(jax_program(model, MESH, Placement(specs or {})))
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


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_remat_policies_change_no_gradient(remat: str) -> None:
    check_gradients(support.transformer(remat=remat))
