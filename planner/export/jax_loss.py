"""The forward graph as the source of one JAX function: loss(params, batch, mesh).

Loops become `lax.scan` over their stacked parameters, their bodies are checkpointed and keep what
the plan keeps, and tensors with a spec are annotated by name. Single ops are in `jax_ops.py`.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from planner.export.jax_expr import partition
from planner.export.jax_ops import OpText, reads, statements
from planner.export.placement import Copy, Gradient
from planner.graph.core import Graph, Loop, Node, Op, Stack, Tensor
from planner.sharding.spec import Spec

LINE = 88  # columns of a statement before it is indented (loops stand deeper)
# Functions of the program, written if they are called.
HELPERS = (
    "product", "softmax", "slicewise", "spread_slicewise", "max_pool_slicewise", "put", "pop",
    "chosen_round", "lent", "rotated", "reread", "lookup",
)  # fmt: skip
IN_COMMON = {"common": "common(", "over_groups": "common="}  # functions, and how they are asked for
_RESERVED = {
    "jax", "jnp", "lax", "np", "P", "partial", "params", "batch", "mesh", "shard", "copy", "w",
    "saved", *HELPERS, *IN_COMMON,
    *keyword.kwlist, *dir(builtins),
}  # fmt: skip


@dataclass
class LossWriter:
    """Writes one function. `annotated` names the tensors that get a sharding constraint, `kept`
    those that bodies save for the backward pass. Shardings come as source text."""

    graph: Graph
    annotated: Collection[str]
    kept: Collection[str]
    uses: Mapping[tuple[str, str], Copy]  # (op or loop, tensor) → what it reads or carries
    sums: Mapping[str, str]  # product → its sharding where it is made
    gradients: Mapping[tuple[str, str], Gradient] = field(default_factory=dict)
    together: Collection[str] = ()  # products whose gradients are made one after the other
    first: Mapping[str, str] = field(default_factory=dict)  # product → whose gradient comes first
    apart: Mapping[str, Sequence[Spec]] = field(default_factory=dict)  # where gradients go instead
    sliced: Collection[str] = ()  # convolutions by the program's own function
    rounds: Mapping[str, tuple[Spec, Spec | None]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()  # what groups of devices have in common
    variables: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameter_of: dict[str, str] = field(default_factory=dict)  # slice in a body → its parameter
    labels: list[str] = field(default_factory=list)  # of what bodies save
    ticks: set[str] = field(default_factory=set)  # loops whose layers are of several rounds
    entries: list[str] = field(default_factory=list)  # what these layers work on
    helpers: set[str] = field(default_factory=set)  # functions of the program that are called

    @cached_property
    def moved(self) -> set[str]:
        """Tensors that some op reads in another sharding than their own."""
        return {name for _, name in self.uses}

    @cached_property
    def made_in_common(self) -> set[str]:
        """Ops on nothing but what groups have in common."""
        return {op.name for op, _ in self.graph.walk() if self.whole.issuperset(op.outs)}

    def lines(self, results: Sequence[str]) -> list[str]:
        """The body of a function that makes `results`, unindented; `variables` has their names."""
        self.tensors = self.graph.all_tensors()
        for name in self.graph.inputs:
            where = "params" if self.tensors[name].role == "parameter" else "batch"
            self.variables[name] = f'{where}["{name}"]'
        return self._scope(self.graph.nodes, set(results), "")

    # ---- scopes -----------------------------------------------------------------------------

    def _scope(self, nodes: Sequence[Node], wanted: Collection[str], prefix: str) -> list[str]:
        lines: list[str] = []
        for node in _live(nodes, wanted):
            if isinstance(node, Op):
                lines += self._op(node, prefix)
            else:
                lines += self._loop(node, prefix)
        return lines

    def _op(self, op: Op, prefix: str) -> list[str]:
        ins = [self.tensors[n] for n in op.ins]
        outs = [self.tensors[n] for n in op.outs]
        targets = [self._variable(n, prefix) for n in op.outs]
        read = reads(op)
        names = [self._read(op.name, op.ins[j]) if j in read else "" for j in range(len(op.ins))]
        if op.attrs.get("onehot") == "choose":
            names[0] = f"lax.stop_gradient({names[0]})"
        lines = []
        given = [self.gradients.get((op.name, name)) for name in op.ins]
        own = op.attrs.get("vjp") == "softmax"
        kept = prefix and op.outs[0] in self.kept
        label = self.variables[op.outs[0]] if own and kept else None
        together = op.name in self.together
        plain = [self._operand(n) if j in read else "" for j, n in enumerate(op.ins)]
        common = () if op.name in self.made_in_common else self.whole.intersection(op.ins)
        copies = [self.uses.get((op.name, n)) for n in op.ins]
        sliced = op.name in self.sliced
        text = OpText(
            op, names, targets, ins, outs, plain, copies, given, together, self.first.get(op.name),
            label, sliced, common,
        )  # fmt: skip
        turned = self._turned(op, read)
        if turned is not None:
            names[op.ins.index(turned)] = "v"
        for a in statements(text):
            code = a.code
            if turned is not None:
                copy = self.uses[op.name, turned]
                where = f"{partition(copy.spec)}, {partition(copy.gradient or copy.spec)}"
                code = f"reread(lambda v: {code}, {self._operand(turned)}, {where}, mesh)"
                self.helpers.add("reread")
            if op.attrs.get("onehot") == "choose" and op.ins[0] in self.rounds:
                whole = self.rounds[op.ins[0]][0]
                code = f"copy({code}, {partition(Spec(whole.dims[1:]))})"
            if op.attrs.get("onehot") == "choose":
                self.helpers.add("lent")
                code = f'lent({code}, rounds["{op.outs[0]}"])'
            self.helpers |= {h for h in HELPERS if a.code.startswith(f"{h}(")}
            self.helpers |= {h for h, sign in IN_COMMON.items() if sign in a.code}
            named = [op.outs[i] for i in a.outs]
            if len(named) == 1:
                code = self._placed(named[0], code)
            if prefix and not set(named).isdisjoint(self.kept):
                self.labels.append(self.variables[named[0]])
                code = code if label else f'saved({code}, "{self.labels[-1]}")'
                if named[0] in self.annotated and named[0] in self.moved:
                    # Said of the saved value, too: else it may be saved as its readers want it.
                    code = f'shard({code}, "{named[0]}")'
            lines += wrapped(f"{', '.join(targets[i] for i in a.outs)} = {code}")
            if len(named) > 1:
                lines += [
                    f"{targets[i]} = {self._placed(op.outs[i], targets[i])}"
                    for i in a.outs if op.outs[i] in self.annotated
                ]  # fmt: skip
        return lines

    def _placed(self, name: str, code: str) -> str:
        """A result where it is made, then where it lies."""
        if name in self.sums:
            code = f"shard({code}, {self.sums[name]})"
        return self._located(code, name, name) if name in self.annotated else code

    def _located(self, code: str, where: str, name: str) -> str:
        """`name`, which lies like `where`; its gradient as the plan says."""
        if name not in self.apart:
            return f'shard({code}, "{where}")'
        for gradient in reversed(self.apart[name]):  # the outermost copy has it first
            code = f'copy({code}, "{where}", {partition(gradient)})'
        return code if self.apart[name] else f'copy({code}, "{where}")'

    def _read(self, node: str, name: str) -> str:
        """A tensor as an op or a loop has it."""
        code, copy = self._given(node, name), self.uses.get((node, name))
        if copy is None:
            return code
        bound = copy.bound and copy.gradient is None
        for spec in (*copy.way, copy.spec):
            code = f"{'shard' if bound else 'copy'}({code}, {partition(spec)})"
        if copy.gradient is not None:
            code = f"{code[:-1]}, {partition(copy.gradient)})"
        return code

    def _turned(self, op: Op, read: Sequence[int]) -> str | None:
        """The only operand of an op whose gradient is made of it, as it lies otherwise."""
        if op.kind != "map" or op.attrs.get("vjp") or op.attrs.get("onehot") or len(read) != 1:
            return None
        name, copy = op.ins[read[0]], self.uses.get((op.name, op.ins[read[0]]))
        turned = copy is not None and copy.turned and not copy.way
        linear = (read[0],) in op.rule.linear  # then the gradient does not depend on the operand
        return name if turned and not linear and name not in self.whole else None

    def _given(self, node: str, name: str) -> str:
        """An operand; what groups have in common, for what one group works on."""
        code = self._operand(name)
        if name not in self.whole or node in self.made_in_common:
            return code
        return f"common({code})"

    def _operand(self, name: str) -> str:
        """How `name` is read; slices of annotated parameters keep the parameter's sharding."""
        parameter = self.parameter_of.get(name)
        code = self.variables[name]
        if parameter is None or parameter not in self.annotated:
            return code
        return self._located(code, parameter, name)

    def _variable(self, name: str, prefix: str) -> str:
        """A Python name for tensor `name`, unique in the function."""
        base = name.removeprefix(prefix).removesuffix(".cast")
        found = plain = self._identifier(base)
        count = 1
        while found in self.taken:
            count += 1
            found = f"{plain}_{count}"
        self.taken.add(found)
        self.variables[name] = found
        return found

    def _identifier(self, text: str) -> str:
        plain = re.sub(r"\W+", "_", text).strip("_") or "value"
        if plain[0].isdigit():
            plain = f"_{plain}"
        return f"{plain}_" if plain in _RESERVED else plain

    # ---- loops ------------------------------------------------------------------------------

    def _loop(self, loop: Loop, prefix: str) -> list[str]:
        inits = [self._read(loop.name, k.init) for k in loop.carries]
        stacks = {self._key(s, loop): self._operand(s.outer) for s in loop.reads}
        own = f"{loop.name}."
        copies = self._rounds(loop, prefix)
        function = self._variable(loop.name, prefix)
        for s in loop.reads:
            self.variables[s.inner] = f'w["{self._key(s, loop)}"]'
            if self.tensors[s.outer].role == "parameter":
                self.parameter_of[s.inner] = self.parameter_of.get(s.outer, s.outer)
        entries = [self._variable(k.entry, own) for k in loop.carries]
        in_rounds = prefix in self.ticks
        if _choices(loop):
            self.ticks.add(own)
        head = []
        for v, k in zip(entries, loop.carries, strict=True):
            code = f'saved({v}, "{v}")' if in_rounds else v
            if in_rounds or k.entry in self.annotated:
                head.append(f"{v} = {self._placed(k.entry, code)}")
        self.entries += entries if in_rounds else []
        wanted = {k.exit for k in loop.carries} | {s.inner for s in loop.writes}
        body = self._scope(loop.body.nodes, wanted, own)
        exits = [self.variables[k.exit] for k in loop.carries]
        writes = [self.variables[s.inner] for s in loop.writes]
        inside = [*head, *body, f"return {_several(exits)}, {_several(writes)}"]
        results = [self._variable(k.result, prefix) for k in loop.carries]
        stacked = [self._variable(s.outer, prefix) for s in loop.writes]
        argument, first = _several(entries), []
        if len(entries) != 1:
            argument, first = "carry", [f"{argument} = carry"] if entries else []
        items = ", ".join(f'"{k}": {v}' for k, v in stacks.items())
        back = ", reverse=True" if loop.reverse else ""
        call = f"lax.scan({function}, {_several(inits)}, {{{items}}}, length={loop.times}{back})"
        tick, called = self._tick(loop, function, argument)
        call = call.replace(f"({function},", f"({called},", 1)
        return [
            *copies,
            "",
            *self._decorators(loop),
            f"def {function}({argument}, w{', rounds' if tick else ''}):",
            *(f"    {line}" if line else "" for line in [*first, *inside]),
            "",
            *tick,
            *wrapped(f"{_several(results)}, {_several(stacked) if stacked else '_'} = {call}"),
        ]

    def _tick(self, loop: Loop, function: str, argument: str) -> tuple[list[str], str]:
        """What calls `function` in every tick, and lends it parameters."""
        if not _choices(loop):
            return [], function
        name = self._variable(f"{function}.lent", "")
        lines = [f"def {name}({argument}, w):", "    rounds = {"]
        for op in _choices(loop):
            ins = ", ".join(self._operand(i) for i in op.ins)
            code = f'"{op.outs[0]}": chosen_round({ins}, {op.attrs["turns"]}),'
            lines += [f"        {line}" for line in wrapped(code)]
        return [*lines, "    }", f"    return {function}({argument}, w, rounds)", ""], name

    def _rounds(self, loop: Loop, prefix: str) -> list[str]:
        """Parameters of which every iteration reads another part, as it reads them."""
        lines = []
        for op in _choices(loop):
            name, code = op.ins[0], self._operand(op.ins[0])
            if name in self.rounds:
                where = ", ".join(partition(s) for s in self.rounds[name] if s is not None)
                variable = self._variable(f"{name}.read", prefix)
                self.variables[name] = variable
                lines += wrapped(f"{variable} = copy({code}, {where})")
        return lines

    def _key(self, stack: Stack, loop: Loop) -> str:
        return stack.outer.replace("[i]", "").removeprefix(f"{loop.name}.")

    def _decorators(self, loop: Loop) -> list[str]:
        """What a loop's body keeps; of parts of the batch it keeps everything but the parameters
        that it chooses. Compilers inline a loop of one iteration, and would find what it computes
        again."""
        if loop.of_parts:
            keeps = ", policy=ROUNDS" if _choices(loop) else None
        else:
            keeps = ", policy=SAVED" if self.labels else ""
        once = loop.times == 1
        return [] if keeps is None else [f"@partial(jax.checkpoint, prevent_cse={once}{keeps})"]


