"""One forward op as JAX statements: `map` expressions, data movement, convolution, pooling.

Every writer takes an `OpText` and returns assignments; loops, sharding and the rest of the file
belong to `jax_program.py`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod

from planner.export.jax_expr import JNP_DTYPES, WEAK, Writer, number, partition
from planner.export.placement import Copy, Gradient
from planner.graph import expr as ex
from planner.graph.core import Dims, Op, Tensor
from planner.graph.layers import MASKED
from planner.sharding.spec import Spec


class ExportError(ValueError):
    """A graph that this exporter cannot write."""


@dataclass(frozen=True)
class Assignment:
    """`targets = code`, for the results numbered `outs` of the op."""

    outs: tuple[int, ...]
    code: str


@dataclass(frozen=True)
class OpText:
    """An op with the tensors around it and the variables that hold its operands and results.

    `gradients`: of a product's operands, how they are made; `together`: one after the other;
    `first`: that of this operand before the other. Such a product takes its operands as they lie
    (`plain`) and reads `copies` of them. `label`: as what softmax saves its result. `sliced`: a
    convolution or a pooling by the program's own function for few samples. `common`: operands that
    groups of devices have in common."""

    op: Op
    names: Sequence[str]
    targets: Sequence[str]
    ins: Sequence[Tensor]
    outs: Sequence[Tensor]
    plain: Sequence[str] = ()
    copies: Sequence[Copy | None] = ()
    gradients: Sequence[Gradient | None] = ()
    together: bool = False
    first: str | None = None
    label: str | None = None
    sliced: bool = False
    common: Collection[str] = ()


def statements(text: OpText) -> list[Assignment]:
    """The assignments that compute the op's results."""
    writer = WRITERS.get(text.op.kind)
    if writer is None:
        raise ExportError(f"'{text.op.name}': a forward pass has no op '{text.op.kind}'")
    return writer(text)


def _one(code: str) -> list[Assignment]:
    return [Assignment((0,), code)]


# ---- map: contractions, elementwise expressions, reductions --------------------------------------


def _map(t: OpText) -> list[Assignment]:
    if t.op.attrs.get("onehot") == "take":
        return _one(_as(_lookup(t), t, 0))
    if t.op.attrs.get("onehot") == "choose":
        return _one(f"chosen_round({t.names[0]}, {t.names[1]}, {t.op.attrs['turns']})")
    if t.op.attrs.get("vjp") == "softmax":
        return _one(_softmax(t))
    found = [Assignment((k,), _map_result(t, k)) for k in range(len(t.outs))]
    if t.op.attrs.get("stop"):
        return [Assignment(a.outs, f"lax.stop_gradient({a.code})") for a in found]
    return found


def _lookup(t: OpText) -> str:
    table, indices = t.names[:2]
    given = t.gradients[0] if t.gradients else None
    if given is None:
        return f'jnp.take({table}, {indices}, axis=0, mode="clip")'
    read, made = (partition(spec) for spec in (*given.other, given.made) if spec is not None)
    return f"lookup({table}, {indices}, {read}, {made}, mesh)"


def _map_result(t: OpText, k: int) -> str:
    e = t.op.attrs["exprs"][k]
    einsum = _einsum(t, e, k)
    return einsum if einsum is not None else _spread(t, e, k)


