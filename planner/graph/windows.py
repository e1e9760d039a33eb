"""Convolution, transposed convolution, pooling and upsampling as graph ops, with gradients.

A convolution is the trilinear form

    T(x, w, y) = sum of x[b, s·o + d·k - p, g, c] · w[k, c, g, n] · y[b, o, g, n]

(stride s, dilation d, padding p, groups g). Leaving out one of the three gives the three op
kinds: y is `conv`, x is `conv_dx` (also the transposed convolution), w is `conv_dw`. Their
gradients are each other, with the same factors in other kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.graph import expr as ex
from planner.graph.builder import Builder, GraphError, distinct
from planner.graph.core import Dims, Factor, Op, Rule, Tensor
from planner.graph.primitive import FactorList, axis_of, emit

PerDim = int | Sequence[int]
Padding = str | int | Sequence[int | Sequence[int]]

# kind → roles of its first operand, second operand, result in T(x, w, y)
ROLES = {"conv": ("x", "w", "y"), "conv_dx": ("y", "w", "x"), "conv_dw": ("x", "y", "w")}
KIND_OF_RESULT = {roles[2]: kind for kind, roles in ROLES.items()}


# ---- geometry ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One entry per spatial dimension. `spatial`: sizes of x; `taps`: of the window."""

    spatial: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def results(self) -> tuple[int, ...]:
        """Sizes of y: windows that fit into the padded x."""
        return tuple(
            (n + lo + hi - reach(k, d)) // s + 1
            for n, k, s, d, (lo, hi) in zip(
                self.spatial, self.taps, self.stride, self.dilation, self.padding, strict=True
            )
        )

    def attrs(self) -> dict[str, Any]:
        """What evaluation needs. Besides the window itself: `results`, and where in the padded x
        its `own` points begin, for every shard (`crops`; whole here, so there is one)."""
        return {
            **vars(self), "results": self.results, "own": self.spatial,
            "crops": tuple((low,) for low, _ in self.padding),
        }  # fmt: skip


def reach(taps: int, dilation: int) -> int:
    """Extent of a dilated window."""
    return (taps - 1) * dilation + 1


