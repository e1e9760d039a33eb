"""Layouts by rules: which mesh axis splits which dimension of a model's tensors.

Rules are `dimension: axes`, in order of precedence, for parameters and for activations. They turn
a way of sharding (data parallel, FSDP, GSPMD's 2-D, Megatron's) into the annotation of every
tensor of a model. An axis splits one dimension of a tensor, and only where it divides evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.annotations import stacked_dims
from planner.graph.core import Graph, Tensor
from planner.graph.fuse import fuse_graph
from planner.graph.optimizers import MASTER
from planner.model import Model, Training

Rules = Mapping[str, tuple[str, ...]]
Axes = tuple[tuple[str, ...], ...]

MOMENTS = {"momentum": ("m",), "adam": ("m", "v"), "adamw": ("m", "v")}  # shaped as parameters


@dataclass(frozen=True)
class Layout:
    """`states`: of optimizer states, as the parameters if None. `literal`: products read their
    operands as they lie, as programs written by hand do; a sequence split by `gathered` axes is
    gathered before products (sequence parallelism)."""

    parameters: Rules = field(default_factory=dict)
    activations: Rules = field(default_factory=dict)
    states: Rules | None = None
    literal: bool = False

    @property
    def axes(self) -> set[str]:
        """All mesh axes that the rules name."""
        rules = (self.parameters, self.activations, self.states or {})
        return {axis for rule in rules for axes in rule.values() for axis in axes}


@dataclass(frozen=True)
class Laid:
    """What `price_annotations` takes."""

    annotation: Mapping[str, Axes]
    as_laid: frozenset[str]


def lay(model: Model, layout: Layout, sizes: Mapping[str, int]) -> Laid:
    """The annotation of every tensor of the model's fused forward graph."""
    graph = fuse_graph(model.graph)
    found: dict[str, Axes] = {}
    literal: set[str] = set()
    for name, tensor in graph.all_tensors().items():
        if tensor.role == "parameter" and name in graph.tensors:
            found[name] = laid(tensor, layout.parameters, sizes)
            continue
        if tensor.role == "parameter" or not tensor.shape:
            continue
        found[name] = laid(tensor, layout.activations, sizes)
        if layout.literal and not _gathered(tensor, found[name]):
            literal.add(name)
    states = _states(graph, model.training, layout, sizes)
    if layout.literal:
        literal |= set(states)
    return Laid({**found, **states}, frozenset(literal))


def laid(tensor: Tensor, rules: Rules, sizes: Mapping[str, int]) -> Axes:
    """Axes of every dimension, stacked ones left out."""
    stacked = stacked_dims(tensor)
    dims, shape = tensor.dims[stacked:], tensor.shape[stacked:]
    found: list[list[str]] = [[] for _ in dims]
    used: set[str] = set()
    for dim, axes in rules.items():
        if dim not in dims:
            continue
        at = dims.index(dim)
        left = shape[at]
        for axis in axes:
            if axis not in used and left % sizes[axis] == 0:
                found[at].append(axis)
                used.add(axis)
                left //= sizes[axis]
    return tuple(tuple(axes) for axes in found)


def _states(
    graph: Graph, training: Training, layout: Layout, sizes: Mapping[str, int]
) -> dict[str, Axes]:
    rules = layout.parameters if layout.states is None else layout.states
    found: dict[str, Axes] = {}
    for parameter in graph.parameters():
        axes, base = laid(parameter, rules, sizes), parameter.name
        if training.master and parameter.dtype != MASTER:
            base = f"{parameter.name}.master"
            found[base] = axes
        found |= {f"{base}.{moment}": axes for moment in MOMENTS.get(training.optimizer, ())}
    return found


def _gathered(tensor: Tensor, axes: Axes) -> bool:
    """Whether products gather the tensor: what is split along the sequence, but not by heads."""
    split = {d for d, a in zip(tensor.dims, axes, strict=True) if a}
    return "S" in split
