"""A physical topology: a chip and the ordered dimensions along which devices are wired."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np

from meshes.chip import Chip

#: What a dimension is made of.
#: ring / line: point-to-point links to two neighbours, with / without the wraparound link;
#: core: devices that share one chip and its links; switch: any-to-any inside a node;
#: network: any-to-any between nodes or pods, one port per device.
KINDS = ("ring", "line", "core", "switch", "network")


Curve = tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Dimension:
    """One physical dimension. Bandwidths are one-directional, in bytes per second.

    ring, line: `bytes_per_s` of a link, `latency_s` of a hop.
    core: `bytes_per_s` between the devices of a chip.
    switch: `curve` holds (group size, latency_s, bus bytes/s) of an all-reduce, which takes
    2 start_s + latency + 2 (n-1)/n bytes / bandwidth; `bytes_per_s` and `latency_s` are
    those of one sender and one receiver. `apart`: the curve of groups that are not neighbours,
    where that makes a difference (links without a switch).
    network: `bytes_per_s` of one device's share of the ports, `latency_s` of an all-reduce
    per doubling of the number of nodes.
    """

    name: str
    size: int
    kind: str
    bytes_per_s: float
    latency_s: float
    curve: Curve = ()
    apart: Curve = ()


@dataclass(frozen=True)
class Topology:
    """A machine: `links` from the outermost dimension to the innermost.

    Device ids count row-major over `links`: the last dimension (cores of a chip, GPUs of a
    node) runs fastest. `start_s` is the fixed cost of starting one collective.
    `notes` says which assumptions a reader should know.
    """

    name: str
    chip: Chip
    links: tuple[Dimension, ...]
    start_s: float
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes in chips: cores of a chip are not a dimension here."""
        return tuple(d.size for d in self.links if d.kind != "core")

    @property
    def chips(self) -> int:
        return prod(self.dims)

    @property
    def devices(self) -> int:
        return prod(d.size for d in self.links)

    def coordinates(self) -> np.ndarray:
        """[devices, len(links)]: where each device id sits. On TPU: (x, y[, z][, core])."""
        shape = tuple(d.size for d in self.links)
        return np.stack(np.unravel_index(np.arange(self.devices), shape), axis=-1)

    def describe(self) -> str:
        """One line: counts and wiring."""
        wiring = " × ".join(f"{d.size} {_KIND_WORDS[d.kind]}" for d in self.links)
        return f"{self.name}: {self.chips} chips, {self.devices} devices ({wiring})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that prices depend on."""
        chip = replace(self.chip, overlap=frozenset())  # a set prints in no stable order
        what = (self.name, chip, sorted(self.chip.overlap), self.links, self.start_s)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.fingerprint)


_KIND_WORDS = {
    "ring": "ring", "line": "line", "core": "cores", "switch": "on a switch",
    "network": "on a network",
}  # fmt: skip