def _einsum(t: OpText, e: ex.Expr, k: int) -> str | None:
    """A sum of products of several operands, times constants; None if it is something else."""
    rule = t.op.rule
    used = ex.product_of(e)
    reduced = [i for i, f in enumerate(rule.factors) if (i,) not in rule.outs[k]]
    if rule.combiner != "sum" or not reduced or used is None or len(set(used)) < 2:
        return None
    if len(set(used)) < len(used) or any((i,) not in rule.ins[j] for i in reduced for j in used):
        return None
    covered = {d for j in used for d in rule.ins[j]}
    if any(d not in covered for d in rule.outs[k]):
        return None
    letters = _letters([f.name for f in rule.factors])
    orders = _operand_orders(t, used, k)
    sides = ["".join(letters[d] for d in order) for order in orders]
    spec = f"{','.join(sides)}->{''.join(letters[d[0]] for d in rule.outs[k])}"
    dtypes = {t.ins[j].dtype for j in used}
    wide = t.outs[k].dtype
    prefer = "" if dtypes == {wide} else f", preferred_element_type={JNP_DTYPES[wide]}"
    told = any(t.gradients) or t.together or t.first or t.common
    own = len(used) == 2 and not prefer and told
    arrays = ", ".join(
        _transposed((t.plain if own else t.names)[j], [d[0] for d in rule.ins[j]], order)
        for j, order in zip(used, orders, strict=True)
    )
    code = f'jnp.einsum("{spec}", {arrays}{prefer})'
    if own:
        code = f'product("{spec}", {arrays}, {_back(t, used, orders)})'
    scale = constant_of(e)
    return code if scale == 1 else f"{code} * {number(scale)}"


def _back(t: OpText, used: Sequence[int], orders: Sequence[Sequence[int]]) -> str:
    """How the operands of a product are read and their gradients made, as arguments of
    `product`."""
    rows, read = [], []
    for k, j in enumerate(used):
        given, copy = t.gradients[j], t.copies[j]
        other = used[1 - k]
        mine = _reordered(t.op.rule.ins[j], orders[k])
        others = _reordered(t.op.rule.ins[other], orders[1 - k])
        read.append("None" if copy is None else _places((*copy.way, copy.spec), mine))
        if given is None:
            bound = copy is not None and copy.bound
            made = read[-1] if copy is None else _place(copy.gradient or copy.spec, mine)
            rows.append(f"(None, None, {made})" if bound else "None")
            continue
        passed = (given.made, *given.way, given.home)
        places = [
            _places(given.cotangent, range(len(t.outs[0].shape))),
            _places(given.other, others),
            *(_place(spec, mine) for spec in passed if spec is not None),
        ]  # fmt: skip
        rows.append(f"({', '.join(places)})")
    code = f"({', '.join(rows)})"
    if any(t.copies[j] for j in used):
        code += f", reads=({', '.join(read)})"
    if t.first is not None:
        code += f", first={[t.op.ins[j] for j in used].index(t.first)}"
    for k, j in enumerate(used):
        code += f", common={k}" if t.op.ins[j] in t.common else ""
    return f"{code}, together=True" if t.together else code


def _places(specs: Sequence[Spec | None], order: Sequence[int]) -> str:
    """A place, or several that follow each other."""
    places = [_place(spec, order) for spec in specs if spec is not None]
    return f"({', '.join(places)})" if len(places) > 1 else (places or ["None"])[0]


def _place(spec: Spec | None, order: Sequence[int]) -> str:
    return "None" if spec is None else partition(Spec(tuple(spec.dims[i] for i in order)))


def _reordered(dims: Dims, order: Sequence[int]) -> list[int]:
    """Positions of an operand's dimensions in the order in which a product reads them."""
    plain = [d[0] for d in dims]
    return [plain.index(f) for f in order]


def _operand_orders(t: OpText, used: Sequence[int], k: int) -> list[list[int]]:
    """Factors of the operands in the order in which the product reads them: as they lie, or so
    that the result comes out as it is wanted, if it is larger than both operands.

    A product's result has the shared factors first, then those of one operand, then of the other,
    each as in its operand. Grouped scores, made with the groups behind the positions, would be
    transposed whole, and compilers then keep them in f32 and in two layouts.
    """
    rule = t.op.rule
    orders = [[d[0] for d in rule.ins[j]] for j in used]
    out = [d[0] for d in rule.outs[k]]
    if len(used) != 2 or prod(t.outs[k].shape) <= max(prod(t.ins[j].shape) for j in used):
        return orders
    shared = [f for f in out if all(f in order for order in orders)]
    own = [[f for f in out if f in order and f not in shared] for order in orders]
    if out not in (shared + own[0] + own[1], shared + own[1] + own[0]):
        return orders
    return [
        order if [f for f in order if f in free] == free
        else [*shared, *free, *(f for f in order if f not in out)]
        for order, free in zip(orders, own, strict=True)
    ]  # fmt: skip


