"""The optimizer update as source text, one function per rule of `planner.graph.optimizers`."""

from __future__ import annotations

from dataclasses import replace

from planner.graph.builder import Builder
from planner.graph.core import Graph, Tensor
from planner.graph.optimizers import (
    BETA1,
    BETA2,
    CLIP,
    DECAY,
    EPSILON,
    RATE,
    factored_dims,
    update,
)
from planner.model import Training

STACKED = ("layers", "repeats")  # dimensions over which a loop stacks its parameters


def states_of(graph: Graph, training: Training) -> dict[str, dict[str, Tensor]]:
    """Parameter → {suffix: state tensor}, as the training step's derivation declares them."""
    found = {}
    for parameter in graph.parameters():
        b = Builder(training.compute, training.params)
        b.declare(parameter)
        b.declare(replace(parameter, name="gradient", role="gradient"))
        update(b, training, parameter.name, "gradient")
        found[parameter.name] = {
            name.removeprefix(f"{parameter.name}."): b.lookup(name) for name in b.inputs
        }
    return found


def update_source(graph: Graph, training: Training) -> list[str]:
    """Constants and the function update(name, p, g, state) → (new p, new state)."""
    body = _BODIES[training.optimizer].strip("\n").split("\n")
    used = {"RATE": RATE, "BETA1": BETA1, "BETA2": BETA2, "EPSILON": EPSILON, "DECAY": DECAY,
            "CLIP": CLIP}  # fmt: skip
    lines = [f"{k} = {v}" for k, v in used.items() if any(k in line for line in body)]
    if training.optimizer == "adafactor":
        lines += ["", *_axes(graph)]
    return [*lines, "", "", *body]


def _axes(graph: Graph) -> list[str]:
    """Which axes are factored (second moments by row and column) and which stack layers."""
    rows = []
    for p in graph.parameters():
        dims = factored_dims(p)
        factored = None if dims is None else tuple(p.dims.index(d) for d in dims)
        stacked = tuple(i for i, d in enumerate(p.dims) if d in STACKED)
        rows.append(f'    "{p.name}": ({factored}, {stacked}),')
    comment = "# Parameter: the two axes whose second moments are factored, the axes of layers."
    return [comment, "AXES = {", *rows, "}"]


_SGD = """
def update(name, p, g, state):
    \"\"\"Plain stochastic gradient descent.\"\"\"
    return p - RATE * g.astype(p.dtype), {}
"""

_MOMENTUM = """
def update(name, p, g, state):
    \"\"\"Heavy-ball momentum.\"\"\"
    m = BETA1 * state["m"] + g
    return (p - RATE * m).astype(p.dtype), {"m": m.astype(state["m"].dtype)}
"""

_ADAM = """
def update(name, p, g, state):
    \"\"\"Adam without bias correction: learning-rate schedules are yours to add.\"\"\"
    m = BETA1 * state["m"] + (1 - BETA1) * g
    v = BETA2 * state["v"] + (1 - BETA2) * jnp.square(g)
    step = m / (jnp.sqrt(v) + EPSILON)
    new = {"m": m.astype(state["m"].dtype), "v": v.astype(state["v"].dtype)}
    return (p - RATE * step).astype(p.dtype), new
"""

_ADAMW = _ADAM.replace("Adam without", "AdamW without").replace(
    "+ EPSILON)\n", "+ EPSILON) + DECAY * p\n"
)

_ADAFACTOR = """
def update(name, p, g, state):
    \"\"\"Adafactor without momentum: factored second moments, update clipped by its RMS.\"\"\"
    factored, stacked = AXES[name]
    squares = jnp.square(g) + 1e-30
    if factored is None:
        v = BETA2 * state["v"] + (1 - BETA2) * squares
        new, variance = {"v": v}, v
    else:
        row, column = factored
        vr = BETA2 * state["vr"] + (1 - BETA2) * jnp.mean(squares, axis=column)
        vc = BETA2 * state["vc"] + (1 - BETA2) * jnp.mean(squares, axis=row)
        mean = jnp.expand_dims(jnp.mean(vr, axis=row, keepdims=True), column)
        variance = jnp.expand_dims(vr, column) * jnp.expand_dims(vc, row) / mean
        new = {"vr": vr, "vc": vc}
    unit = g * lax.rsqrt(variance)
    own = tuple(i for i in range(p.ndim) if i not in stacked)
    rms = jnp.sqrt(jnp.mean(jnp.square(unit), axis=own, keepdims=True))
    step = unit / jnp.maximum(1.0, rms / CLIP)
    return (p - RATE * step).astype(p.dtype), {
        k: value.astype(state[k].dtype) for k, value in new.items()
    }
"""

_BODIES = {
    "sgd": _SGD, "momentum": _MOMENTUM, "adam": _ADAM, "adamw": _ADAMW,
    "adafactor": _ADAFACTOR,
}  # fmt: skip
