"""The functions of the op language: one Python function each, by name in FUNCTIONS.

The signature says what `compile.py` passes (annotations are the kinds of KINDS), the docstring
is what the documentation prints. Each turns wrong ranks into GraphError before it builds; what
an op means stays in planner.graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from planner.graph import expr as ex
from planner.graph import layers, structural, windows
from planner.graph.builder import Builder, GraphError, distinct
from planner.graph.core import Op
from planner.graph.core import Tensor as GraphTensor
from planner.graph.primitive import axis_of
from planner.modelfile.scalars import number_of
from planner.modelfile.sizes import DTYPES, Dims, SizeError, as_size, evaluate

# Kinds of arguments. Tensors come by name, ready to be read in the compute type.
Tensor = str
Ids = str  # a tensor of whole numbers
Operand = str | int | float  # a tensor or a number
Text = str
Size = int
Number = int | float
Flag = bool
Dim = str | int  # name or number of a dimension
DimList = str | Sequence[str]  # "S D" or [S, D]
Order = str | Sequence[str | int]
PerDim = int | Sequence[int]  # one number for all spatial dimensions, or a list
Padding = str | int | Sequence[Any]
Result = str | tuple[str, str]


@dataclass(frozen=True)
class Context:
    """Where a call builds: the scope, the name of its result, the dims of the file."""

    b: Builder
    name: str
    dims: Dims

    def tensor(self, name: str) -> GraphTensor:
        return self.b.lookup(name)


@dataclass(frozen=True)
class Argument:
    name: str
    kind: str
    required: bool
    several: bool = False
    optional: bool = False  # None is a value


@dataclass(frozen=True)
class Function:
    name: str
    call: Callable[..., Result]
    arguments: tuple[Argument, ...]
    results: int

    @property
    def signature(self) -> str:
        parameters = list(inspect.signature(self.call).parameters.values())[1:]
        shown = [str(p.replace(annotation=p.empty)) for p in parameters]
        return f"{self.name}({', '.join(shown)})"

    @property
    def summary(self) -> str:
        return " ".join((self.call.__doc__ or "").split())


FUNCTIONS: dict[str, Function] = {}


def function(
    name: str, results: int = 1
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    def register(call: Callable[..., Result]) -> Callable[..., Result]:
        parameters = list(inspect.signature(call).parameters.values())[1:]
        FUNCTIONS[name] = Function(name, call, tuple(map(_argument, parameters)), results)
        return call

    return register


def _argument(p: inspect.Parameter) -> Argument:
    kind = str(p.annotation).removesuffix(" | None")
    optional = kind != p.annotation
    several = p.kind is p.VAR_POSITIONAL
    return Argument(p.name, kind, p.default is p.empty and not several, several, optional)


def _need_rank(c: Context, what: str, x: str, *ranks: int) -> None:
    rank = len(c.tensor(x).shape)
    if rank not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise GraphError(
            f"{what} has {rank} dimensions {list(c.tensor(x).dims)}, it needs {wanted}"
        )


def _need_dims(c: Context, x: str, least: int = 1) -> None:
    t = c.tensor(x)
    if len(t.shape) < least:
        raise GraphError(f"'{x}' {list(t.dims)} needs at least {least} dimensions")


def _named(c: Context, result: str) -> str:
    """`result` of the op just built, under the name that the file gives it (constraints and
    annotations use that one)."""
    name = c.b.unique(c.name)
    op = c.b.nodes.pop()
    if not isinstance(op, Op) or op.outs != (result,):
        raise GraphError(f"'{result}' is not the result of the last op")
    c.b.nodes.append(replace(op, name=name, outs=(name,)))
    c.b.declare(replace(c.b.tensors.pop(result), name=name))
    return name


# ---- products and look-ups --------------------------------------------------------------------


@function("einsum")
def einsum(c: Context, spec: Text, *tensors: Tensor) -> Result:
    """Products summed over the dimensions that the result lacks: "B S D, D F -> B S F"."""
    return c.b.einsum(spec, *tensors, name=c.name)


@function("gather")
def gather(c: Context, table: Tensor, ids: Ids) -> Result:
    """Rows of `table` [V, D] for whole numbers `ids` […]: an embedding; result […, D]."""
    _need_rank(c, "the table", table, 2)
    out = distinct((*c.tensor(ids).dims, c.tensor(table).dims[-1]))
    return layers.embedding(c.b, table, ids, out, name=c.name)


@function("embedding")
def embedding(c: Context, table: Tensor, ids: Ids) -> Result:
    """Another name of gather."""
    return gather(c, table, ids)


@function("one_hot")
def one_hot(c: Context, ids: Ids, dim: Text) -> Result:
    """1 where the index along the new last dimension `dim` (a dim of the file) equals the id."""
    t = c.tensor(ids)
    labels = distinct((*t.dims, dim))
    try:
        size = evaluate(dim, c.dims)
    except SizeError as error:
        raise GraphError(error.message) from None
    value = ex.call("eq", ex.x(0), ex.index(labels[-1]))
    return c.b.map(c.name, [(ids, labels[:-1])], labels, value, sizes={labels[-1]: size})


@function("attention")
def attention(c: Context, q: Tensor, k: Tensor, v: Tensor, causal: Flag = False) -> Result:
    """softmax(q·kᵀ/√H)·v for q [B, S, N, H] and k, v [B, T, N, H]. Grouped queries: q is
    [B, S, K, G, H], k and v [B, T, K, H]; one head of keys for all: k and v are [B, T, H]."""
    _need_rank(c, "q", q, 4, 5)
    grouped = len(c.tensor(q).shape) == 5
    for what, x in (("k", k), ("v", v)):
        _need_rank(c, what, x, 4 if grouped else len(c.tensor(k).shape), 4)
    _need_rank(c, "k", k, *((4,) if grouped else (3, 4)))
    return _named(c, layers.attention(c.b, q, k, v, causal=causal, name=c.name, grouped=grouped))


# ---- elementwise --------------------------------------------------------------------------------


def _pointwise(c: Context, value: Callable[..., ex.Expr], *operands: Operand) -> str:
    """`value` of the operands, numbers as constants; whole numbers stay whole."""
    tensors = [o for o in operands if isinstance(o, str)]
    places = iter(range(len(tensors)))
    parts = [ex.x(next(places)) if isinstance(o, str) else ex.c(o) for o in operands]
    whole = all(c.tensor(t).dtype.startswith("i") for t in tensors)
    dtype = "i32" if whole and all(isinstance(o, int | str) for o in operands) else None
    return c.b.pointwise(c.name, value(*parts), *tensors, dtype=dtype)


OPERATORS: dict[str, Callable[[ex.Expr, ex.Expr], ex.Expr]] = {
    "+": ex.add, "-": ex.sub, "*": ex.mul, "/": ex.div,
}  # fmt: skip


def operate(c: Context, operator: str, left: Operand, right: Operand) -> str:
    """`left operator right`, at least one of them a tensor."""
    if operator == "**" and right == 2 and isinstance(left, str):
        return _pointwise(c, ex.square, left)
    if operator not in OPERATORS:
        raise GraphError(f"'{operator}' is for numbers; tensors have + - * / and **2")
    if operator == "/" and right == 0:
        raise GraphError("division by zero")
    return _pointwise(c, OPERATORS[operator], left, right)


def negative(c: Context, x: str) -> str:
    return _pointwise(c, ex.neg, x)


_ELEMENTWISE: dict[str, tuple[Callable[[ex.Expr], ex.Expr], str]] = {
    "exp": (lambda a: ("exp", a), "eˣ"),
    "log": (lambda a: ("log", a), "natural logarithm"),
    "tanh": (lambda a: ("tanh", a), "hyperbolic tangent"),
    "sqrt": (lambda a: ("sqrt", a), "square root"),
    "rsqrt": (lambda a: ("rsqrt", a), "1 / square root"),
    "sigmoid": (lambda a: ("sigmoid", a), "1 / (1 + e⁻ˣ)"),
    "gelu": (lambda a: ("gelu", a), "GELU, tanh approximation"),
    "silu": (ex.silu, "x · sigmoid(x), also called swish"),
    "relu": (ex.relu, "max(x, 0)"),
    "abs": (lambda a: ("abs", a), "absolute value"),
    "sign": (lambda a: ("sign", a), "-1, 0 or 1"),
    "floor": (lambda a: ("floor", a), "largest whole number that is not greater"),
    "square": (ex.square, "x · x"),
    "stop_gradient": (lambda a: ("stop", a), "x, but no gradient passes through"),
}


def _register_elementwise(name: str, value: Callable[[ex.Expr], ex.Expr], text: str) -> None:
    def call(c: Context, x: Tensor) -> Result:
        return _pointwise(c, value, x)

    call.__doc__ = f"{text}, elementwise."
    function(name)(call)


for _name, (_value, _text) in _ELEMENTWISE.items():
    _register_elementwise(_name, _value, _text)


@function("maximum")
def maximum(c: Context, x: Operand, y: Operand) -> Result:
    """The larger of the two, elementwise."""
    return _pointwise(c, lambda a, b: ("max", a, b), x, y)


@function("minimum")
def minimum(c: Context, x: Operand, y: Operand) -> Result:
    """The smaller of the two, elementwise."""
    return _pointwise(c, lambda a, b: ("min", a, b), x, y)


@function("equal")
def equal(c: Context, x: Operand, y: Operand) -> Result:
    """1 where x = y, else 0."""
    return _pointwise(c, lambda a, b: ("eq", a, b), x, y)


@function("greater")
def greater(c: Context, x: Operand, y: Operand) -> Result:
    """1 where x > y, else 0."""
    return _pointwise(c, lambda a, b: ("gt", a, b), x, y)


@function("where")
def where(c: Context, condition: Operand, x: Operand, y: Operand) -> Result:
    """x where the condition is not 0, else y."""
    return _pointwise(c, lambda p, a, b: ("where", p, a, b), condition, x, y)


@function("cast")
def cast(c: Context, x: Tensor, dtype: Text) -> Result:
    """x in another type: "f32", "bf16", "f16"."""
    if dtype not in DTYPES or dtype.startswith("i"):
        raise GraphError(f"'{dtype}' is none of the types f32, bf16, f16")
    return c.b.cast(x, dtype, c.name)


# ---- norms, softmax, losses -----------------------------------------------------------------


@function("layer_norm")
def layer_norm(c: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Result:
    """Layer norm over the last dimension; scale and bias have just that one."""
    _need_dims(c, x)
    return layers.layer_norm(c.b, x, scale, bias, c.name)


@function("rms_norm")
def rms_norm(c: Context, x: Tensor, scale: Tensor) -> Result:
    """x / root mean square over the last dimension, times scale."""
    _need_dims(c, x)
    return layers.rms_norm(c.b, x, scale, c.name)


@function("group_norm")
def group_norm(
    c: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None, groups: Size = 32
) -> Result:
    """Norm over spatial dimensions and groups of channels; x [B, spatial…, C]."""
    _need_dims(c, x, 2)
    return _named(c, layers.group_norm(c.b, x, scale, bias, groups, f"{c.name}.norm"))


@function("batch_norm")
def batch_norm(c: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Result:
    """Norm of every channel (last dimension) over the batch and all positions."""
    _need_dims(c, x)
    return layers.batch_norm(c.b, x, scale, bias, c.name)


@function("softmax")
def softmax(c: Context, x: Tensor, over: Dim = -1, causal: DimList | None = None) -> Result:
    """softmax over one dimension; causal=[S, T] hides keys T that come after the query S."""
    dims = c.tensor(x).dims
    label = dims[axis_of(c.b, c.name, x, over)]
    pair = _labels(causal) if causal is not None else None
    if pair is not None and (len(pair) != 2 or not set(pair) <= set(dims)):
        raise GraphError(f"causal names two dimensions of '{x}' {list(dims)}, not {list(pair)}")
    mask = (pair[0], pair[1]) if pair else None
    return layers.softmax(c.b, x, label, c.name, mask)


@function("cross_entropy")
def cross_entropy(c: Context, logits: Tensor, targets: Ids) -> Result:
    """Mean over all positions of −log softmax(logits)[target]; logits […, V], targets […]."""
    _need_dims(c, logits)
    return layers.cross_entropy(c.b, logits, targets, c.name)


# ---- reductions -----------------------------------------------------------------------------


def _labels(given: DimList) -> tuple[str, ...]:
    return tuple(given.replace(",", " ").split()) if isinstance(given, str) else tuple(given)


def _reduced(
    c: Context, x: str, over: DimList | None, combiner: str, divide: bool = False
) -> str:
    t = c.tensor(x)
    dims = distinct(t.dims)
    gone = dims if over is None else _labels(over)
    missing = [d for d in gone if d not in dims]
    if missing:
        raise GraphError(f"'{x}' {list(dims)} has no dimension '{missing[0]}'")
    kept = [d for d in dims if d not in gone]
    count = prod(n for d, n in zip(dims, t.shape, strict=True) if d in gone)
    value = ex.div(ex.x(0), ex.c(count)) if divide else ex.x(0)
    dtype = None if kept else "f32"  # a scalar is most likely (part of) the loss
    return c.b.map(c.name, [(x, dims)], kept, value, combiner=combiner, dtype=dtype)


@function("sum")
def sum_(c: Context, x: Tensor, over: DimList | None = None) -> Result:
    """Sum over the dimensions named (all if none are)."""
    return _reduced(c, x, over, "sum")


@function("mean")
def mean(c: Context, x: Tensor, over: DimList | None = None) -> Result:
    """Mean over the dimensions named (all if none are)."""
    return _reduced(c, x, over, "sum", divide=True)


@function("max")
def max_(c: Context, x: Tensor, over: DimList | None = None) -> Result:
    """Largest entry over the dimensions named (all if none are)."""
    return _reduced(c, x, over, "max")


# ---- moving data ------------------------------------------------------------------------------


@function("reshape")
def reshape(c: Context, x: Tensor, dims: DimList) -> Result:
    """x in row-major order as "B S N H": every word a dim of the file, a number, `name=size`,
    or `name=-1` for what is left."""
    sizes, labels = [], []
    for word in _labels(dims):
        name, _, size = word.partition("=")
        labels.append(name)
        sizes.append(-1 if size == "-1" else _size(c, size or name))
    return structural.reshape(c.b, x, sizes, distinct(labels), c.name)


def _size(c: Context, text: str) -> int:
    number = number_of(text)
    try:
        return as_size(number, text) if number is not None else evaluate(text, c.dims)
    except SizeError as error:
        raise GraphError(error.message) from None


@function("transpose")
def transpose(c: Context, x: Tensor, order: Order) -> Result:
    """x with its dimensions in the order "B N S H", or by number [0, 2, 1, 3]."""
    at = _labels(order) if isinstance(order, str) else list(order)
    return structural.transpose(c.b, x, at, c.name)


@function("concat")
def concat(c: Context, *tensors: Tensor, dim: Dim = -1, label: Text | None = None) -> Result:
    """The tensors one after the other along `dim`, which may get a new name."""
    return structural.concat(c.b, tensors, dim, label, c.name)


@function("slice")
def slice_(
    c: Context, x: Tensor, dim: Dim, start: Number, stop: Number, step: Size = 1,
    label: Text | None = None,
) -> Result:  # fmt: skip
    """x[start:stop:step] along `dim`; negative bounds count from the end."""
    low, high = _whole("start", start), _whole("stop", stop)
    return structural.slice_dim(c.b, x, dim, low, high, step, label, c.name)


def _whole(what: str, value: Number) -> int:
    if value != int(value):
        raise GraphError(f"{what} is {value:g}, no whole number")
    return int(value)


@function("pad")
def pad(
    c: Context, x: Tensor, dim: Dim, low: Number, high: Number, value: Number = 0,
    interior: Number = 0, label: Text | None = None,
) -> Result:  # fmt: skip
    """`low` and `high` entries of `value` before and after x along `dim`, `interior` between."""
    counts = [_whole(w, n) for w, n in (("low", low), ("high", high), ("interior", interior))]
    return structural.pad(
        c.b, x, dim, counts[0], counts[1], float(value), counts[2], label, c.name
    )


@function("cumsum")
def cumsum(
    c: Context, x: Tensor, dim: Dim = -1, reverse: Flag = False, exclusive: Flag = False
) -> Result:
    """Running sums along `dim`."""
    return structural.cumsum(c.b, x, dim, reverse=reverse, exclusive=exclusive, name=c.name)


@function("sort", results=2)
def sort(c: Context, x: Tensor, dim: Dim = -1, descending: Flag = False) -> Result:
    """x sorted along `dim`, and the positions its entries come from: `y, places = sort(x)`."""
    return structural.sort(c.b, x, dim, descending=descending, name=c.name)


@function("top_k", results=2)
def top_k(c: Context, x: Tensor, k: Size, dim: Dim = -1, label: Text | None = None) -> Result:
    """The k largest entries along `dim`, and their positions: `y, places = top_k(x, k=2)`."""
    return structural.top_k(c.b, x, k, dim, label, c.name)


# ---- windows -----------------------------------------------------------------------------------


@function("conv")
def conv(
    c: Context, x: Tensor, w: Tensor, stride: PerDim = 1, dilation: PerDim = 1,
    padding: Padding = "same", groups: Size = 1,
) -> Result:  # fmt: skip
    """Convolution: x [B, spatial…, C], w [taps…, C/groups, O] → [B, spatial…, O]; padding is
    "same", "valid", a number or a list of numbers or pairs."""
    return windows.conv(
        c.b, x, w, stride=stride, dilation=dilation, padding=padding, groups=groups, name=c.name
    )


@function("conv_transpose")
def conv_transpose(
    c: Context, x: Tensor, w: Tensor, stride: PerDim = 1, dilation: PerDim = 1,
    padding: Padding = "same", groups: Size = 1,
) -> Result:  # fmt: skip
    """Transposed convolution (a larger result); arguments as for conv."""
    return windows.conv_transpose(
        c.b, x, w, stride=stride, dilation=dilation, padding=padding, groups=groups, name=c.name
    )


@function("max_pool")
def max_pool(
    c: Context, x: Tensor, window: PerDim, stride: PerDim | None = None, padding: Padding = "valid"
) -> Result:
    """Maximum over windows of the spatial dimensions; stride is the window if left out."""
    return windows.max_pool(c.b, x, window=window, stride=stride, padding=padding, name=c.name)


@function("avg_pool")
def avg_pool(
    c: Context, x: Tensor, window: PerDim, stride: PerDim | None = None, padding: Padding = "valid"
) -> Result:
    """Mean over windows of the spatial dimensions; padding counts as zeros."""
    return windows.avg_pool(c.b, x, window=window, stride=stride, padding=padding, name=c.name)


@function("global_avg_pool")
def global_avg_pool(c: Context, x: Tensor) -> Result:
    """Mean over all spatial dimensions: [B, spatial…, C] → [B, C]."""
    _need_dims(c, x, 3)
    return windows.global_avg_pool(c.b, x, c.name)


@function("upsample")
def upsample(c: Context, x: Tensor, factor: PerDim) -> Result:
    """Every point repeated `factor` times in every spatial dimension."""
    return windows.upsample(c.b, x, factor=factor, name=c.name)
