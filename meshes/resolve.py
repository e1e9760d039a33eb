"""A mesh by catalogue name or by path of a mesh file.

A mesh file either changes a catalogue entry:

    base: tpu-v3:32x32
    name: pod-with-a-slow-side          # optional
    chip: {usable_bytes: 30GiB}         # per chip
    dims:
      y: {bytes_per_s: 35e9, kind: line}

or gives a machine in full: `name`, `chip`, and `dims` as a list from the outermost to the
innermost dimension, each with name, size, kind (ring, line, core, switch, network),
bytes_per_s and latency_s. Units are in docs/hardware.md.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from meshes.catalogue import from_name
from meshes.document import Section, from_yaml, parse
from meshes.errors import MeshError
from meshes.read import read_chip, read_curve, read_dimension
from meshes.topology import KINDS, Curve, Dimension, Topology
from meshes.yamltree import YamlProblem, read_text

_SUFFIXES = (".yaml", ".yml")
_CHANGES = ("size", "kind", "bytes_per_s", "latency_s", "curve", "curve_apart")


def resolve(name_or_path: str) -> Topology:
    """Topology of a catalogue name (`tpu-v3:32x32`, `dgx-a100-80gb:128x8`) or a mesh file.

    Anything that ends in .yaml or .yml, or names an existing file, is a file. Raises
    MeshError: `unknown-chip`, `bad-name`, `bad-size`, `too-large`, `no-file`, and for what a
    file says wrong, with line and column, `unknown-key`, `missing-key`, `duplicate-key`,
    `wrong-type`, `bad-value` and the codes of `yamltree`.
    """
    path = Path(name_or_path)
    if name_or_path.endswith(_SUFFIXES) or path.is_file():
        return from_file(path)
    return from_name(name_or_path)


def from_file(path: Path) -> Topology:
    """Topology of a mesh file."""
    try:
        text = read_text(path)
    except YamlProblem as problem:
        raise from_yaml(problem) from None
    except OSError as error:
        reason = error.strerror or "not readable"
        raise MeshError("no-file", f"cannot read mesh file {path}: {reason}") from None
    return from_text(text, str(path))


def from_text(text: str, file: str) -> Topology:
    """Topology of a mesh file's text; `file` is what errors call it."""
    top = parse(text, file)
    default_name = Path(file).stem
    return _changed(top, default_name) if top.has("base") else _whole(top, default_name)


def _whole(top: Section, default_name: str) -> Topology:
    top.allow(("schema_version", "name", "chip", "dims", "start_s"))
    _check_version(top)
    name = top.text("name", default_name)
    chip = read_chip(top.section("chip"), f"{name}-chip")
    sections = top.sections("dims")
    links = tuple(read_dimension(section) for section in sections)
    topology = Topology(name, chip, links, top.number("start_s", 0.0))
    return _checked(topology, top)


def _changed(top: Section, default_name: str) -> Topology:
    top.allow(("schema_version", "base", "name", "chip", "dims", "start_s"))
    _check_version(top)
    try:
        base = from_name(top.text("base"))
    except MeshError as error:
        raise top.error(f"base: {error.message}", error.hint, top.child("base")) from None
    chip = base.chip
    if top.has("chip"):
        chip = read_chip(top.section("chip"), chip.name, chip)
    links = base.links
    if top.has("dims"):
        changes = top.section("dims")
        changes.allow([dim.name for dim in links])
        links = tuple(_change(dim, changes) for dim in links)
    start = top.number("start_s", base.start_s)
    return _checked(Topology(top.text("name", default_name), chip, links, start), top)


def _change(dim: Dimension, changes: Section) -> Dimension:
    if not changes.has(dim.name):
        return dim
    change = changes.section(dim.name)
    change.allow(_CHANGES)
    kind = change.text("kind", dim.kind)
    if kind not in KINDS:
        hint = f"one of {', '.join(KINDS)}"
        raise change.error(f"unknown kind {kind!r}", hint, change.child("kind"))
    if kind != dim.kind and {kind, dim.kind} != {"ring", "line"}:
        raise change.error(
            f"cannot turn a {dim.kind} into a {kind}", "give the machine in full, without base",
            change.child("kind"),
        )
    rate = change.positive("bytes_per_s", dim.bytes_per_s)
    # A faster or slower switch: whole curves scale with the point-to-point rate.
    factor = rate / dim.bytes_per_s

    def curve(key: str, old: Curve) -> Curve:
        if change.has(key):
            return read_curve(change.section(key))
        return tuple((n, latency, b * factor) for n, latency, b in old)

    return replace(
        dim, size=change.count("size", dim.size), kind=kind, bytes_per_s=rate,
        latency_s=change.number("latency_s", dim.latency_s),
        curve=curve("curve", dim.curve), apart=curve("curve_apart", dim.apart),
    )  # fmt: skip


def _check_version(top: Section) -> None:
    if top.count("schema_version", 1) != 1:
        raise top.error("schema_version must be 1", at=top.child("schema_version"))


def _checked(topology: Topology, top: Section) -> Topology:
    """A topology that the cost model can read, or MeshError."""
    links = topology.links
    names = [dim.name for dim in links]
    at = top.child("dims") if top.has("dims") else top.node
    if not links:
        raise top.error("dims is empty", "give at least one dimension", at)
    if len(set(names)) != len(names):
        raise top.error(f"dimension names must differ: {', '.join(names)}", at=at)
    cores = prod(dim.size for dim in links if dim.kind == "core")
    if cores != topology.chip.devices_per_chip:
        raise top.error(
            f"core dimensions hold {cores} devices, the chip has {topology.chip.devices_per_chip}",
            "add a dimension of kind core as long as devices_per_chip", at,
        )  # fmt: skip
    order = [_RANK[dim.kind] for dim in links]
    if order != sorted(order):
        raise top.error(
            "dimensions must go from the outermost to the innermost",
            "network, then ring, line or switch, then core", at,
        )  # fmt: skip
    return topology


_RANK = {"network": 0, "ring": 1, "line": 1, "switch": 1, "core": 2}
