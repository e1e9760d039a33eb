"""Builds graphs: one method per primitive op, shapes and rules inferred and checked here.

Composite layers (attention, norms, losses) belong to `layers.py`; a `Builder` only knows
primitives and scopes. Every wrong use raises GraphError, whose message names the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from planner.graph import expr as ex
from planner.graph.core import Carry, Factor, Graph, Loop, Node, Op, Rule, Stack, Tensor


class GraphError(ValueError):
    """A graph that cannot be: unknown tensors, disagreeing sizes, wrong ranks."""


Operand = tuple[str, Sequence[str]]


def parse_labels(text: str, rank: int | None = None) -> tuple[str, ...]:
    """'B S D' → (B, S, D); a word without spaces is split into letters if that fits `rank`."""
    words = tuple(text.split())
    if len(words) == 1 and rank is not None and rank != 1 and len(words[0]) == rank:
        return tuple(words[0])
    return words


@dataclass
class Builder:
    """Accumulates the nodes of one scope; `repeat` opens an inner scope.

    `compute` is the dtype of activations; parameters are kept in `param_dtype` and cast on use.
    """

    compute: str = "bf16"
    param_dtype: str = "f32"
    prefix: str = ""
    parent: Builder | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    shared: dict[str, None] = field(default_factory=dict)
    reads: list[Stack] = field(default_factory=list)
    writes: list[Stack] = field(default_factory=list)
    times: int = 1
    phase: str = "forward"
    _casts: dict[str, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    # ---- names and tensors -------------------------------------------------------------

    def unique(self, name: str) -> str:
        """`name` in this scope, numbered if taken."""
        root = self
        while root.parent is not None:
            root = root.parent
        full = self.prefix + name
        found, count = full, 1
        while found in root._names:
            count += 1
            found = f"{full}_{count}"
        root._names.add(found)
        return found

    def lookup(self, name: str) -> Tensor:
        """The tensor called `name`, in this scope or (then it becomes shared) an outer one."""
        if name in self.tensors:
            return self.tensors[name]
        if self.parent is None:
            raise GraphError(f"unknown tensor '{name}'")
        found = self.parent.lookup(name)
        self.shared[name] = None
        return found

    def declare(self, tensor: Tensor) -> str:
        self.tensors[tensor.name] = tensor
        return tensor.name

    def input(self, name: str, shape: Sequence[int], dims: Sequence[str], dtype: str) -> str:
        """A data input of the step (tokens, images); only in the outermost scope."""
        full = self.unique(name)
        self.inputs.append(full)
        return self.declare(Tensor(full, tuple(shape), dtype, tuple(dims), "input"))

    def param(self, name: str, shape: Sequence[int], dims: Sequence[str]) -> str:
        """A parameter of this scope; inside `repeat` it is one slice of a stacked parameter."""
        return self.argument(
            Tensor(name, tuple(shape), self.param_dtype, tuple(dims), "parameter")
        )

    def argument(self, tensor: Tensor) -> str:
        """Something every step is given, named in this scope; inside `repeat` every run has its
        own, one slice of a stack."""
        whole = replace(tensor, name=self.unique(tensor.name))
        if self.parent is None:
            self.inputs.append(whole.name)
            return self.declare(whole)
        return self._sliced(whole, self.parent, "layers")

    def _sliced(self, tensor: Tensor, parent: Builder, dim: str) -> str:
        """One slice of a stack along `dim` that `parent` declares under the tensor's name."""
        inner = self.declare(replace(tensor, name=tensor.name + "[i]" * self._depth()))
        stack = replace(tensor, shape=(self.times, *tensor.shape), dims=(dim, *tensor.dims))
        self.reads.append(Stack(parent._adopt(stack), inner))
        return inner

    def _adopt(self, tensor: Tensor) -> str:
        """A stacked argument of an inner scope, declared by this one."""
        if tensor.dims.count("repeats") > 1:  # the names of dimensions are distinct
            raise GraphError(
                f"{tensor.name}: parameters can be stacked by two repeats, not by three"
            )
        if self.parent is None:
            self.inputs.append(tensor.name)
            return self.declare(tensor)
        return self._sliced(tensor, self.parent, "repeats")

    def leave(self, inner: str, stack: str, role: str) -> str:
        """What every run of this repeat makes as `inner`, stacked for its parent as `stack`."""
        if self.parent is None:
            raise GraphError("only a repeat leaves stacks")
        made = self.lookup(inner)
        outer = replace(
            made, name=self.parent.unique(stack), role=role,
            shape=(self.times, *made.shape), dims=("layers", *made.dims),
        )  # fmt: skip
        self.writes.append(Stack(self.parent.declare(outer), inner))
        return outer.name

    def _depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent._depth()

    def use(self, name: str) -> str:
        """`name` in the compute dtype: parameters are cast once per scope, others unchanged."""
        tensor = self.lookup(name)
        if tensor.role != "parameter" or tensor.dtype == self.compute:
            return name
        if name not in self._casts:
            base = name[len(self.prefix) :] if name.startswith(self.prefix) else name
            self._casts[name] = self.cast(name, self.compute, base.replace("[i]", "") + ".cast")
        return self._casts[name]

    # ---- primitives ---------------------------------------------------------------------

    def emit(self, op: Op, outs: Sequence[Tensor]) -> str:
        self.nodes.append(op)
        for tensor in outs:
            self.declare(tensor)
        return op.outs[0]

    def map(
        self,
        name: str,
        operands: Sequence[Operand],
        out: Sequence[str],
        value: ex.Expr | Sequence[ex.Expr],
        *,
        dtype: str | None = None,
        dtypes: Sequence[str] | None = None,
        combiner: str = "sum",
        sizes: Mapping[str, int] | None = None,
        names: Sequence[str] | None = None,
        attrs: Mapping[str, Any] | None = None,
        roles: Sequence[str] | None = None,
        blocked: Sequence[str] = (),
    ) -> str:
        """out[o…] = combine over the other factors of value(operands…): einsum generalised.

        `operands` are (tensor, factor labels) pairs, `out` the labels of the result; a tuple of
        expressions gives several results of the same shape. Returns the first result's name.
        """
        several = not isinstance(value[0], str)
        values: list[ex.Expr] = [tuple(v) for v in value] if several else [tuple(value)]
        found = self._factor_sizes(name, operands, out, sizes or {})
        labels = list(dict.fromkeys([*out, *found]))
        number = {label: i for i, label in enumerate(labels)}

        def kind(label: str) -> str:
            if label in blocked:
                return "blocked"
            return "parallel" if label in out else "reduce"

        dims = tuple((number[label],) for label in out)
        rule = Rule(
            tuple(Factor(label, found[label], kind(label)) for label in labels),
            tuple(tuple((number[label],) for label in labs) for _, labs in operands),
            (dims,) * len(values),
            linear_groups(values, len(operands), combiner),
            combiner,
        )
        outs = tuple(self.unique(n) for n in (names or [name] * len(values)))
        kinds = dtypes or [dtype or self.compute] * len(values)
        shape = tuple(found[label] for label in out)
        tensors = [
            Tensor(o, shape, kinds[i], tuple(out), roles[i] if roles else "activation")
            for i, o in enumerate(outs)
        ]
        ins = tuple(t for t, _ in operands)
        op = Op(outs[0], "map", ins, outs, rule, {"exprs": tuple(values), **(attrs or {})})
        return self.emit(replace(op, phase=self.phase), tensors)

    def _factor_sizes(
        self, name: str, operands: Sequence[Operand], out: Sequence[str], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        found = dict(sizes)
        for tensor, labels in operands:
            shape = self.lookup(tensor).shape
            if len(shape) != len(labels):
                raise GraphError(
                    f"{name}: '{tensor}' has {len(shape)} dimensions "
                    f"{list(self.lookup(tensor).dims)}, but {len(labels)} are named: {list(labels)}"
                )
            for label, size in zip(labels, shape, strict=True):
                if found.setdefault(label, size) != size:
                    raise GraphError(
                        f"{name}: dimension '{label}' is {found[label]} elsewhere, "
                        f"but {size} in '{tensor}'"
                    )
        for label in out:
            if label not in found:
                raise GraphError(f"{name}: result dimension '{label}' is in no operand")
        return found

    def einsum(
        self, spec: str, *operands: str, name: str = "einsum", dtype: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """'B S D, D F -> B S F': products summed over the labels that the result lacks."""
        left, arrow, right = spec.partition("->")
        parts = left.split(",")
        if not arrow or len(parts) != len(operands):
            raise GraphError(
                f"{name}: '{spec}' names {len(parts)} operands, {len(operands)} are given"
                if arrow
                else f"{name}: '{spec}' has no '->'"
            )
        used = [self.use(o) for o in operands]
        pairs = [
            (o, parse_labels(p, len(self.lookup(o).shape)))
            for o, p in zip(used, parts, strict=True)
        ]
        packed = len(right.split()) == 1 and all(len(p.split()) <= 1 for p in parts)
        out = tuple(right.strip()) if packed else tuple(right.split())
        if len(set(out)) != len(out):
            raise GraphError(f"{name}: '{right.strip()}' repeats a dimension")
        value = ex.x(0)
        for i in range(1, len(operands)):
            value = ex.mul(value, ex.x(i))
        return self.map(name, pairs, out, value, dtype=dtype or self.compute, attrs=attrs)

    def pointwise(
        self, name: str, value: ex.Expr, *operands: str, dtype: str | None = None
    ) -> str:
        """Elementwise with NumPy broadcasting from the right; labels are the widest operand's."""
        used = [self.use(o) for o in operands]
        tensors = [self.lookup(o) for o in used]
        widest = max(tensors, key=lambda t: len(t.shape))
        if len(set(widest.dims)) != len(widest.dims):
            raise GraphError(f"{name}: '{widest.name}' has two dimensions of the same name")
        rank = len(widest.shape)
        pairs = [
            (o, widest.dims[rank - len(t.shape) :]) for o, t in zip(used, tensors, strict=True)
        ]
        return self.map(name, pairs, widest.dims, value, dtype=dtype or self.compute)

    def cast(self, operand: str, dtype: str, name: str = "cast") -> str:
        tensor = self.lookup(operand)
        labels = distinct(tensor.dims)
        return self.map(name, [(operand, labels)], labels, ex.x(0), dtype=dtype)

    # ---- loops ---------------------------------------------------------------------------

    def repeat(self, name: str, times: int) -> Builder:
        """An inner scope whose nodes run `times` times; close it with `end_repeat`."""
        if times < 1:
            raise GraphError(f"{name}: a repeat runs at least once, not {times} times")
        return Builder(
            self.compute, self.param_dtype, f"{self.prefix}{name}.", self, times=times,
            phase=self.phase,
        )  # fmt: skip

    def enter(self, outer: str, name: str | None = None) -> str:
        """The entry of a carried value inside this (inner) scope; initialised from `outer`."""
        if self.parent is None:
            raise GraphError("a carry belongs to a repeat")
        tensor = self.parent.lookup(outer)
        base = name or outer[len(self.parent.prefix) :]
        return self.declare(replace(tensor, name=self.unique(base + ".in"), role="activation"))

    def end_repeat(self, carries: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
        """Closes this scope: `carries` are (outer init, entry, exit); returns the results."""
        parent = self.parent
        if parent is None:
            raise GraphError("only a repeat can be closed")
        loop_carries = []
        for init, entry, exit_ in carries:
            before, after = self.lookup(entry), self.lookup(exit_)
            if before.shape != after.shape:
                raise GraphError(
                    f"{self.prefix[:-1]}: '{init}' enters as {list(before.shape)} "
                    f"but leaves as {list(after.shape)}"
                )
            if exit_ not in self.tensors:  # handed on unchanged from outside: give it a name
                exit_ = self.cast(exit_, before.dtype, entry + ".next")
            elif after.dtype != before.dtype:
                exit_ = self.cast(exit_, before.dtype, init.split(".")[-1] + ".next")
            result = parent.unique(f"{self.prefix[len(parent.prefix):-1]}.{init.split('.')[-1]}")
            dims = self.lookup(exit_).dims
            parent.declare(replace(before, name=result, dims=dims, role="activation"))
            loop_carries.append(Carry(init, entry, exit_, result))
        for name in self.shared:
            parent.lookup(name)
        body = Graph(dict(self.tensors), tuple(self.nodes))
        loop = Loop(
            self.prefix[:-1], self.times, body, tuple(loop_carries), tuple(self.reads),
            tuple(self.writes), tuple(self.shared), phase=self.phase,
        )  # fmt: skip
        parent.nodes.append(loop)
        return tuple(k.result for k in loop_carries)

    def graph(self, outputs: Sequence[str], **extra: Any) -> Graph:
        if self.parent is not None:
            raise GraphError("a repeat is still open")
        return Graph(self.tensors, tuple(self.nodes), tuple(self.inputs), tuple(outputs), **extra)


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels made distinct: (S, S) → (S, S')."""
    seen: list[str] = []
    for label in labels:
        while label in seen:
            label += "'"
        seen.append(label)
    return tuple(seen)


def linear_groups(
    values: Sequence[ex.Expr], operands: int, combiner: str
) -> tuple[tuple[int, ...], ...]:
    """Operand groups through which partial sums may pass: each operand alone, or all of a sum,
    those that are only compared with something left out."""
    if combiner != "sum" or len(values) != 1:
        return ()
    value = values[0]
    groups = [frozenset((i,)) for i in sorted(ex.arguments(value))]
    everything = frozenset(ex.arguments(value)) - ex.compared(value)
    if len(everything) > 1:
        groups.append(everything)
    return tuple(tuple(sorted(g)) for g in groups if ex.linear_in(value, g))


def is_cast(op: Op) -> bool:
    """Whether an op makes the same values in another dtype."""
    same = len(op.ins) == 1 and op.kind == "map" and op.attrs.get("exprs") == (ex.x(0),)
    return same and op.rule.outs == op.rule.ins


def contraction_sizes(op: Op) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k) if `op` is a matmul (a sum of products of two operands), else None.

    Convolutions and their gradients count every tap of every output point, taps in the padding
    too, as XLA does: 2·b·m·n·k = 2 · batch · outputs · taps · channels in · channels out.
    """
    if "matmul" in op.attrs:
        b, m, n, k = (prod(op.rule.factors[i].size for i in s) for s in op.attrs["matmul"])
        return b, m, n, k
    if op.kind != "map" or op.rule.combiner != "sum" or len(op.ins) != 2:
        return None
    factors = op.rule.factors
    if not any(f.kind == "reduce" for f in factors):
        return None
    product = ex.product_of(op.attrs["exprs"][0])
    if product is None or sorted(product) != [0, 1]:
        return None
    sides = [{i for dim in dims for i in dim} for dims in op.rule.ins]
    if sides[0] == sides[1]:
        return None  # an elementwise product summed up: work of the vector unit
    sizes = {"b": 1, "m": 1, "n": 1, "k": 1}
    for i, factor in enumerate(factors):
        left, right = i in sides[0], i in sides[1]
        if factor.kind == "reduce":
            if not (left and right):
                return None
            sizes["k"] *= factor.size
        else:
            sizes["b" if left and right else "m" if left else "n"] *= factor.size
    return sizes["b"], sizes["m"], sizes["n"], sizes["k"]


def volume(rule: Rule) -> int:
    """Number of points an op visits: the product of all its factors."""
    return prod(f.size for f in rule.factors)
