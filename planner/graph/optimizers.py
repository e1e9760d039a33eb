"""Optimizer updates as graph ops: SGD, momentum, Adam(W), Adafactor, with their states.

Every update is a few map ops over the (stacked) parameter, so its sharding, memory and time
follow from the same rules as everything else. Learning rates are constants: they change no cost.
"""

from __future__ import annotations

from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.graph.core import Tensor
from planner.model import Training

RATE = 1e-2  # any value: the plan does not depend on it
BETA1, BETA2, EPSILON, DECAY = 0.9, 0.99, 1e-8, 1e-2  # Kingma & Ba 2015; Loshchilov & Hutter 2019
MASTER = "f32"  # type of master copies, Micikevicius et al. 2018
CLIP = 1.0  # Adafactor's update clipping threshold d, Shazeer & Stern 2018, section 6
FACTORED_MIN = 128  # second moments are factored if two dimensions have at least this size (ibid.)


def update(b: Builder, training: Training, parameter: str, gradient: str) -> dict[str, str]:
    """Emits the update of `parameter`; returns aliases {new tensor: old tensor}."""
    rules = {
        "sgd": _sgd, "momentum": _momentum, "adam": _adam, "adamw": _adamw,
        "adafactor": _adafactor,
    }  # fmt: skip
    rule, p = rules[training.optimizer], b.lookup(parameter)
    if not training.master or p.dtype == MASTER:
        return rule(b, training, p, gradient)
    master = _state(b, f"{p.name}.master", p, MASTER, p.dims)
    aliases = rule(b, training, b.lookup(master), gradient)
    moved = next(new for new, old in aliases.items() if old == master)
    return {**aliases, _new(
        b, p.name, p.dims, [moved], {f"{p.name}.new": ex.x(0)}, [p.dtype], [p.role]
    )[0]: p.name}  # fmt: skip


def _state(b: Builder, name: str, like: Tensor, dtype: str, dims: tuple[str, ...]) -> str:
    shape = tuple(n for n, d in zip(like.shape, like.dims, strict=True) if d in dims)
    full = b.unique(name)
    b.inputs.append(full)
    return b.declare(Tensor(full, shape, dtype, dims, "state"))


def _new(b: Builder, name: str, dims: tuple[str, ...], operands: list[str], values: dict[str, ex.Expr], dtypes: list[str], roles: list[str]) -> list[str]:  # noqa: E501
    # By position: a gradient names its dimensions as the op does that the parameter went into.
    pairs = [(o, dims) for o in operands]
    names = list(values)
    b.map(
        name, pairs, dims, list(values.values()), dtypes=dtypes, names=names, roles=roles,
    )  # fmt: skip
    op = b.nodes[-1]
    return list(op.outs)


def _sgd(b: Builder, t: Training, p: Tensor, g: str) -> dict[str, str]:
    value = ex.sub(ex.x(0), ex.mul(ex.c(RATE), ex.x(1)))
    new = _new(b, p.name, p.dims, [p.name, g], {f"{p.name}.new": value}, [p.dtype], [p.role])
    return {new[0]: p.name}


def _momentum(b: Builder, t: Training, p: Tensor, g: str) -> dict[str, str]:
    m = _state(b, f"{p.name}.m", p, t.states, p.dims)
    moment = ex.add(ex.mul(ex.c(BETA1), ex.x(2)), ex.x(1))
    values = {
        f"{p.name}.new": ex.sub(ex.x(0), ex.mul(ex.c(RATE), moment)),
        f"{p.name}.m.new": moment,
    }
    dtypes, roles = [p.dtype, t.states], [p.role, "state"]
    new = _new(b, p.name, p.dims, [p.name, g, m], values, dtypes, roles)
    return {new[0]: p.name, new[1]: m}


def _adam(b: Builder, t: Training, p: Tensor, g: str, decay: float = 0.0) -> dict[str, str]:
    m = _state(b, f"{p.name}.m", p, t.states, p.dims)
    v = _state(b, f"{p.name}.v", p, t.states, p.dims)
    first = ex.add(ex.mul(ex.c(BETA1), ex.x(2)), ex.mul(ex.c(1 - BETA1), ex.x(1)))
    second = ex.add(ex.mul(ex.c(BETA2), ex.x(3)), ex.mul(ex.c(1 - BETA2), ex.square(ex.x(1))))
    step = ex.div(first, ex.add(ex.call("sqrt", second), ex.c(EPSILON)))
    if decay:
        step = ex.add(step, ex.mul(ex.c(decay), ex.x(0)))
    values = {
        f"{p.name}.new": ex.sub(ex.x(0), ex.mul(ex.c(RATE), step)),
        f"{p.name}.m.new": first,
        f"{p.name}.v.new": second,
    }
    roles = [p.role, "state", "state"]
    new = _new(b, p.name, p.dims, [p.name, g, m, v], values, [p.dtype, t.states, t.states], roles)
    return {new[0]: p.name, new[1]: m, new[2]: v}


