"""The machines we know: names, and what a name with sizes resolves to.

`tpu-v3:32x32` counts chips, `dgx-a100-80gb:128` nodes, `dgx-a100-80gb:16x4` nodes × GPUs.
The data are `catalogue/*.yaml`; the rules how dimensions are wired are here.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from importlib.resources import files
from math import prod

from meshes.chip import Chip
from meshes.document import Section, parse
from meshes.errors import MeshError
from meshes.read import read_chip, read_curve
from meshes.topology import Dimension, Topology

ALIASES = {
    "p3.16xlarge": "v100-8", "aws-p3": "v100-8", "dgx-a100": "dgx-a100-80gb",
    "tpu-ironwood": "tpu-v7", "tpu7x": "tpu-v7", "tpu-v7x": "tpu-v7", "tpu-trillium": "tpu-v6e",
}  # fmt: skip


@lru_cache(maxsize=1)
def _entries() -> dict[str, str]:
    folder = files("meshes") / "catalogue"
    found = {f.name[: -len(".yaml")]: f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def names() -> list[tuple[str, str]]:
    """(name, one line about it) of every catalogue entry, sorted."""
    return [(name, parse(text, name).text("summary")) for name, text in _entries().items()]


def catalogue_text(name: str) -> str:
    """The YAML of one entry, constants with their sources; MeshError for an unknown name."""
    return _entries()[_known(name)]


@lru_cache(maxsize=64)
def from_name(name: str) -> Topology:
    """Topology of `entry:sizes`; MeshError `unknown-chip`, `bad-name`, `bad-size`, `too-large`."""
    entry, colon, sizes_text = name.partition(":")
    key = _known(entry)
    document = parse(_entries()[key], f"{key}.yaml")
    if not colon:
        example = document.text("example")
        raise MeshError("bad-name", f"{name!r} has no size", f"for example {example}")
    sizes = _sizes(name, sizes_text, document.text("example"))
    chip = read_chip(document.section("chip"), key)
    builder = _torus if document.has("torus") else _nodes
    return builder(f"{key}:{sizes_text}", document, chip, sizes)


def _known(entry: str) -> str:
    entry = ALIASES.get(entry, entry)
    if entry in _entries():
        return entry
    known = [*_entries(), *ALIASES]
    near = difflib.get_close_matches(entry, known, 3, 0.4)
    near = near or difflib.get_close_matches(f"tpu-{entry}", known, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_entries())}"
    raise MeshError("unknown-chip", f"no mesh called {entry!r}", hint)


def _sizes(name: str, text: str, example: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d+(x-?\d+)*", text):
        raise MeshError(
            "bad-name", f"{name!r}: sizes must be whole numbers joined by x, got {text!r}",
            f"for example {example}",
        )  # fmt: skip
    sizes = tuple(int(part) for part in text.split("x"))
    if min(sizes) < 1:
        raise MeshError("bad-size", f"{name!r}: every size must be at least 1")
    return sizes


def _torus(name: str, document: Section, chip: Chip, sizes: tuple[int, ...]) -> Topology:
    torus = document.section("torus")
    dims = torus.texts("dims")
    if len(sizes) != len(dims):
        example = document.text("example")
        raise MeshError(
            "bad-size",
            f"{name!r}: this chip's torus has {len(dims)} dimensions, got {len(sizes)}",
            f"for example {example}; a missing dimension is 1",
        )
    _within_pod(name, torus, sizes)
    rate, hop = torus.positive("link_bytes_per_s"), torus.number("hop_s")
    wraps = _wraps(torus.section("wraps"), sizes)
    links = [
        Dimension(dim, size, "ring" if wrap else "line", rate, hop)
        for dim, size, wrap in zip(dims, sizes, wraps, strict=True)
    ]
    if chip.devices_per_chip > 1:
        between = torus.positive("core_bytes_per_s")
        links.append(Dimension("core", chip.devices_per_chip, "core", between, 0.0))
    return Topology(name, chip, tuple(links), torus.number("start_s"))


def _within_pod(name: str, torus: Section, sizes: tuple[int, ...]) -> None:
    chips, limit = prod(sizes), torus.count("max_chips")
    if chips > limit:
        raise MeshError(
            "too-large", f"{name!r} has {chips} chips; the largest pod has {limit}",
            "more chips than a pod need a network between pods: write a mesh file",
        )  # fmt: skip
    longest = torus.count("max_dim", limit)
    if max(sizes) > longest:
        raise MeshError(
            "too-large", f"{name!r}: a dimension of {max(sizes)}; the longest is {longest}"
        )


def _wraps(rule: Section, sizes: tuple[int, ...]) -> tuple[bool, ...]:
    """Which dimensions have the wraparound link."""
    inner = rule.section("value") if rule.has("value") else rule
    if inner.has("exactly"):
        return tuple(size == inner.count("exactly") for size in sizes)
    every = inner.count("all_multiples_of")
    whole = all(size % every == 0 for size in sizes)
    return tuple(whole for _ in sizes)


def _nodes(name: str, document: Section, chip: Chip, sizes: tuple[int, ...]) -> Topology:
    node, network = document.section("node"), document.section("network")
    full = node.count("gpus")
    if len(sizes) > 2:
        raise MeshError("bad-size", f"{name!r}: expected NODES or NODESxGPUS")
    nodes, gpus = sizes if len(sizes) == 2 else (sizes[0], full)
    if gpus > full:
        raise MeshError("too-large", f"{name!r}: a node has {full} GPUs, got {gpus}")
    start = node.number("start_s")  # of an all-reduce; the curve's latencies contain it
    curve, apart = (
        tuple((n, max(a - start, 0.0), b) for n, a, b in read_curve(node.section(key)))
        if node.has(key) else ()
        for key in ("curve", "curve_apart")
    )  # fmt: skip
    rate, latency = network.positive("bytes_per_s"), network.number("latency_s")
    direct = node.positive("point_to_point_bytes_per_s")
    links = (
        Dimension("node", nodes, "network", rate, latency),
        Dimension("gpu", gpus, "switch", direct, curve[0][1] / 2, curve, apart),
    )
    return Topology(name, chip, links, start / 2)