def _choices(loop: Loop) -> list[Op]:
    """Ops of a tick that choose parameters by stage."""
    nodes = (n for n in loop.body.nodes if isinstance(n, Op))
    return [n for n in nodes if n.attrs.get("onehot") == "choose"]


def _live(nodes: Sequence[Node], wanted: Collection[str]) -> list[Node]:
    """The nodes that `wanted` depends on, as they are written."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if not needed & set(node.outs):
            continue
        kept.append(node)
        needed |= set(node.ins if isinstance(node, Loop) else (node.ins[j] for j in reads(node)))
    return kept[::-1]


def _several(names: Sequence[str]) -> str:
    if not names:
        return "None"
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


def wrapped(line: str) -> list[str]:
    """`line`; if it is too long, its longest call or sum is opened over several lines."""
    if len(line) <= LINE:
        return [line]
    start = _opening(line, lambda inner: len(_split(inner)) > 1)
    if start is not None:
        stop = _closing(line, start)
        parts = [f"{part}," for part in _split(line[start + 1 : stop])]
    else:
        start = _opening(line, lambda inner: len(_terms(inner)) > 1)
        if start is None:
            return [line]
        stop = _closing(line, start)
        parts = _terms(line[start + 1 : stop])
    inner = [f"    {piece}" for part in parts for piece in wrapped(part)]
    return [line[: start + 1], *inner, line[stop:]]


def _opening(line: str, wanted: Callable[[str], bool]) -> int | None:
    """Where the longest bracket opens whose inside is `wanted`; subscripts stay closed."""
    spans = {
        i: _closing(line, i)
        for i, c in enumerate(line)
        if c in "({" or (c == "[" and not re.search(r"[\w)\]]$", line[:i]))
    }
    found = [i for i, stop in spans.items() if wanted(line[i + 1 : stop])]
    return max(found, key=lambda i: (spans[i] - i, -i), default=None)


def _terms(text: str) -> list[str]:
    """The terms of a sum, or the factors of a product, each with the operator before it."""
    for signs in ("+-", "*/"):
        parts, depth, last = [], 0, 0
        for i, c in enumerate(text):
            depth += (c in "([{") - (c in ")]}")
            if depth == 0 and c in signs and text[i - 1 : i] == " " and text[i + 1 : i + 2] == " ":
                parts.append(text[last:i].strip())
                last = i
        if parts:
            return [*parts, text[last:].strip()]
    return [text]


def _closing(line: str, start: int) -> int:
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] in "([{") - (line[i] in ")]}")
        if depth == 0:
            return i
    return len(line) - 1


def _split(text: str) -> list[str]:
    parts, depth, quoted, last = [], 0, False, 0
    for i, c in enumerate(text):
        quoted ^= c == '"'
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not quoted:
            parts.append(text[last:i].strip())
            last = i + 1
    return [p for p in (*parts, text[last:].strip()) if p]
