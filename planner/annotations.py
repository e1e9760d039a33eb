"""What a user pastes into a program: for every tensor of the model, the mesh axes per dimension.

From a Result to annotations and back into no one's format: JSON, Python and reports all show
these. Stacked layer dimensions are left out, so that stacked and unstacked layers read alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from planner.graph.core import Graph, Loop, Tensor
from planner.result import Result
from planner.sharding.choices import WHOLE_NAMES

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Annotated:
    """One tensor of the model as the plan lays it: `stacked` leading dimensions are whole and
    not part of `axes`, `dims` and `shape`. `members`: of layers that are written out in the model
    file, its tensors that this one stands for."""

    name: str
    role: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    axes: Axes
    stacked: tuple[int, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def parameter(self) -> bool:
        return self.role == "parameter"

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.members[0]} … {self.members[-1]}" if self.members else self.name

    def apart(self) -> list[Annotated]:
        """The tensors of the model file that it stands for, each by itself."""
        if not self.members:
            return [self]
        return [replace(self, name=name, stacked=(), members=()) for name in self.members]


def annotated(result: Result) -> list[Annotated]:
    """Parameters first, then inputs, caches and activations, each in the order of the model; like
    layers together, also where the model file writes them out.

    Left out are tensors that only the backward pass or the compiler sees, values that are still
    partial sums, which no annotation can express, and what takes over an input's memory: it lies
    like that.
    """
    return sorted(_annotated(result), key=lambda a: _ORDER.get(a.role, len(_ORDER)))


def written_out(result: Result) -> list[Annotated]:
    """The same, every tensor of the model file by itself."""
    return [tensor for a in annotated(result) for tensor in a.apart()]


_ORDER = {"parameter": 0, "input": 1, "cache": 2}


def _annotated(result: Result) -> Iterator[Annotated]:
    members = result.model.members
    hidden = _slices(result.model.graph) | set(result.model.graph.aliases)
    # What leaves a loop is a tensor of its last layer; what enters it has a name outside.
    hidden |= {name for names in members.values() for name in names} - members.keys()
    hidden |= {name for name, names in members.items() if not names}
    for name, tensor in result.model.graph.all_tensors().items():
        spec = None if name in hidden else result.specs.get(name)
        if spec is None or spec.partial or (not tensor.shape and tensor.role != "parameter"):
            continue
        stacked = stacked_dims(tensor)
        # An input of an accumulated step lies like one slice of it.
        axes = spec.dims[len(spec.dims) - len(tensor.shape) + stacked :]
        yield Annotated(
            name, tensor.role, tensor.dtype, tensor.dims[stacked:], tensor.shape[stacked:], axes,
            tensor.shape[:stacked], members.get(name, ()),
        )  # fmt: skip


def _slices(graph: Graph) -> set[str]:
    """One iteration's pieces of stacked tensors: the whole stack stands for them."""
    found: set[str] = set()
    for node in graph.nodes:
        if isinstance(node, Loop):
            found.update(s.inner for s in node.reads)
            found |= _slices(node.body)
    return found


def stacked_dims(tensor: Tensor) -> int:
    """How many leading dimensions count layers."""
    count = 0
    while count < len(tensor.dims) and tensor.dims[count] in WHOLE_NAMES:
        count += 1
    return count


def axes_by_name(result: Result) -> dict[str, Axes]:
    return {a.name: a.axes for a in written_out(result)}


def as_lists(annotation: Mapping[str, Axes]) -> dict[str, list[list[str]]]:
    """The JSON form."""
    return {name: [list(d) for d in axes] for name, axes in annotation.items()}