def _transposed(code: str, dims: Sequence[int], order: Sequence[int]) -> str:
    if list(dims) == list(order):
        return code
    return f"jnp.transpose({code}, {tuple(dims.index(d) for d in order)})"


def constant_of(e: ex.Expr) -> float:
    """The constant factor of a product (see `ex.product_of`)."""
    if e[0] == "c":
        return float(e[1])
    if e[0] == "x":
        return 1.0
    if e[0] == "neg":
        return -constant_of(e[1])
    if e[0] == "stop":
        return constant_of(e[1])
    right = constant_of(e[2])
    return constant_of(e[1]) / right if e[0] == "div" else constant_of(e[1]) * right


def _letters(labels: Sequence[str]) -> list[str]:
    """One letter per factor: its own if it is one, else a free one, its initial if possible."""
    found: dict[int, str] = {
        i: label for i, label in enumerate(labels) if len(label) == 1 and label.isalpha()
    }
    for i, label in enumerate(labels):
        if i not in found:
            wished = label[:1] + label[:1].lower() + string.ascii_letters
            taken = set(found.values())
            found[i] = next(c for c in wished if c.isalpha() and c.isascii() and c not in taken)
    return [found[i] for i in range(len(labels))]


def _order(t: OpText, k: int) -> list[int]:
    """Order of all factors in which the expression is written, the most natural one."""
    everything = set(range(len(t.op.rule.factors)))
    for dims in (t.op.rule.outs[k], *t.op.rule.ins):
        if {d[0] for d in dims} == everything and len(dims) == len(everything):
            return [d[0] for d in dims]
    out = [d[0] for d in t.op.rule.outs[k]]
    return out + sorted(everything - set(out))


def _writer(t: OpText, order: Sequence[int], dtype: str) -> Writer:
    """Operands broadcast over `order`; narrower ones are widened to `dtype`."""
    names, dtypes = [], []
    for name, tensor, dims in zip(t.names, t.ins, t.op.rule.ins, strict=True):
        narrow = dtype == "f32" and tensor.dtype in ("bf16", "f16")
        code = f"{name}.astype(jnp.float32)" if narrow else name
        names.append(_broadcast(code, [d[0] for d in dims], order))
        dtypes.append("f32" if narrow else tensor.dtype)
    indices = {}
    for i, factor in enumerate(t.op.rule.factors):
        position = order.index(i)
        indices[factor.name] = _expanded(
            f"jnp.arange({factor.size})", [position], len(order)
        )
    return Writer(names, dtypes, indices)


def _broadcast(code: str, dims: Sequence[int], order: Sequence[int]) -> str:
    """`code` (one axis per factor of `dims`) so that it broadcasts over `order`."""
    positions = [order.index(d) for d in dims]
    if positions != sorted(positions):
        ranked = sorted(range(len(dims)), key=lambda i: positions[i])
        code = f"jnp.transpose({code}, {tuple(ranked)})"
        positions.sort()
    return _expanded(code, positions, len(order))


def _expanded(code: str, positions: Sequence[int], rank: int) -> str:
    missing = [i for i in range(rank) if i not in positions]
    if not positions or not [i for i in missing if i > positions[0]]:
        return code  # NumPy broadcasts missing leading axes by itself
    first = positions[0]
    marks = [":" if i in positions else "None" for i in range(first, rank)]
    return f"{code}[{', '.join(marks)}]"


