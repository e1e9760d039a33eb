"""Random small graphs for brute force: fan-out, sums of partial sums, maxima, loops, donation."""

from __future__ import annotations

import random
from collections.abc import Sequence

from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.core import Graph, Tensor
from planner.graph.derive import training_step
from planner.model import Model, Training
from planner.sharding.flow import build_flow
from planner.sharding.spec import Spec

EVEN = (1024, 2048, 8192)  # large enough that sharding pays
ODD = 1023  # cannot be split evenly


def random_graph(seed: int, dims: Sequence[int] = (*EVEN, ODD)) -> Graph:
    """A graph of two to four ops, one of them perhaps in a loop, and perhaps a donated state.
    `dims`: the sizes to draw from."""
    rng = random.Random(seed)
    b = Builder(param_dtype="bf16")
    sizes = {d: rng.choice(dims) for d in "ABC"}
    pairs = [("A", "B"), ("B", "C"), ("A", "C")]
    made = [b.param(f"p{i}", [sizes[d] for d in dims], dims)
            for i, dims in enumerate(rng.sample(pairs, 2))]  # fmt: skip
    for i in range(rng.randint(2, 3)):
        made.append(_op(rng, b, made, f"t{i}"))
    if rng.random() < 0.4:
        made.append(_loop(rng, b, made[-1]))
    outputs = [made[-1]]
    aliases = {}
    if rng.random() < 0.4:
        aliases = _donation(rng, b, made)
        outputs += list(aliases)
    return b.graph(outputs, aliases=aliases)


def _op(rng: random.Random, b: Builder, made: list[str], name: str) -> str:
    """A product, a sum of two, a (non)linear function, a sum or maximum over a dimension."""
    x = b.lookup(rng.choice(made[-2:]))
    others = [b.lookup(t) for t in made if t != x.name]
    kinds = [kind for kind in ("product", "sum") if _partner(kind, x, others)]
    kinds += ["tanh", "double"] + (["reduce", "max"] if len(x.shape) > 1 else [])
    kind = rng.choice(kinds)
    if kind in ("product", "sum"):
        y = rng.choice(_partner(kind, x, others))
        out = x.dims
        value = ex.add(ex.x(0), ex.x(1))
        if kind == "product":
            common = set(x.dims) & set(y.dims)
            out = tuple(sorted((set(x.dims) | set(y.dims)) - common))
            value = ex.mul(ex.x(0), ex.x(1))
        return b.map(name, [(x.name, x.dims), (y.name, y.dims)], out, value)
    if kind in ("tanh", "double"):
        value = ("tanh", ex.x(0)) if kind == "tanh" else ex.mul(ex.c(2.0), ex.x(0))
        return b.map(name, [(x.name, x.dims)], x.dims, value)
    kept = tuple(d for d in x.dims if d != rng.choice(x.dims))
    combiner = "sum" if kind == "reduce" else "max"
    return b.map(name, [(x.name, x.dims)], kept, ex.x(0), combiner=combiner)


def _partner(kind: str, x: Tensor, others: list[Tensor]) -> list[Tensor]:
    if kind == "sum":
        return [t for t in others if t.dims == x.dims]
    return [t for t in others if len(set(t.dims) & set(x.dims)) == 1 and len(t.dims) == 2]


def _loop(rng: random.Random, b: Builder, x: str) -> str:
    """x ← x·w[i] or x ← tanh(x + w[i]), three times."""
    t = b.lookup(x)
    r = b.repeat("loop", 3)
    entry = r.enter(x)
    last = t.dims[-1] if t.dims else None
    if last is not None and rng.random() < 0.5:
        w = r.param("w", (t.shape[-1], t.shape[-1]), (last, "Z"))
        out = r.map("step", [(entry, t.dims), (w, (last, "Z"))], (*t.dims[:-1], "Z"),
                    ex.mul(ex.x(0), ex.x(1)))  # fmt: skip
    else:
        w = r.param("w", t.shape, t.dims)
        out = r.map("step", [(entry, t.dims), (w, t.dims)], t.dims,
                    ("tanh", ex.add(ex.x(0), ex.x(1))))  # fmt: skip
    return r.end_repeat([(x, entry, out)])[0]


def _donation(rng: random.Random, b: Builder, made: list[str]) -> dict[str, str]:
    """A state replaced by a function of itself and of a tensor with the same dimensions."""
    x = b.lookup(rng.choice(made))
    full = b.unique("state")
    b.inputs.append(full)
    b.declare(Tensor(full, x.shape, "f32", x.dims, "state"))
    value = ex.add(ex.mul(ex.c(0.5), ex.x(0)), ex.x(1))
    new = b.map("state.new", [(full, x.dims), (x.name, x.dims)], x.dims, value, dtype="f32",
                roles=["state"])  # fmt: skip
    if rng.random() < 0.5:  # the new value is read again
        b.map("after", [(new, x.dims)], x.dims, ("tanh", ex.x(0)))
    return {new: full}


def random_training_step(seed: int) -> Graph:
    """The step of a loop of one or two products: what it saves lives until its backward loop."""
    rng = random.Random(seed)
    b = Builder(param_dtype="bf16")
    rows, width = rng.choice(((16384, 255), (4096, 1024), (1024, 2048)))
    x = b.input("x", (rows, width), ("B", "D"), "bf16")
    h = b.map("start", [(x, ("B", "D"))], ("B", "D"), ("tanh", ex.x(0)))
    r = b.repeat("loop", rng.choice((2, 5)))
    entry = r.enter(h)
    w = r.param("w", (width, width), ("D", "E"))
    out = r.einsum("B D, D E -> B E", entry, w, name="y")
    if rng.random() < 0.5:
        out = r.pointwise("act", ("tanh", ex.x(0)), out)
    (h,) = r.end_repeat([(h, entry, out)])
    b.map("loss", [(h, ("B", "D"))], (), ex.mul(ex.x(0), ex.x(0)), dtype="f32")
    remat = rng.choice(("none", "full"))
    return training_step(
        Model("loop", b.graph(["loss"]), Training(1, optimizer="sgd", remat=remat), 1)
    )


def batch_pins(graph: Graph, seed: int) -> dict[str, Spec]:
    """Activations of a training step pinned to shards of the batch, most of them, so that few
    plans are left: those that differ in where parameters and gradients are stored."""
    rng = random.Random(seed)
    tensors = graph.all_tensors()
    free = {home.tensor for home in build_flow(graph, {}).homes}
    found = {}
    for name in sorted(free & tensors.keys()):
        t = tensors[name]
        if t.role not in ("parameter", "gradient") and "B" in t.dims and rng.random() < 0.9:
            found[name] = Spec(tuple(("x",) if d == "B" else () for d in t.dims))
    return found
