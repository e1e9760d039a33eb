"""What XLA's TPU compiler copies after gathering weights in narrow shards, against the rule.

    python benchmarks/tpu_gathers.py

Two layers of one product each, whose weight lies in shards of some width along one dimension, on
chips of three generations. Prints Markdown: estimated milliseconds of the copies of one gathered
weight, and what `costmodels/retiling.py` says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

import meshes  # noqa: E402
from costmodels.retiling import retiling_seconds  # noqa: E402
from meshes import LogicalMesh  # noqa: E402
from planner.verify.compare import clock_hz  # noqa: E402
from planner.verify.compile import compile_program  # noqa: E402
from planner.verify.hlo import Module, parse, trip_count  # noqa: E402

# Gathers are along x; over all of a three-dimensional torus nothing is copied.
MESHES = {
    "tpu-v3:8x8": {"x": 128}, "tpu-v4:4x4x8": {"x": 32, "y": 4}, "tpu-v4:4x4x4": {"x": 64},
    "tpu-v5e:8x16": {"x": 128},
}  # fmt: skip
WIDTHS = (6, 8, 12, 20)
# A product → sizes of its weight (None: the width times the shards).
PRODUCTS: dict[str, tuple[int | None, ...]] = {
    "TD,DF->TF": (None, 49152), "TF,DF->TD": (None, 49152), "TF,FD->TD": (49152, None),
    "TD,VD->TV": (49152, None), "TD,DNH->TNH": (None, 384, 128), "TNH,NHD->TD": (384, 128, None),
}  # fmt: skip
LAYERS, TOKENS = 2, 1536
PROGRAM = '''
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P


def make_mesh(devices):
    return Mesh(np.array(devices).reshape({sizes}), {axes})


def compiled_step(mesh):
    def layer(x, w):
        whole = lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        y = jnp.einsum("{product}", x, whole)
        return x + jnp.mean(y.astype(jnp.float32)).astype(x.dtype), None

    given = NamedSharding(mesh, P({axes})), NamedSharding(mesh, P(*{split}))
    return jax.jit(lambda x, weights: lax.scan(layer, x, weights)[0], in_shardings=given)


def shapes():
    return jax.ShapeDtypeStruct({x}, jnp.bfloat16), jax.ShapeDtypeStruct({w}, jnp.bfloat16)
'''
HEAD = (
    "| machine | product | width | GB | compiled | predicted |\n"
    "| --- | --- | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True)
class Case:
    topology: str
    product: str
    width: int

    @property
    def mesh(self) -> LogicalMesh:
        return meshes.logical(meshes.resolve(self.topology), MESHES[self.topology])

    @property
    def dim(self) -> int:
        return PRODUCTS[self.product].index(None)

    @property
    def weight(self) -> tuple[int, ...]:
        wide = self.width * dict(self.mesh.axes)["x"]
        return tuple(wide if n is None else n for n in PRODUCTS[self.product])

    def program(self) -> str:
        left, right = self.product.partition("->")[0].split(",")
        size = dict(zip(right, self.weight, strict=True)) | {"T": TOKENS * self.mesh.devices}
        split = [None, *("x" if d == self.dim else None for d in range(len(right)))]
        axes = tuple(a for a, _ in self.mesh.axes)
        return PROGRAM.format(
            product=self.product, axes=axes, split=split, sizes=tuple(n for _, n in self.mesh.axes),
            x=tuple(size[d] for d in left), w=(LAYERS, *self.weight),
        )  # fmt: skip

    def predicted_s(self) -> float:
        size = 2 * prod(self.weight)
        return float(
            retiling_seconds(self.mesh, len(self.weight), self.dim, ("x",), self.width, size)
        )

    def compiled_s(self) -> float:
        module = parse(compile_program(self.program(), self.mesh, "tpu").hlo)
        cycles = copied_cycles(module, module.entry, prod(self.weight))
        return cycles / LAYERS / clock_hz(self.mesh)


def copied_cycles(module: Module, name: str, elements: int) -> float:
    """Of copies of arrays of so many elements, in a computation and its loops."""
    scope = module.computations[name]
    total = 0.0
    for i in scope.instructions:
        if i.opcode == "while":
            inside = copied_cycles(module, i.called("body") or "", elements)
            total += trip_count(module, scope, i) * inside
        elif i.opcode == "copy" and prod(i.shape[0].shape) == elements:
            total += i.estimated_cycles
    return total


def cases() -> Iterator[Case]:
    for topology in MESHES:
        for product in PRODUCTS:
            for width in WIDTHS:
                yield Case(topology, product, width)


def main() -> None:
    print(HEAD)
    for case in cases():
        gigabytes = 2 * prod(case.weight) / 1e9
        print(
            f"| {case.topology} | `{case.product}` | {case.width} | {gigabytes:.2f} "
            f"| {case.compiled_s() * 1e3:.2f} ms | {case.predicted_s() * 1e3:.2f} ms |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
