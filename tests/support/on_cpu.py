"""An exported program on virtual CPU devices against itself without any annotation."""

from __future__ import annotations

from typing import Any

MAIN = 'if __name__ == "__main__"'
ZERO = 1e-4  # of the largest value of all: what may be rounding only


def load(source: str) -> dict[str, Any]:
    """The definitions of an exported program."""
    module: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source.partition(MAIN)[0], "program.py", "exec"), module)
    return module


def largest_difference(source: str, microbatches: int = 1) -> float:
    """Of loss and gradients (of the first of `microbatches`), sharded and not, relative to the
    largest value of each array. Arrays that are zero but for rounding (the gradient of a bias of
    keys, which the softmax does not see) count relative to the largest of all."""
    import jax
    import numpy as np

    program = load(source)
    mesh = program["make_mesh"](jax.devices("cpu"))
    params, _ = program["initialise"](jax.random.key(0), mesh)
    batch = program["random_batch"](jax.random.key(1), mesh)
    if microbatches > 1:
        batch = jax.tree.map(lambda a: a[0], batch)
    step = jax.jit(jax.value_and_grad(program["loss_fn"]), static_argnums=2)
    found = jax.tree.leaves(step(params, batch, mesh))
    alone = jax.tree.leaves(step(*jax.device_get((params, batch)), None))
    pairs = list(zip(map(np.asarray, found), map(np.asarray, alone), strict=True))
    least = ZERO * max(float(np.abs(b).max()) for _, b in pairs)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), least)) for a, b in pairs)