def _spread(t: OpText, e: ex.Expr, k: int) -> str:
    """An expression over all factors, then reduced over those that the result lacks."""
    rule, wanted = t.op.rule, t.outs[k].dtype
    order = _order(t, k)
    out = [d[0] for d in rule.outs[k]]
    reduced = [position for position, i in enumerate(order) if i not in out]
    writer = _writer(t, order, wanted)
    code, dtype = writer.text(e), writer.dtype(e)
    sizes = [rule.factors[i].size for i in order]
    if not _covers(t, e, order):
        code = f"jnp.broadcast_to({code}, {_tuple(sizes)})"
    if reduced:
        axis = reduced[0] if len(reduced) == 1 else tuple(reduced)
        function = "jnp.max" if rule.combiner == "max" else "jnp.sum"
        code = f"{function}({code})" if len(reduced) == len(order) else (
            f"{function}({code}, axis={axis})"
        )  # fmt: skip
    kept = [i for i in order if i in out]
    if kept != out:
        code = f"jnp.transpose({code}, {tuple(kept.index(i) for i in out)})"
    if dtype == wanted:
        return code
    if dtype == WEAK and not _covers(t, e, order):
        return f"jnp.asarray({code}, {JNP_DTYPES[wanted]})"
    return f"{_atom(code)}.astype({JNP_DTYPES[wanted]})"


def _covers(t: OpText, e: ex.Expr, order: Sequence[int]) -> bool:
    """Whether the written expression has the full shape over `order`."""
    factors = t.op.rule.factors
    seen = {d[0] for j in ex.arguments(e) for d in t.op.rule.ins[j]}
    seen |= {i for i, f in enumerate(factors) if f.name in ex.index_factors(e)}
    return seen == set(order) and (bool(order) or bool(ex.arguments(e)))


def _atom(code: str) -> str:
    """`code` ready for a method call."""
    depth = 0
    for c in code:
        depth += c in "([{"
        depth -= c in ")]}"
        if depth == 0 and c in " -":
            return f"({code})"
    return code


def _as(code: str, t: OpText, operand: int) -> str:
    wanted = t.outs[0].dtype
    return code if t.ins[operand].dtype == wanted else f"{code}.astype({JNP_DTYPES[wanted]})"


def _softmax(t: OpText) -> str:
    """exp(logit − max) / sum as one call of the program's own function; the ops of max and sum
    become dead code."""
    logit = _added_mask(t.op.attrs["exprs"][0][1][1][1])
    order = _order(t, 0)
    writer = _writer(t, order, "f32")
    names = [t.op.rule.factors[i].name for i in order]
    axis = names.index(t.op.attrs["over"])
    wanted = t.outs[0].dtype
    label = "" if t.label is None else f', "{t.label}"'
    return f"softmax({writer.text(logit)}, {axis}, {JNP_DTYPES[wanted]}{label})"


def _added_mask(logit: ex.Expr) -> ex.Expr:
    """where(seen, value, −10³⁰) as value + where(seen, 0, −10³⁰), if positions alone are masked.

    jnp.where widens mask and constant to the shape of the value, and JAX carries both through a
    loop over layers because they do not change in it. Sums are widened by the compiler.
    """
    if logit[0] != "where" or logit[3] != ex.c(MASKED) or ex.arguments(logit[1]):
        return logit
    return ex.add(logit[2], ("where", logit[1], ex.c(0), logit[3]))


def reads(op: Op) -> tuple[int, ...]:
    """Positions of the operands that the written statements use."""
    if op.kind != "map" or op.attrs.get("onehot"):
        return tuple(range(len(op.ins)))
    if op.attrs.get("vjp") == "softmax":
        return tuple(sorted(ex.arguments(op.attrs["exprs"][0][1][1][1])))
    return tuple(sorted(frozenset().union(*(ex.arguments(e) for e in op.attrs["exprs"]))))


def _tuple(values: Sequence[object]) -> str:
    inner = ", ".join(map(str, values))
    return f"({inner},)" if len(values) == 1 else f"({inner})"


# ---- data movement -------------------------------------------------------------------------------


def _reshape(t: OpText) -> list[Assignment]:
    return _one(f"jnp.reshape({t.names[0]}, {_tuple(t.outs[0].shape)})")