def _adamw(b: Builder, t: Training, p: Tensor, g: str) -> dict[str, str]:
    return _adam(b, t, p, g, DECAY)


def factored_dims(p: Tensor) -> tuple[str, str] | None:
    """The two largest dimensions (stacked ones left out) if both are large enough to factor."""
    own = [
        (n, i, d) for i, (n, d) in enumerate(zip(p.shape, p.dims, strict=True))
        if d not in ("layers", "repeats")
    ]  # fmt: skip
    largest = sorted(own, key=lambda nid: (-nid[0], nid[1]))[:2]
    if len(largest) < 2 or largest[1][0] < FACTORED_MIN:
        return None
    first, second = sorted(largest, key=lambda nid: nid[1])
    return first[2], second[2]


def _adafactor(b: Builder, t: Training, p: Tensor, g: str) -> dict[str, str]:
    """Adafactor without momentum: factored second moments and update clipping by RMS."""
    dims = factored_dims(p)
    keep, scale = ex.c(BETA2), 1 - BETA2
    sq = ex.add(ex.square(ex.x(0)), ex.c(1e-30))  # ε₁ of the paper
    aliases: dict[str, str] = {}
    gp = [(g, p.dims)]

    def moment(name: str, over: tuple[str, ...]) -> str:
        kept = tuple(d for d in p.dims if d not in over)
        size = 1
        for n, d in zip(p.shape, p.dims, strict=True):
            size *= n if d in over else 1
        old = _state(b, f"{p.name}.{name}", p, t.states, kept)
        mean = b.map(
            f"{p.name}.{name}.mean", gp, kept, ex.mul(ex.c(scale / size), sq), dtype=t.states
        )
        value = ex.add(ex.mul(keep, ex.x(0)), ex.x(1))
        new = b.map(
            f"{p.name}.{name}.new", [(old, kept), (mean, kept)], kept, value,
            dtype=t.states, roles=["state"],
        )  # fmt: skip
        aliases[new] = old
        return new

    if dims is None:
        v = moment("v", ())
        operands = [(g, p.dims), (v, p.dims)]
        unit = ex.mul(ex.x(0), ex.call("rsqrt", ex.x(1)))
    else:
        row, col = moment("vr", (dims[1],)), moment("vc", (dims[0],))
        row_dims, col_dims = b.lookup(row).dims, b.lookup(col).dims
        rest = tuple(d for d in row_dims if d != dims[0])
        size = dict(zip(p.dims, p.shape, strict=True))[dims[0]]
        mean = b.map(
            f"{p.name}.vr.avg", [(row, row_dims)], rest, ex.div(ex.x(0), ex.c(size)),
            dtype=t.states,
        )  # fmt: skip
        operands = [(g, p.dims), (row, row_dims), (col, col_dims), (mean, rest)]
        ratio = ex.div(ex.mul(ex.x(1), ex.x(2)), ex.x(3))
        unit = ex.mul(ex.x(0), ex.call("rsqrt", ratio))
    own = tuple(d for d in p.dims if d in ("layers", "repeats"))
    count = p.elements
    for n, d in zip(p.shape, p.dims, strict=True):
        count //= n if d in own else 1
    rms = b.map(
        f"{p.name}.rms", operands, own, ex.div(ex.square(unit), ex.c(count)), dtype="f32"
    )
    clip = ex.call("max", ex.c(1.0), ex.div(ex.call("sqrt", ex.x(len(operands) + 1)), ex.c(CLIP)))
    moved = ex.sub(ex.x(len(operands)), ex.mul(ex.c(RATE), ex.div(unit, clip)))
    new = b.map(
        f"{p.name}.new", [*operands, (p.name, p.dims), (rms, own)], p.dims, moved,
        dtype=p.dtype, roles=[p.role],
    )  # fmt: skip
    aliases[new] = p.name
    return aliases