def _per_dim(name: str, what: str, value: PerDim, rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise GraphError(f"{name}: {rank} spatial dimensions, but {what} is {list(values)}")
    if min(values) < 1:
        raise GraphError(f"{name}: {what} {list(values)} must be at least 1")
    return values


def _explicit(name: str, padding: int | Sequence[Any], rank: int) -> tuple[tuple[int, int], ...]:
    entries = [padding] * rank if isinstance(padding, int) else list(padding)
    if len(entries) != rank:
        raise GraphError(f"{name}: {rank} spatial dimensions, but padding is {entries}")
    pairs = [(e, e) if isinstance(e, int) else tuple(e) for e in entries]
    if any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise GraphError(f"{name}: padding {pairs} must be pairs (low, high), none negative")
    return tuple((lo, hi) for lo, hi in pairs)


def _same(n: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """Padding such that ceil(n / stride) windows fit; the odd one is at the end, as in XLA."""
    total = max((-(-n // stride) - 1) * stride + reach(taps, dilation) - n, 0)
    return total // 2, total - total // 2


def _window(
    name: str, spatial: Sequence[int], taps: Sequence[int], stride: PerDim, dilation: PerDim,
    padding: Padding,
) -> Window:  # fmt: skip
    rank = len(taps)
    s = _per_dim(name, "stride", stride, rank)
    d = _per_dim(name, "dilation", dilation, rank)
    if padding == "same":
        pads = tuple(_same(*each) for each in zip(spatial, taps, s, d, strict=True))
    elif padding == "valid":
        pads = ((0, 0),) * rank
    elif isinstance(padding, str):
        raise GraphError(f"{name}: padding is 'same', 'valid' or pairs, not '{padding}'")
    else:
        pads = _explicit(name, padding, rank)
    window = Window(tuple(spatial), tuple(taps), s, d, pads)
    if min(window.results) < 1:
        raise GraphError(
            f"{name}: a window of {list(taps)} taps does not fit into {list(spatial)} "
            f"with padding {list(pads)}"
        )
    return window


def _transposed_window(
    name: str, inputs: Sequence[int], taps: Sequence[int], stride: PerDim, dilation: PerDim,
    padding: Padding,
) -> Window:  # fmt: skip
    """The window whose `results` are `inputs`: x of T is what the transposed op computes.

    Sizes as in Keras and JAX: "same" gives n·s, "valid" n·s + max(reach - s, 0); explicit
    padding takes away from (n - 1)·s + reach, as in PyTorch.
    """
    rank = len(taps)
    s = _per_dim(name, "stride", stride, rank)
    d = _per_dim(name, "dilation", dilation, rank)
    reaches = [reach(k, e) for k, e in zip(taps, d, strict=True)]
    if padding == "same":
        spatial = [n * e for n, e in zip(inputs, s, strict=True)]
    elif padding == "valid":
        spatial = [n * e + max(r - e, 0) for n, e, r in zip(inputs, s, reaches, strict=True)]
    elif isinstance(padding, str):
        raise GraphError(f"{name}: padding is 'same', 'valid' or pairs, not '{padding}'")
    else:
        pads = _explicit(name, padding, rank)
        spatial = [
            (n - 1) * e + r - lo - hi
            for n, e, r, (lo, hi) in zip(inputs, s, reaches, pads, strict=True)
        ]
    if min(spatial) < 1:
        raise GraphError(f"{name}: the result would have spatial sizes {spatial}")
    return _window(name, spatial, taps, s, d, padding)


# ---- convolution -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """Names of the dimensions of x, w and y for factors and results."""

    lead: tuple[str, ...]
    spatial: tuple[str, ...]
    taps: tuple[str, ...]
    x_channel: str
    y_channel: str


def conv(
    b: Builder,
    x: str,
    w: str,
    *,
    stride: PerDim = 1,
    dilation: PerDim = 1,
    padding: Padding = "same",
    groups: int = 1,
    name: str = "conv",
) -> str:
    """Convolution: x [B…, spatial…, C], w [taps…, C/groups, O] → [B…, out spatial…, O].

    `padding` is "same", "valid", or a number or pair (low, high) per dimension. The rank of w
    decides how many dimensions are spatial. groups = C is a depthwise convolution.
    """
    x, w = b.use(x), b.use(w)
    xt, wt = b.lookup(x), b.lookup(w)
    rank = _check_operands(name, xt, wt, groups)
    first = len(xt.shape) - rank - 1
    window = _window(name, xt.shape[first:-1], wt.shape[:rank], stride, dilation, padding)
    labels = _Labels(
        xt.dims[:first], xt.dims[first:-1], wt.dims[:rank], xt.dims[-1], wt.dims[-1]
    )
    form = _form(labels, xt.shape[:first], window, groups, wt.shape[-2], wt.shape[-1])
    shape = (*xt.shape[:first], *window.results, wt.shape[-1])
    dims = distinct((*labels.lead, *labels.spatial, labels.y_channel))
    return _emit_form(b, "y", {"x": x, "w": w}, form, Tensor(name, shape, b.compute, dims))


def conv_transpose(
    b: Builder,
    x: str,
    w: str,
    *,
    stride: PerDim = 1,
    dilation: PerDim = 1,
    padding: Padding = "same",
    groups: int = 1,
    name: str = "conv_transpose",
) -> str:
    """Transposed convolution: x [B…, spatial…, C], w [taps…, C/groups, O] → [B…, larger…, O].

    The adjoint of `conv` with the same stride, dilation and padding (PyTorch's and Keras'
    orientation of the taps); result sizes are those of `_transposed_window`.
    """
    x, w = b.use(x), b.use(w)
    xt, wt = b.lookup(x), b.lookup(w)
    rank = _check_operands(name, xt, wt, groups)
    first = len(xt.shape) - rank - 1
    window = _transposed_window(
        name, xt.shape[first:-1], wt.shape[:rank], stride, dilation, padding
    )
    labels = _Labels(
        xt.dims[:first], xt.dims[first:-1], wt.dims[:rank], wt.dims[-1], xt.dims[-1]
    )
    form = _form(
        labels, xt.shape[:first], window, groups, wt.shape[-1] // groups, xt.shape[-1], True
    )
    shape = (*xt.shape[:first], *window.spatial, wt.shape[-1])
    dims = distinct((*labels.lead, *labels.spatial, labels.x_channel))
    return _emit_form(b, "x", {"y": x, "w": w}, form, Tensor(name, shape, b.compute, dims))


def _check_operands(name: str, x: Tensor, w: Tensor, groups: int) -> int:
    """Number of spatial dimensions; GraphError unless x and w fit together."""
    rank = len(w.shape) - 2
    if rank < 1:
        raise GraphError(
            f"{name}: '{w.name}' {list(w.shape)} must be [taps…, channels / groups, features]"
        )
    if len(x.shape) < rank + 2:
        raise GraphError(
            f"{name}: '{w.name}' has {rank} spatial dimensions, so '{x.name}' {list(x.dims)} "
            f"needs at least {rank + 2}: batch, spatial, channels"
        )
    if groups < 1 or w.shape[-2] * groups != x.shape[-1]:
        raise GraphError(
            f"{name}: '{x.name}' has {x.shape[-1]} channels, "
            f"but '{w.name}' reads {w.shape[-2]} in each of {groups} groups"
        )
    if w.shape[-1] % groups:
        raise GraphError(f"{name}: {w.shape[-1]} features do not divide into {groups} groups")
    return rank


@dataclass(frozen=True)
class _Form:
    """T with sizes: its factors, the dimensions of x, w, y made of them, shared attributes."""

    factors: tuple[Factor, ...]
    dims: Mapping[str, Dims]
    windows: tuple[tuple[int, int], ...]
    attrs: Mapping[str, Any]


def _form(
    labels: _Labels,
    lead: Sequence[int],
    window: Window,
    groups: int,
    x_channels: int,
    y_channels: int,
    flipped: bool = False,
) -> _Form:
    """The form of one convolution; `x_channels` per group, `y_channels` altogether.

    `flipped`: w is [taps…, n, (g, c)] instead of [taps…, c, (g, n)].
    """
    found = FactorList()
    batch = [found.add(d, n) for d, n in zip(labels.lead, lead, strict=True)]
    group = [found.add("groups", groups)] if groups > 1 else []
    c = found.add(labels.x_channel, x_channels)
    n = found.add(labels.y_channel, y_channels // groups)
    inner = [
        found.add(d, size, "window")
        for d, size in zip(labels.spatial, window.spatial, strict=True)
    ]
    outer = [
        found.add(f"{d}.out", size, "window")
        for d, size in zip(labels.spatial, window.results, strict=True)
    ]
    taps = [
        found.add(d, size, "window") for d, size in zip(labels.taps, window.taps, strict=True)
    ]
    last = ((n,), (*group, c)) if flipped else ((c,), (*group, n))
    dims = {
        "x": (*_single(batch), *_single(inner), (*group, c)),
        "w": (*_single(taps), *last),
        "y": (*_single(batch), *_single(outer), (*group, n)),
    }
    attrs = {
        **window.attrs(), "flipped": flipped, "visits": (*batch, *group, c, n, *outer, *taps),
        "work": 0,  # all of it on the matrix unit
        "parts": {"b": (*group,), "c": (c,), "n": (n,), "rows": (*batch, *outer), "taps": (*taps,)},
    }  # fmt: skip
    return _Form(tuple(found.factors), dims, tuple(zip(inner, outer, strict=True)), attrs)


def _single(factors: Sequence[int]) -> Dims:
    return tuple((f,) for f in factors)


def _emit_form(
    b: Builder, result: str, operands: Mapping[str, str], form: _Form, out: Tensor
) -> str:
    """The op that computes `result` of T from the other two; `out` describes its tensor."""
    kind = KIND_OF_RESULT[result]
    first, second, _ = ROLES[kind]
    kept = {f for dim in form.dims[result] for f in dim}
    factors = tuple(
        replace(f, kind=f.kind if f.kind == "window" else "parallel" if i in kept else "reduce")
        for i, f in enumerate(form.factors)
    )
    parts = form.attrs["parts"]
    m, n, k = {
        "y": (parts["rows"], parts["n"], (*parts["c"], *parts["taps"])),
        "x": (parts["rows"], parts["c"], (*parts["n"], *parts["taps"])),
        "w": ((*parts["c"], *parts["taps"]), parts["n"], parts["rows"]),
    }[result]
    rule = Rule(
        factors, (form.dims[first], form.dims[second]), (form.dims[result],), ((0,), (1,)),
        windows=form.windows,
    )  # fmt: skip
    attrs = {**form.attrs, "matmul": (parts["b"], m, n, k)}
    return emit(b, kind, (operands[first], operands[second]), [out], rule, attrs)[0]


def _conv_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    first, second, result = ROLES[op.kind]
    dims = {first: op.rule.ins[0], second: op.rule.ins[1], result: op.rule.outs[0]}
    values = {first: op.ins[0], second: op.ins[1], result: cotangents[op.outs[0]]}
    form = _Form(op.rule.factors, dims, op.rule.windows, op.attrs)
    roles = (first, second)
    return {j: _emit_form(b, roles[j], values, form, _gradient(b, op.ins[j])) for j in wanted}


def _gradient(b: Builder, of: str) -> Tensor:
    target = b.lookup(of)
    return replace(target, name=f"{of}.grad", role="activation")


# ---- pooling and upsampling ------------------------------------------------------------------


def max_pool(
    b: Builder, x: str, *, window: PerDim, stride: PerDim | None = None,
    padding: Padding = "valid", spatial: int | None = None, name: str = "max_pool",
) -> str:  # fmt: skip
    """Maximum over windows: x [B…, spatial…, C]; `stride` defaults to `window`.

    All dimensions between the first and the last are spatial unless `spatial` says how many.
    Of equal maxima the first one gets the gradient, as in XLA's select-and-scatter.
    """
    return _pool(b, "max_pool", x, window, stride, padding, spatial, name)


def avg_pool(
    b: Builder, x: str, *, window: PerDim, stride: PerDim | None = None,
    padding: Padding = "valid", spatial: int | None = None, name: str = "avg_pool",
) -> str:  # fmt: skip
    """Mean over windows; padding counts as zeros. Arguments as for `max_pool`."""
    return _pool(b, "avg_pool", x, window, stride, padding, spatial, name)


def global_avg_pool(b: Builder, x: str, name: str = "global_avg_pool") -> str:
    """Mean over all spatial dimensions: [B, spatial…, C] → [B, C]."""
    t = b.lookup(x)
    count = 1
    for size in t.shape[1:-1]:
        count *= size
    labels = distinct(t.dims)
    value = ex.div(ex.x(0), ex.c(count))
    return b.map(name, [(x, labels)], (labels[0], labels[-1]), value)


def _pool(
    b: Builder, kind: str, x: str, taps: PerDim, stride: PerDim | None, padding: Padding,
    spatial: int | None, name: str,
) -> str:  # fmt: skip
    x = b.use(x)
    t = b.lookup(x)
    rank = len(t.shape) - 2 if spatial is None else spatial
    if rank < 1 or len(t.shape) < rank + 2:
        raise GraphError(f"{name}: '{x}' {list(t.dims)} is not [batch, spatial…, channels]")
    first = len(t.shape) - rank - 1
    sizes = _per_dim(name, "window", taps, rank)
    w = _window(
        name, t.shape[first:-1], sizes, sizes if stride is None else stride, 1, padding
    )
    found = FactorList()
    lead = [found.add(d, n) for d, n in zip(t.dims[:first], t.shape[:first], strict=True)]
    channel = found.add(t.dims[-1], t.shape[-1])
    named = list(zip(t.dims[first:-1], w.spatial, w.results, w.taps, strict=True))
    inner = [found.add(d, n, "window") for d, n, _, _ in named]
    outer = [found.add(f"{d}.out", n, "window") for d, _, n, _ in named]
    window = [found.add(f"{d}.tap", n, "window") for d, _, _, n in named]
    combiner, linear = ("max", ()) if kind == "max_pool" else ("sum", ((0,),))
    rule = Rule(
        tuple(found.factors), (_single((*lead, *inner, channel)),),
        (_single((*lead, *outer, channel)),), linear, combiner,
        tuple(zip(inner, outer, strict=True)),
    )  # fmt: skip
    shape = (*t.shape[:first], *w.results, t.shape[-1])
    attrs = {**w.attrs(), "visits": (*lead, channel, *outer, *window), "work": 1}
    return emit(b, kind, (x,), [Tensor(name, shape, t.dtype, t.dims)], rule, attrs)[0]


def _max_pool_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    """x, its maxima and their cotangents → cotangents at the places of the maxima."""
    ins = (op.ins[0], op.outs[0], cotangents[op.outs[0]])
    x, y = op.rule.ins[0], op.rule.outs[0]
    rule = Rule(op.rule.factors, (x, y, y), (x,), ((2,),), windows=op.rule.windows)
    out = _gradient(b, op.ins[0])
    return {0: emit(b, "max_pool_dx", ins, [out], rule, op.attrs)[0]}


def shift(
    b: Builder, x: str, dim: int | str, by: int, name: str = "shift", wrap: bool = False
) -> str:
    """x moved by `by` places along one dimension; zeros come in where nothing does, with `wrap`
    what goes out at the other end."""
    axis, t = axis_of(b, name, x, dim), b.lookup(x)
    w = Window((t.shape[axis],), (1,), (1,), (1,), ((by, -by),))
    found = FactorList()
    own = [
        found.add(d, n, "window" if i == axis else "parallel")
        for i, (d, n) in enumerate(zip(t.dims, t.shape, strict=True))
    ]
    outer = found.add(f"{t.dims[axis]}.out", t.shape[axis], "window")
    moved = [outer if i == axis else f for i, f in enumerate(own)]
    rule = Rule(
        tuple(found.factors), (_single(own),), (_single(moved),), ((0,),),
        windows=((own[axis], outer),),
    )  # fmt: skip
    attrs = {
        **w.attrs(), "visits": tuple(moved), "work": 0, "axis": axis, "by": by, "wrap": wrap,
    }  # fmt: skip
    return emit(b, "shift", (x,), [replace(t, name=name, role="activation")], rule, attrs)[0]


def _shift_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    a, name = op.attrs, f"{op.ins[0]}.grad"
    return {0: shift(b, cotangents[op.outs[0]], a["axis"], -a["by"], name, a["wrap"])}


def upsample(b: Builder, x: str, *, factor: PerDim, name: str = "upsample") -> str:
    """Nearest-neighbour upsampling: x [B, spatial…, C] → every point repeated `factor` times."""
    x = b.use(x)
    t = b.lookup(x)
    if len(t.shape) < 3:
        raise GraphError(f"{name}: '{x}' {list(t.dims)} is not [batch, spatial…, channels]")
    times = _per_dim(name, "factor", factor, len(t.shape) - 2)
    found = FactorList()
    own = [found.add(d, n) for d, n in zip(t.dims, t.shape, strict=True)]
    again = [
        found.add(f"{d}.again", n, "blocked") for d, n in zip(t.dims[1:-1], times, strict=True)
    ]
    dims = ((own[0],), *zip(own[1:-1], again, strict=True), (own[-1],))
    shape = (t.shape[0], *(n * k for n, k in zip(t.shape[1:-1], times, strict=True)), t.shape[-1])
    rule = Rule(tuple(found.factors), (_single(own),), (dims,), ((0,),))
    attrs = {"times": times, "visits": (*own, *again), "work": 0}
    return emit(b, "upsample", (x,), [Tensor(name, shape, t.dtype, t.dims)], rule, attrs)[0]


# Linear ops with one operand, and the ops that are their adjoints.
ADJOINTS = {
    "avg_pool": "avg_pool_dx", "avg_pool_dx": "avg_pool",
    "upsample": "upsample_dx", "upsample_dx": "upsample",
}  # fmt: skip


def _adjoint_vjp(
    b: Builder, op: Op, cotangents: Mapping[str, str], wanted: Sequence[int]
) -> dict[int, str]:
    rule = replace(op.rule, ins=op.rule.outs, outs=op.rule.ins)
    ins = (cotangents[op.outs[0]],)
    return {0: emit(b, ADJOINTS[op.kind], ins, [_gradient(b, op.ins[0])], rule, op.attrs)[0]}


Vjp = Callable[[Builder, Op, Mapping[str, str], Sequence[int]], dict[int, str]]
VJPS: dict[str, Vjp] = {
    **dict.fromkeys(ROLES, _conv_vjp),
    **dict.fromkeys(ADJOINTS, _adjoint_vjp),
    "max_pool": _max_pool_vjp,
    "shift": _shift_vjp,
}
