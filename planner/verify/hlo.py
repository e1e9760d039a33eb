"""Scheduled HLO text as data: computations, instructions, shapes, replica groups, trip counts.

Understands what the TPU, GPU and CPU compilers print. What the instructions amount to (executed
collectives, FLOPs, cycles) is read by `hlo_reading.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, prod

import numpy as np

HLO_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
    "f8e4m3": 1, "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "c64": 8, "c128": 16,
    "token": 0, "opaque": 0,
}  # fmt: skip

MOST_CYCLES = 2**63 - 1  # an estimate that has run over

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{\s*$")
_RESULT = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<sizes>[\d,<=]*)\]")
# Commas stand outside brackets in this one.
_GROUPS_OF_A_MESH = re.compile(r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\S+)? \{[^{}]*\})")
_MARK = re.compile(r'[",()\[\]{}]')
_REFERENCE = re.compile(r"%?([\w.\-]+)$")


class HloError(ValueError):
    """Text that is no HLO this parser knows."""


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        if self.dtype not in HLO_BYTES:
            raise HloError(f"unknown element type '{self.dtype}'")
        return prod(self.shape) * HLO_BYTES[self.dtype]


@dataclass(frozen=True)
class Instruction:
    """One line. `shape`: the arrays of the result, tuples flattened; `rest`: its attributes."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses
    rest: str
    root: bool = False

    def attribute(self, key: str) -> str | None:
        """Text of attribute `key` up to the next attribute of the instruction."""
        found = re.search(rf"(?:^|, ){key}=", self.rest)
        return _balanced(self.rest[found.end() :]) if found else None

    @property
    def replica_groups(self) -> np.ndarray:
        """Groups as rows of partition numbers; none if all partitions are one group."""
        mesh = _GROUPS_OF_A_MESH.search(self.rest)
        return replica_groups(mesh[1] if mesh else self.attribute("replica_groups") or "{}")

    def called(self, key: str) -> str | None:
        value = self.attribute(key)
        return value.lstrip("%") if value else None

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def estimated_cycles(self) -> float:
        """Infinite where the compiler's own estimate has run over."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        cycles = int(found.group(1)) if found else 0
        return inf if cycles == MOST_CYCLES else float(cycles)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]
    by_name: Mapping[str, Instruction] = field(repr=False)

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @cached_property
    def readers(self) -> Mapping[str, Sequence[Instruction]]:
        """The instructions that read a value, by its name."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found

    def operand_arrays(self, instruction: Instruction) -> tuple[Array, ...]:
        """The arrays that an instruction reads."""
        return tuple(a for name in instruction.operands for a in self.by_name[name].shape)