def _concat(t: OpText) -> list[Assignment]:
    return _one(f"jnp.concatenate([{', '.join(t.names)}], axis={t.op.attrs['axis']})")


def _slice(t: OpText) -> list[Assignment]:
    start, stop, step = t.op.attrs["bounds"]
    bounds = f"{start}, {stop}" if step == 1 else f"{start}, {stop}, {step}"
    return _one(f"lax.slice_in_dim({t.names[0]}, {bounds}, axis={t.op.attrs['axis']})")


def _pad(t: OpText) -> list[Assignment]:
    a, rank = t.op.attrs, len(t.ins[0].shape)
    config = [a["padding"] if i == a["axis"] else (0, 0, 0) for i in range(rank)]
    value = f"jnp.asarray({number(a['value'])}, {t.names[0]}.dtype)"
    return _one(f"lax.pad({t.names[0]}, {value}, {config})")


def _put(t: OpText) -> list[Assignment]:
    return _one(f"put({', '.join(t.names)})")


def _pop(t: OpText) -> list[Assignment]:
    return [Assignment((0, 1), f"pop({', '.join(t.names)})")]


def _shift(t: OpText) -> list[Assignment]:
    """Padding on one side and cutting on the other: XLA exchanges the edges of the blocks."""
    a, rank = t.op.attrs, len(t.ins[0].shape)
    if a["wrap"]:
        return _one(f"rotated({t.names[0]}, {a['by']}, {a['axis']})")
    config = [(a["by"], -a["by"], 0) if i == a["axis"] else (0, 0, 0) for i in range(rank)]
    return _one(f"lax.pad({t.names[0]}, jnp.zeros((), {t.names[0]}.dtype), {config})")


def _cumsum(t: OpText) -> list[Assignment]:
    a, x = t.op.attrs, t.names[0]
    back = ", reverse=True" if a["reverse"] else ""
    own = f" - {x}" if a["exclusive"] else ""
    return _one(f"lax.cumsum({x}, axis={a['axis']}{back}){own}")


def _sort(t: OpText) -> list[Assignment]:
    a, x = t.op.attrs, t.names[0]
    axis, last = a["axis"], len(t.ins[0].shape) - 1
    if a["descending"] and a["keep"] < t.ins[0].shape[axis] and axis == last:
        return [Assignment((0, 1), f"lax.top_k({x}, {a['keep']})")]
    down = ", descending=True" if a["descending"] else ""
    order = f"jnp.argsort({x}, axis={axis}{down}, stable=True)"
    if a["keep"] < t.ins[0].shape[axis]:
        order = f"lax.slice_in_dim({order}, 0, {a['keep']}, axis={axis})"
    places = f"{order}.astype(jnp.int32)"
    return [
        Assignment((1,), places),
        Assignment((0,), f"jnp.take_along_axis({x}, {t.targets[1]}, axis={axis})"),
    ]


# ---- convolution, pooling, upsampling ------------------------------------------------------------

_SPATIAL = "HWZUV"  # letters of lax's dimension numbers, in order


def _lead(t: OpText) -> tuple[int, ...]:
    """Leading (batch) dimensions of the first operand."""
    return tuple(t.ins[0].shape[: len(t.ins[0].shape) - len(t.op.attrs["taps"]) - 1])


def _with_one_batch(t: OpText, code: Callable[[str], str]) -> list[Assignment]:
    """`code` on an operand whose leading dimensions are merged into one."""
    lead, x = _lead(t), t.ins[0].shape
    if len(lead) == 1:
        return _one(code(t.names[0]))
    merged = f"jnp.reshape({t.names[0]}, {_tuple((prod(lead), *x[len(lead) :]))})"
    return _one(f"jnp.reshape({code(merged)}, {_tuple(t.outs[0].shape)})")


