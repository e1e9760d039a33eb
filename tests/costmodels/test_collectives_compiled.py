"""How XLA's TPU compiler carries out collectives: the algorithm that it notes in its programs.

The cost model takes these for granted: one ring for a gather over several dimensions, all of them
at once for an all-reduce over whole dimensions, and over all three a gather made of an all-reduce.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, re
import jax, numpy as np, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v4:4x4x8", chip_config_name="megacore",
    chips_per_host_bounds=(2, 2, 1), num_slices=1,
).devices
at = np.empty((4, 4, 8), dtype=object)
for device in devices:
    at[tuple(device.coords)] = device
mesh = Mesh(at.reshape(4, 4, 2, 4), ("a", "b", "outer", "inner"))
kinds = {
    "all-gather": lambda v, axes: jax.lax.all_gather(v, axes, tiled=True),
    "reduce-scatter": lambda v, axes: jax.lax.psum_scatter(v, axes, tiled=True),
    "all-reduce": lambda v, axes: jax.lax.psum(v, axes),
}
rows = {"all-gather": 128}
found = {}
for axes in (("a", "b"), ("a", "inner"), ("a", "b", "outer", "inner")):
    for kind, function in kinds.items():
        call = jax.shard_map(
            lambda v: function(v, axes), mesh=mesh, in_specs=P(mesh.axis_names),
            out_specs=P(mesh.axis_names), check_vma=False,
        )
        shape = (128 * rows.get(kind, 1024), 16384)
        lies = NamedSharding(mesh, P(mesh.axis_names))
        text = jax.jit(call).lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=lies))
        text = text.compile().as_text()
        colors = re.findall(r"Strategy\\w*\\{colors:(\\d+) phases:(\\d+)", text)
        emitters = r'"emitter":"(1DAllGather|SingleInputAllReduceScatter|Rotated)'
        found[f"{kind} {' '.join(axes)}"] = [
            sorted(set(re.findall(emitters, text))),
            max((int(p) for _, p in colors), default=1),
        ]
print(json.dumps(found))
"""


@pytest.mark.compiler
def test_the_compiler_notes_the_algorithms_that_are_priced() -> None:
    pytest.importorskip("libtpu")
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    gather, scatter, reduce = "1DAllGather", "SingleInputAllReduceScatter", "Rotated"
    assert found == {
        # [how, dimensions in turn]: two whole dimensions
        "all-gather a b": [[gather], 1],
        "reduce-scatter a b": [[scatter], 1],
        "all-reduce a b": [[reduce], 2],
        # a dimension and a part of another
        "all-gather a inner": [[gather], 1],
        "reduce-scatter a inner": [[scatter], 1],
        "all-reduce a inner": [[reduce], 1],
        # all three dimensions
        "all-gather a b outer inner": [[reduce], 3],
        "reduce-scatter a b outer inner": [[reduce], 3],
        "all-reduce a b outer inner": [[reduce], 3],
    }