@dataclass(frozen=True)
class Module:
    name: str
    entry: str
    computations: Mapping[str, Computation]


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` or an XLA dump shows. Raises HloError."""
    computations: dict[str, Computation] = {}
    entry, current = "", ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        header = _HEADER.match(line) if not line.startswith(" ") else None
        if header:
            current, lines = header["name"], []
            entry = current if header["entry"] else entry
        elif line.startswith("}") and current:
            by_name = {i.name: i for i in lines}
            computations[current] = Computation(current, tuple(lines), by_name)
            current = ""
        elif current:
            instruction = _instruction(line)
            if instruction is not None:
                lines.append(instruction)
    if entry not in computations:
        raise HloError("no ENTRY computation: this is not the text of an HLO module")
    title = re.search(r"HloModule ([^\s,]+)", text)
    return Module(title.group(1) if title else "", entry, computations)


def _instruction(line: str) -> Instruction | None:
    start = _RESULT.match(line)
    if start is None:
        return None
    shape_text, rest = _shape(line[start.end() :])
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise HloError(f"cannot read the instruction: {line.strip()[:120]}")
    inside = _closed(rest[opcode.end() - 1 :])
    after = rest[opcode.end() + len(inside) + 1 :]
    return Instruction(
        start["name"], opcode["opcode"], arrays(shape_text), _operands(opcode["opcode"], inside),
        inside, after.removeprefix(", "), bool(start["root"]),
    )  # fmt: skip


def _shape(text: str) -> tuple[str, str]:
    """The result's shape in front of `text`, and what follows."""
    if text.startswith("("):
        inner = _closed(text)
        return inner, text[len(inner) + 2 :]
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closed(text: str) -> str:
    """What is inside the bracket that `text` starts with; quoted brackets do not count."""
    end = _end(text, "")
    if end is None:
        raise HloError(f"unclosed bracket: {text[:80]}")
    return text[1:end]


def _balanced(text: str) -> str:
    """`text` up to its first comma outside brackets and quotes."""
    return text[: _end(text, ",")]


def _end(text: str, stop: str) -> int | None:
    """Where the first character of `stop` stands outside brackets and quotes; if `stop` is empty,
    where the first bracket closes."""
    depth, quoted = 0, False
    for found in _MARK.finditer(text):
        c, i = found[0], found.start()
        if c == '"':
            quoted ^= text[i - 1] != "\\"
        elif quoted:
            continue
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0 and not stop:
                return i
        elif depth == 0 and c in stop:
            return i
    return None


def arrays(text: str) -> tuple[Array, ...]:
    """Arrays named in a shape text: layouts and tuple brackets are skipped."""
    found = []
    for match in _ARRAY.finditer(re.sub(r"\{[^{}]*\}", "", text)):
        sizes = [s.lstrip("<=") for s in match["sizes"].split(",") if s]
        found.append(Array(match["dtype"], tuple(int(s) for s in sizes)))
    return tuple(found)


def _operands(opcode: str, inside: str) -> tuple[str, ...]:
    if opcode in ("constant", "parameter", "iota"):
        return ()
    names, rest = [], re.sub(r"/\*.*?\*/", "", inside)
    while rest:
        part = _balanced(rest)
        found = _REFERENCE.search(part.strip())
        if found:
            names.append(found.group(1))
        rest = rest[len(part) + 1 :]
    return tuple(names)


# ---- trip counts ---------------------------------------------------------------------------------


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often the body of a `while` runs: as printed, or from the constants of its condition.

    Raises HloError if the condition does not compare a counter with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)"?\}', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition") or ""]
    compare, scope = _comparison(module, condition)
    limit, index = _bound_and_counter(scope, compare)
    if limit is None:
        raise HloError(f"cannot tell how often '{loop.name}' runs")
    first = _initial(computation, loop, index)
    step = _step(module, loop, index)
    direction = compare.attribute("direction")
    stops = {"LT": limit, "LE": limit + 1, "NE": limit, "GT": limit, "GE": limit - 1}
    if direction not in stops:
        raise HloError(f"cannot tell how often '{loop.name}' runs: compares {direction}")
    return len(range(first, stops[direction], step))


def _comparison(module: Module, condition: Computation) -> tuple[Instruction, Computation]:
    """The compare of a condition, looked for in what its root calls too."""
    scope, found = condition, condition.root
    called = found.called("calls") or found.called("to_apply")
    if found.opcode in ("fusion", "call") and called:
        scope = module.computations[called]
        found = scope.root
    if found.opcode != "compare":
        raise HloError(f"the condition '{condition.name}' does not end with a comparison")
    if scope is condition:
        return found, scope
    # Operands of the fused comparison are parameters: put what they stand for in their place.
    outer = condition.root.operands
    by_name = dict(scope.by_name)
    for i in scope.instructions:
        if i.opcode == "parameter":
            by_name[i.name] = condition.by_name[outer[int(i.argument)]]
    merged = {**condition.by_name, **by_name}
    return found, Computation(condition.name, tuple(merged.values()), merged)


def _bound_and_counter(scope: Computation, compare: Instruction) -> tuple[int | None, int]:
    limit, index = None, 0
    for name in compare.operands:
        operand = _through_copies(scope, scope.by_name[name])
        if operand.opcode == "constant":
            limit = int(operand.argument)
        elif operand.opcode == "get-tuple-element":
            index = int(operand.attribute("index") or 0)
    return limit, index


def _initial(computation: Computation, loop: Instruction, index: int) -> int:
    """First value of the counter; 0 where it is no constant (JAX's loops count from 0)."""
    start = computation.by_name[loop.operands[0]]
    if start.opcode != "tuple":
        return 0
    value = _through_copies(computation, computation.by_name[start.operands[index]])
    return int(value.argument) if value.opcode == "constant" else 0


def _step(module: Module, loop: Instruction, index: int) -> int:
    """By how much the body changes the counter: unrolled loops count by more than one.

    Raises HloError if the body does not add a constant.
    """
    body = module.computations[loop.called("body") or ""]
    changed = _through_copies(body, body.by_name[body.root.operands[index]])
    scope = body
    if changed.opcode == "fusion":
        scope = module.computations[changed.called("calls") or ""]
        changed = scope.root
    if changed.opcode in ("add", "subtract"):
        for name in changed.operands:
            operand = _through_copies(scope, scope.by_name[name])
            if operand.opcode == "parameter" and scope is not body:
                outer = body.by_name[body.root.operands[index]].operands[int(operand.argument)]
                operand = _through_copies(body, body.by_name[outer])
            if operand.opcode == "constant":
                return int(operand.argument) * (1 if changed.opcode == "add" else -1)
    raise HloError(f"cannot tell how the counter of '{loop.name}' changes")


def _through_copies(scope: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = scope.by_name[instruction.operands[0]]
    return instruction


# ---- replica groups ------------------------------------------------------------------------------


def replica_groups(text: str) -> np.ndarray:
    """Groups as rows of partition numbers, from any of the syntaxes that XLA prints.

    {{0,1},{2,3}}; [2,2]<=[4]; [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2] {'b'}, also with parts of
    axes, 'a':(1)2, and with an explicit order of devices.
    """
    if text.startswith("{"):
        rows = re.findall(r"\{([\d,]*)\}", text[1:-1])
        return np.array([[int(n) for n in row.split(",") if n] for row in rows])
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        raise HloError(f"cannot read the replica groups {text[:60]}")
    shape, source = _numbers(iota[1]), _numbers(iota[2])
    ids = np.arange(prod(source)).reshape(source)
    if iota[3]:
        ids = ids.transpose(_numbers(iota[3]))
    return ids.reshape(shape)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


_DEVICE_IDS = re.compile(
    r"device_ids=\(?(?P<iota>\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|\[(?P<shape>[\d,]+)\]T\((?P<turned>[\d,]+)\)|\[(?P<listed>[\d,]+)\])"
)


def _device_ids(text: str, ids: np.ndarray) -> np.ndarray:
    """The devices in the order of a mesh's axes: `ids` unless the text says otherwise."""
    order = _DEVICE_IDS.search(text)
    if order is None:
        return ids
    if order["listed"]:
        return np.array(_numbers(order["listed"]))
    if order["shape"]:
        grid = ids.reshape(_numbers(order["shape"]))
        return grid.transpose(_numbers(order["turned"])).reshape(-1)
    return replica_groups(order["iota"]).reshape(-1)


def _mesh_groups(text: str) -> np.ndarray:
    head = re.match(r"mesh\[(.*?)\]", text)
    chosen = re.search(r"\{([^{}]*)\}$", text)
    if head is None or chosen is None:
        raise HloError(f"cannot read the replica groups {text[:60]}")
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", head[1])}
    ids = np.arange(prod(sizes.values()))
    ids = _device_ids(text, ids)
    parts: list[int] = []  # every axis is cut into parts, some of which are chosen
    wanted: list[int] = []
    picks = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen[1])
    for name, size in sizes.items():
        own = [(int(pre or 1), int(n or size)) for axis, pre, n in picks if axis == name]
        done = 1
        for before, n in sorted(own):
            if before > done:
                parts.append(before // done)
            wanted.append(len(parts))
            parts.append(n)
            done = before * n
        if size > done:
            parts.append(size // done)
    rest = [i for i in range(len(parts)) if i not in wanted]
    count = prod(parts[i] for i in wanted)
    return ids.reshape(parts).transpose(rest + wanted).reshape(-1, count)