def _conv(t: OpText) -> list[Assignment]:
    a = t.op.attrs
    if t.sliced:
        given = ", ".join(str(a[key]) for key in ("stride", "padding", "dilation"))
        return _one(f"slicewise({t.names[0]}, {t.names[1]}, {given})")
    options = [f"window_strides={_tuple(a['stride'])}", f"padding={list(a['padding'])}"]
    if set(a["dilation"]) != {1}:
        options.append(f"rhs_dilation={_tuple(a['dilation'])}")
    return _convolution(t, t.names[1], options)


def _conv_transpose(t: OpText) -> list[Assignment]:
    """A convolution of the dilated input with the reversed window."""
    a = t.op.attrs
    if not a["flipped"]:
        raise ExportError(f"'{t.op.name}': a forward pass has no gradient of a convolution")
    rank, pads = len(a["taps"]), []
    inputs = t.ins[0].shape[-rank - 1 : -1]
    for n, size, k, s, d, (low, _) in zip(
        inputs, a["spatial"], a["taps"], a["stride"], a["dilation"], a["padding"], strict=True
    ):
        reach = (k - 1) * d + 1
        before = reach - 1 - low
        pads.append((before, size + reach - 1 - before - ((n - 1) * s + 1)))
    if t.sliced:
        given = f"{a['stride']}, {tuple(pads)}, {a['dilation']}"
        return _one(f"spread_slicewise({t.names[0]}, {t.names[1]}, {given})")
    options = [f"window_strides={_tuple((1,) * rank)}", f"padding={pads}"]
    options.append(f"lhs_dilation={_tuple(a['stride'])}")
    if set(a["dilation"]) != {1}:
        options.append(f"rhs_dilation={_tuple(a['dilation'])}")
    return _convolution(t, f"jnp.flip({t.names[1]}, {_tuple(range(rank))})", options)


def _convolution(t: OpText, w: str, options: list[str]) -> list[Assignment]:
    group = t.op.attrs["parts"]["b"]
    spatial = _SPATIAL[: len(t.op.attrs["taps"])]
    layout = f'("N{spatial}C", "{spatial}IO", "N{spatial}C")'
    options.append(f"dimension_numbers={layout}")
    if group:
        options.append(f"feature_group_count={t.op.rule.factors[group[0]].size}")
    given = ", ".join(options)
    return _with_one_batch(t, lambda x: f"lax.conv_general_dilated({x}, {w}, {given})")


def _reduce_window(t: OpText, init: str, function: str) -> str:
    a, lead = t.op.attrs, len(_lead(t))
    window = (*(1,) * lead, *a["taps"], 1)
    strides = (*(1,) * lead, *a["stride"], 1)
    pads = [*((0, 0),) * lead, *a["padding"], (0, 0)]
    return f"lax.reduce_window({t.names[0]}, {init}, {function}, {window}, {strides}, {pads})"


def _max_pool(t: OpText) -> list[Assignment]:
    a = t.op.attrs
    if t.sliced:
        given = ", ".join(str(a[key]) for key in ("taps", "stride", "padding"))
        return _one(f"max_pool_slicewise({t.names[0]}, {given})")
    return _one(_reduce_window(t, "-jnp.inf", "lax.max"))


def _avg_pool(t: OpText) -> list[Assignment]:
    return _one(f"{_reduce_window(t, '0.0', 'lax.add')} / {prod(t.op.attrs['taps'])}")


def _upsample(t: OpText) -> list[Assignment]:
    code = t.names[0]
    for axis, times in enumerate(t.op.attrs["times"], start=1):
        code = code if times == 1 else f"jnp.repeat({code}, {times}, axis={axis})"
    return _one(code)


WRITERS: dict[str, Callable[[OpText], list[Assignment]]] = {
    "map": _map,
    "reshape": _reshape,
    "concat": _concat,
    "slice": _slice,
    "pad": _pad,
    "put": _put,
    "pop": _pop,
    "shift": _shift,
    "cumsum": _cumsum,
    "sort": _sort,
    "conv": _conv,
    "conv_dx": _conv_transpose,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "upsample": _upsample,
}
