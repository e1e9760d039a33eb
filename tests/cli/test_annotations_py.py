"""annotations.py run by jax on eight virtual CPU devices, without this package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

STEP = '''
import jax, jax.numpy as jnp, numpy as np
from annotations import PARAMETERS, SPECS, constrain, make_mesh, shardings

mesh = make_mesh()
assert mesh.axis_names == ("x", "y") and mesh.devices.shape == (2, 4)
ids = [[d.id for d in row] for row in mesh.devices]
assert ids == ORDER, ids

def leaf(name, key):
    stacked, shape = PARAMETERS[name]
    return 0.02 * jax.random.normal(key, (*stacked, *shape))

keys = dict(zip(PARAMETERS, jax.random.split(jax.random.PRNGKey(0), len(PARAMETERS))))
params = {}
for name in PARAMETERS:
    *path, last = name.split(".")
    inner = params
    for word in path:
        inner = inner.setdefault(word, {})
    inner[last] = leaf(name, keys[name])

def block(x, w, mesh):
    say = (lambda n, v: constrain(n, v, mesh)) if mesh is not None else (lambda n, v: v)
    h = x * w["ln1"]
    q, k, v = (say(f"layers.{n}", jnp.einsum("bsd,dnh->bsnh", h, w["w" + n])) for n in "qkv")
    p = jax.nn.softmax(jnp.einsum("bsnh,btnh->bnst", q, k))
    x = x + jnp.einsum("bsnh,nhd->bsd", jnp.einsum("bnst,btnh->bsnh", p, v), w["wo"])
    h = say("layers.h", jax.nn.gelu(jnp.einsum("bsd,df->bsf", x * w["ln2"], w["w_in"])))
    return say("layers.x", x + jnp.einsum("bsf,fd->bsd", h, w["w_out"]))

def loss(params, tokens, mesh):
    x = params["embed"][tokens]
    x, _ = jax.lax.scan(lambda x, w: (block(x, w, mesh), None), x, params["layers"])
    logits = jnp.einsum("bsd,vd->bsv", x * params["ln_f"], params["embed"])
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

tokens = jax.random.randint(jax.random.PRNGKey(1), (16, 128), 0, 1024)
want, want_grads = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, None)))(params)
placed = jax.device_put(params, shardings(params, mesh))
got, got_grads = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, mesh)))(placed)
np.testing.assert_allclose(got, want, rtol=1e-5)
for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6)
split = placed["layers"]["w_in"]
axes = {a for d in SPECS["layers.w_in"] for a in d}
share = int(np.prod([mesh.shape[a] for a in axes]))
assert split.addressable_shards[0].data.size * share == split.size
'''

NAMES = '''
import jax, numpy as np
from annotations import PARAMETERS, SPECS, make_mesh, shardings
mesh = make_mesh()
P = jax.sharding.PartitionSpec

def shape(name, stacked):
    lead, inner = PARAMETERS[name]
    return jax.ShapeDtypeStruct((*lead, *inner) if stacked else tuple(inner), np.float32)

stacked = {name: shape(name, True) for name in PARAMETERS}
top = {n: s for n, s in stacked.items() if "." not in n}
whole = shardings({"params": {**top, "layers": {n.split(".")[1]: s for n, s in stacked.items()
                                               if "." in n}}}, mesh)
layers = [{n.split(".")[1]: shape(n, False) for n in PARAMETERS if "." in n} for _ in range(4)]
by_list = shardings({**top, "layers": layers}, mesh)
by_name = shardings({**top, **{f"layers_{i}": w for i, w in enumerate(layers)}}, mesh)
for one in (*by_list["layers"], *(by_name[f"layers_{i}"] for i in range(4))):
    for name, sharding in one.items():
        dims = tuple(whole["params"]["layers"][name].spec)
        assert dims == (None, *sharding.spec), (name, dims, sharding)

def refuses(call, *words):
    try:
        call()
    except ValueError as error:
        for word in words:
            assert word in str(error), (word, str(error))
    else:
        raise AssertionError("accepted")

renamed = {**stacked, "token_table": stacked["embed"]}
del renamed["embed"]
refuses(lambda: shardings(renamed, mesh), "token_table", "embed")
ok = shardings(renamed, mesh, rename={"token_table": "embed"})
assert ok["token_table"].spec == whole["params"]["embed"].spec
ok = shardings(renamed, mesh, rename=lambda name: name.replace("token_table", "embed"))
assert shardings(renamed, mesh, default=P())["token_table"].spec == P()
wrong = {**stacked, "embed": jax.ShapeDtypeStruct((1024, 255), np.float32)}
refuses(lambda: shardings(wrong, mesh), "embed", "255", "256")
refuses(lambda: make_mesh(jax.devices()[:4]), "8 devices", "got 4")
'''

WRONG_KIND = '''
from annotations import make_mesh
try:
    make_mesh()
except ValueError as error:
    assert "TPU v3" in str(error) and "cpu" in str(error), error
else:
    raise AssertionError("accepted")
assert make_mesh(check_kind=False).shape == {"x": 2, "y": 4}
'''


def _run(folder: Path, program: str) -> None:
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_a_sharded_step_computes_what_the_unsharded_one_does(on_cpus):
    from planner.export import planfile
    from planner.request import read_plan

    order = read_plan(planfile.load(on_cpus)).result.mesh.device_order().tolist()
    _run(on_cpus, f"ORDER = {order}\n{STEP}")


def test_names_match_or_are_refused(on_cpus):
    _run(on_cpus, NAMES)


def test_other_devices_are_refused(planned):
    _run(planned, WRONG_KIND)
