"""The `graph:` block onto a builder: declarations, ops in order, repeats, the loss.

Names mean what the last op before said they mean; a repeat sees the names around it, changes
those it carries and keeps the others to itself. After an error the results of the op count as
unknown, and what reads them is passed over, so that one mistake is reported once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from meshes.yamltree import Listing, Node, Place, Scalar, Table
from planner.graph.builder import Builder, GraphError
from planner.graph.core import Graph
from planner.modelfile.call import Evaluator, OpError, Ref, described
from planner.modelfile.diagnostics import Findings, nearest
from planner.modelfile.language import OpSyntax, Statement, offset_of, parse_statement
from planner.modelfile.named import StackEntry, build_stack, stack_entry
from planner.modelfile.scalars import value_of
from planner.modelfile.sizes import Declaration, Dims, SizeError, Unknown, declaration, evaluate

MAX_OPS = 5000  # written out; more of the same belongs into a repeat


@dataclass(frozen=True)
class Block:
    """A repeat as it is written."""

    repeat: Table
    params: Table | None
    ops: Listing
    carry: tuple[Scalar, ...]

    @property
    def title(self) -> Node | None:
        return self.repeat.get("name")


@dataclass(frozen=True)
class Step:
    """One entry of a list of ops: what it reads and what it makes. `op` is None if broken."""

    node: Node
    op: Statement | Block | StackEntry | None
    reads: frozenset[str]
    makes: tuple[str, ...]


@dataclass
class Scope:
    """Names inside one list of ops. A name that is None belongs to something broken."""

    b: Builder
    parent: Scope | None = None
    title: str = ""
    names: dict[str, Any] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)  # inputs and parameters: not to be redefined
    carried: set[str] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    at: int = 0  # the step that is being built

    def find(self, name: str) -> Scope | None:
        """The scope that `name` belongs to."""
        scope: Scope | None = self
        while scope is not None and name not in scope.names:
            scope = scope.parent
        return scope


def compile_graph(
    graph: Table, dims: Dims, compute: str, params: str, findings: Findings
) -> Graph | None:
    """The forward graph, its loss as the only output; None if there are errors (noted)."""
    return _Compiler(dims, findings).graph(graph, Builder(compute, params))


def check_syntax(graph: Node, findings: Findings) -> None:
    """Notes ops that cannot be parsed in a block whose keys are wrong, so is not compiled."""
    ops = graph.get("ops") if isinstance(graph, Table) else None
    for node in ops.items if isinstance(ops, Listing) else []:
        if isinstance(node, Scalar):
            if isinstance(value_of(node), str):
                _parse(node, findings)
        else:
            check_syntax(node, findings)


def _parse(node: Scalar, findings: Findings) -> Statement | None:
    try:
        return parse_statement(node.value)
    except OpSyntax as error:
        findings.add("op-syntax", error.message, node.place_of(error.offset), error.hint)
        return None


class _Compiler:
    def __init__(self, dims: Dims, findings: Findings) -> None:
        self.dims, self.findings, self.ops = dims, findings, 0
        self.places: dict[str, Place] = {}  # of the ops that made the outermost names
        self.inside: dict[str, str] = {}  # names that only exist inside a repeat

    def graph(self, table: Table, b: Builder) -> Graph | None:
        before = len(self.findings.diagnostics)
        scope = Scope(b)
        self._declare(scope, table.get("inputs"), self._input)
        self._declare(scope, table.get("params"), self._param)
        self._ops(scope, table.get("ops"))
        if len(self.findings.diagnostics) > before:
            return None
        loss = self._loss(scope, table)
        return b.graph([loss]) if loss else None

    def _loss(self, scope: Scope, table: Table) -> str | None:
        """The loss: the tensor of that name, else the result of the last op."""
        last = scope.steps[-1]
        if "loss" not in scope.names and isinstance(last.op, Block):
            message = "the last op is a repeat, and no tensor is called loss"
            self._add("no-loss", message, last.node.place)
            return None
        name = "loss" if "loss" in scope.names else last.makes[0]
        place = self.places.get(name, last.node.place)
        loss = scope.names[name]
        if loss is None:  # made of dims that are reported elsewhere
            return None
        if not isinstance(loss, Ref):
            self._add("no-loss", f"'{name}' is no tensor", place)
            return None
        tensor = scope.b.lookup(loss)
        if tensor.shape or tensor.dtype.startswith("i"):
            self._add(
                "no-loss", f"the loss '{name}' is {described(tensor)}, it must be one number",
                place, "end with cross_entropy(…), or mean(…) over all dimensions",
            )  # fmt: skip
            return None
        return loss

    def _add(self, code: str, message: str, place: Place, hint: str = "") -> None:
        self.findings.add(code, message, place, hint)

    # ---- declarations ----------------------------------------------------------------------

    def _declare(self, scope: Scope, node: Node | None, make: Any) -> None:
        for key, value in node.entries if isinstance(node, Table) else []:
            if not isinstance(value, Scalar) or not self._new_name(scope, key):
                continue
            name = key.value
            scope.fixed.add(name)
            scope.names[name] = None
            try:
                found = declaration(value.value, self.dims)
                scope.names[name] = make(scope, name, found)
            except SizeError as error:
                self._add(error.code, error.message, value.place_of(error.offset), error.hint)
            except GraphError as error:
                self._add("bad-declaration", str(error), value.place)
            except Unknown:
                continue

    def _input(self, scope: Scope, name: str, d: Declaration) -> Ref:
        if not d.dtype:
            hint = 'ids are "i32[…]", images and other data "f32[…]"'
            raise SizeError("bad-declaration", f"input '{name}' has no type", hint)
        return Ref(scope.b.input(name, d.shape, d.dims, d.dtype))

    def _param(self, scope: Scope, name: str, d: Declaration) -> Ref:
        if d.dtype:
            hint = "leave the type out: training.params says it for all"
            raise SizeError("bad-declaration", f"parameter '{name}' has a type", hint)
        return Ref(scope.b.param(name, d.shape, d.dims))

    def _new_name(self, scope: Scope, key: Scalar) -> bool:
        name = key.value
        if not name.isidentifier():
            self._add("bad-name", f"'{name}' is no name", key.place, "letters, digits and _")
        elif scope.find(name) is not None:
            self._add("duplicate-name", f"'{name}' is defined before", key.place)
        elif name in self.dims:
            self._add("duplicate-name", f"'{name}' is also a dim", key.place)
        else:
            return True
        return False

    # ---- ops --------------------------------------------------------------------------------

    def _ops(self, scope: Scope, node: Node | None) -> None:
        items = node.items if isinstance(node, Listing) else []
        self.ops += len(items)
        if self.ops > MAX_OPS:
            self._add("too-large", f"more than {MAX_OPS} ops", items[0].place, "use repeat")
            return
        scope.steps = [self._step(item) for item in items]
        for i, step in enumerate(scope.steps):
            scope.at = i
            if isinstance(step.op, Statement) and isinstance(step.node, Scalar):
                self._statement(scope, step.op, step.node)
            elif isinstance(step.op, Block):
                self._repeat(scope, step.op)
            elif isinstance(step.op, StackEntry):
                self._stack(scope, step.op)

    def _step(self, node: Node) -> Step:
        if isinstance(node, Scalar):
            op = _parse(node, self.findings)
            if op is None:
                guess = node.value.split("=")[0].strip() if "=" in node.value else ""
                names = [n.strip() for n in guess.split(",")]
                return Step(node, None, frozenset(), tuple(names))
            reads = {part.id for part in ast.walk(op.value) if isinstance(part, ast.Name)}
            return Step(node, op, frozenset(reads), tuple(n for n, _ in op.targets))
        stack = stack_entry(node)
        if stack is not None:
            reads = {s.value for s in (stack.carry, stack.memory) if s}
            return Step(node, stack, frozenset(reads), (stack.carry.value,))
        block = _block(node)
        if block is None:
            return Step(node, None, frozenset(), ())
        inner = [self._reads_of(item) for item in block.ops.items]
        carry = tuple(c.value for c in block.carry)
        return Step(node, block, frozenset(carry).union(*inner), carry)

    def _reads_of(self, node: Node) -> frozenset[str]:
        """Names that an op reads, without a word about what is wrong with it."""
        return _Compiler(self.dims, Findings())._step(node).reads

    def _statement(self, scope: Scope, op: Statement, node: Scalar) -> None:
        allowed = [t for t in op.targets if self._may_define(scope, t[0], node.place_of(t[1]))]
        result: Any = None
        try:
            result = self._value(scope, op)
        except OpError as error:
            self._add(error.code, error.message, node.place_of(error.offset), error.hint)
        except Unknown:
            pass  # reported where it comes from
        values = result if isinstance(result, tuple) else (result,) * len(op.targets)
        for target, value in zip(op.targets, values, strict=True):
            if target in allowed and target[0] != "_":
                scope.names[target[0]] = value
                if scope.parent is None:
                    self.places[target[0]] = node.place_of(op.targets[0][1])

    def _value(self, scope: Scope, op: Statement) -> Any:
        """The result: a Ref or number, or a tuple of as many as there are targets."""
        evaluator = Evaluator(
            scope.b, self.dims, op.text, lambda name, at: self._lookup(scope, name, at)
        )
        value = evaluator.value(op.value, op.targets[0][0])
        start = offset_of(op.value, op.text)
        results = len(value) if isinstance(value, tuple) else 1
        if results != len(op.targets):
            raise OpError(
                "bad-argument", f"{results} results for {len(op.targets)} names", start,
                "write y, places = top_k(…)" if results == 2 else "",
            )  # fmt: skip
        if not isinstance(value, tuple | Ref | int | float):
            raise OpError("bad-argument", "this is no tensor", start)
        return value

    def _may_define(self, scope: Scope, name: str, place: Place) -> bool:
        owner = scope.find(name)
        if name in self.dims:
            self._add("duplicate-name", f"'{name}' is a dim", place)
        elif owner is not None and name in owner.fixed:
            self._add("duplicate-name", f"'{name}' is an input or parameter", place)
        elif owner is not None and owner is not scope:
            hint = f"add it to carry of '{scope.title}', or choose another name"
            self._add("not-carried", f"'{name}' is defined outside this repeat", place, hint)
        else:
            return True
        return False

    # ---- names ------------------------------------------------------------------------------

    def _lookup(self, scope: Scope, name: str, at: int) -> Any:
        owner = scope.find(name)
        if owner is not None:
            if owner.names[name] is None:
                raise Unknown
            return owner.names[name]
        if name in self.dims:
            return self.dims[name]
        raise self._unknown(scope, name, at)

    def _unknown(self, scope: Scope, name: str, at: int) -> OpError:
        outer: Scope | None = scope
        while outer is not None:
            current = outer.steps[outer.at] if outer.steps else None
            later = [
                s for s in outer.steps[outer.at :]
                if name in s.makes and not (s is current and not isinstance(s.op, Statement))
            ]  # fmt: skip
            if later:
                return self._too_early(outer, name, at, later[0])
            outer = outer.parent
        if name in self.inside:
            where = self.inside[name]
            hint = f"it exists only inside '{where}': carry it to read it afterwards"
            return OpError("unknown-tensor", f"unknown tensor '{name}'", at, hint)
        known = [*self._visible(scope), *self.dims.sizes]
        return OpError("unknown-tensor", f"unknown tensor '{name}'", at, nearest(name, known))

    def _too_early(self, scope: Scope, name: str, at: int, later: Step) -> OpError:
        current = scope.steps[scope.at]
        if later is current:
            message = f"'{name}' reads itself before it has a value"
            return OpError("used-before-definition", message, at)
        line = later.node.place.line
        if _depends(scope.steps[scope.at :], later, current):
            message = f"'{name}' (line {line}) depends on '{current.makes[0]}', which reads it"
            return OpError("cycle", message, at)
        message = f"'{name}' is defined later, in line {line}"
        return OpError("used-before-definition", message, at, "ops run from top to bottom")

    def _visible(self, scope: Scope | None) -> Iterable[str]:
        while scope is not None:
            yield from scope.names
            scope = scope.parent

    # ---- repeats ----------------------------------------------------------------------------

    def _repeat(self, scope: Scope, block: Block) -> None:
        title = block.repeat.get("name")
        times = self._times(block)
        if not isinstance(title, Scalar) or not self._new_title(scope, title):
            self._break(scope, block)
            return
        try:
            inner = Scope(scope.b.repeat(title.value, times), scope, title.value)
        except GraphError as error:
            self._add("bad-op", str(error), block.repeat.place)
            self._break(scope, block)
            return
        entries = self._enter(scope, inner, block)
        self._declare(inner, block.params, self._param)
        self._ops(inner, block.ops)
        self.inside.update((n, inner.title) for n in inner.names if n not in inner.carried)
        self._leave(scope, inner, entries)

    def _times(self, block: Block) -> int:
        node = block.repeat.get("times")
        if not isinstance(node, Scalar):
            return 1
        value = value_of(node)
        try:
            return evaluate(value, self.dims) if isinstance(value, int | str) else 1
        except SizeError as error:
            self._add(error.code, error.message, node.place_of(error.offset), error.hint)
        except Unknown:
            pass  # reported where the dim is defined
        return 1

    def _new_title(self, scope: Scope, title: Scalar) -> bool:
        if not title.value.isidentifier():
            self._add("bad-name", f"'{title.value}' is no name", title.place)
            return False
        others = [s.op for s in scope.steps[: scope.at] if isinstance(s.op, Block | StackEntry)]
        names = [other.title for other in others]
        if any(isinstance(n, Scalar) and n.value == title.value for n in names):
            self._add("duplicate-name", f"another repeat is called '{title.value}'", title.place)
            return False
        return True

    def _stack(self, scope: Scope, entry: StackEntry) -> None:
        """Layers of a named architecture: their result replaces what they carry."""
        carry = entry.carry
        allowed = self._new_title(scope, entry.title) and self._may_define(
            scope, carry.value, carry.place
        )
        result = None
        if allowed:
            x = self._read(scope, carry)
            memory = self._read(scope, entry.memory) if entry.memory else None
            if x and (memory or not entry.memory):
                result = build_stack(scope.b, entry, x, memory, self.dims, self.findings)
        scope.names[carry.value] = Ref(result) if result else None
        if scope.parent is None:
            self.places[carry.value] = entry.table.place

    def _read(self, scope: Scope, name: Scalar) -> Ref | None:
        """The tensor [B, S, D] called `name`; None (noted) if there is none."""
        try:
            found = self._lookup(scope, name.value, 0)
        except OpError as error:
            self._add(error.code, error.message, name.place, error.hint)
            return None
        except Unknown:
            return None
        t = scope.b.lookup(found) if isinstance(found, Ref) else None
        if t is None or len(t.shape) != 3 or t.dtype.startswith("i"):
            what = described(t) if t else "a number"
            message = f"'{name.value}' is {what}, layers work on [batch, positions, width]"
            self._add("bad-argument", message, name.place)
            return None
        return Ref(found)

    def _break(self, scope: Scope, block: Block) -> None:
        scope.names.update((c.value, None) for c in block.carry)

    def _enter(self, scope: Scope, inner: Scope, block: Block) -> list[tuple[Scalar, Ref, Ref]]:
        """Carried names inside; (name, outer tensor, entry) of those that are fine."""
        entries = []
        for name in block.carry:
            inner.carried.add(name.value)
            inner.names[name.value] = None
            try:
                outer = self._lookup(scope, name.value, 0)
            except OpError as error:
                self._add(error.code, error.message, name.place, error.hint)
                continue
            except Unknown:
                continue
            owner = scope.find(name.value)
            if not isinstance(outer, Ref) or (owner and name.value in owner.fixed):
                self._add(
                    "bad-argument", f"'{name.value}' cannot be carried", name.place,
                    "only results of ops change from run to run",
                )  # fmt: skip
                continue
            if owner is not scope:  # carried through several repeats: by each of them
                hint = f"add it to carry of '{scope.title}' too"
                self._add("not-carried", f"'{name.value}' is defined further out", name.place, hint)
                continue
            entry = Ref(inner.b.enter(outer))
            inner.names[name.value] = entry
            entries.append((name, outer, entry))
        return entries

    def _leave(self, scope: Scope, inner: Scope, entries: list[tuple[Scalar, Ref, Ref]]) -> None:
        carries, names = [], []
        for name, outer, entry in entries:
            result = inner.names[name.value]
            if isinstance(result, Ref) and self._may_leave(inner, name, entry, result):
                carries.append((outer, entry, result))
                names.append(name.value)
        broken = inner.carried - set(names)
        scope.names.update(dict.fromkeys(broken))
        if broken or any(value is None for value in inner.names.values()):
            scope.names.update(dict.fromkeys(names))
            return
        results = inner.b.end_repeat(carries)
        scope.names.update(zip(names, map(Ref, results), strict=True))

    def _may_leave(self, inner: Scope, name: Scalar, entry: Ref, result: Ref) -> bool:
        before, after = inner.b.lookup(entry), inner.b.lookup(result)
        if result == entry:
            message = f"'{name.value}' is carried, but no op of '{inner.title}' changes it"
            self._add("carry-unchanged", message, name.place, "remove it from carry")
        elif before.shape != after.shape:
            message = f"'{name.value}' enters '{inner.title}' as {described(before)}"
            self._add("carry-changed", f"{message} but leaves as {described(after)}", name.place)
        else:
            return True
        return False


def _block(node: Node) -> Block | None:
    if not isinstance(node, Table):
        return None
    repeat, params, ops = node.get("repeat"), node.get("params"), node.get("ops")
    if not isinstance(repeat, Table) or not isinstance(ops, Listing):
        return None
    carry = repeat.get("carry")
    items = carry.items if isinstance(carry, Listing) else []
    names = tuple(item for item in items if isinstance(item, Scalar))
    return Block(repeat, params if isinstance(params, Table) else None, ops, names)


def _depends(steps: list[Step], step: Step, on: Step) -> bool:
    """Whether `step` needs a result of `on`, directly or through other steps."""
    makers = {name: s for s in steps for name in s.makes}
    pending = [step]
    seen: set[str] = set()
    while pending:
        for name in pending.pop().reads - seen:
            seen.add(name)
            if name in on.makes:
                return True
            if name in makers:
                pending.append(makers[name])
    return False
