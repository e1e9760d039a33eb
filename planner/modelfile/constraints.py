"""`constraints:` against the graph they pin and the mesh they pin it to."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from meshes.yamltree import Listing, Node, Place, Table
from planner.graph.core import ARGUMENTS, Graph, Loop, Tensor
from planner.modelfile.diagnostics import Findings, nearest
from planner.sharding.spec import divides

Axes = tuple[tuple[str, ...], ...]


def unstacked(graph: Graph) -> dict[str, Tensor]:
    """Every tensor that can be annotated, with its dimensions as an annotation counts them: those
    that repeats put in front of a parameter or a cache are left out."""
    found = {name: t for name, t in graph.all_tensors().items() if "[i]" not in name}
    for name, inner in _slices(graph).items():
        if name in found:
            found[name] = inner
    return found


def _slices(graph: Graph) -> dict[str, Tensor]:
    """Stacked tensor → its slice in the innermost loop."""
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        if isinstance(node, Loop):
            deeper = _slices(node.body)
            for stack in (*node.reads, *node.writes):
                found[stack.outer] = deeper.get(stack.inner, node.body.tensors[stack.inner])
    return found


def check_constraints(
    given: Mapping[str, list[tuple[str, ...]]], node: Table, graph: Graph,
    shape: Mapping[str, int] | None, uneven: bool, findings: Findings,
) -> dict[str, Axes]:  # fmt: skip
    """Constraints that can hold; the others are noted. `shape`: axis sizes if they are known;
    `uneven`: what is no argument of the step may be padded."""
    tensors = unstacked(graph)
    found = {}
    for key, value in node.entries:
        if key.value not in given:  # noted already
            continue
        tensor = tensors.get(key.value)
        if tensor is None:
            hint = nearest(key.value, tensors, "name a tensor of the graph: embed, layers.w_in …")
            findings.add("unknown-tensor", f"unknown tensor '{key.value}'", key.place, hint)
            continue
        axes = tuple(given[key.value])
        padded = uneven and tensor.role not in ARGUMENTS
        if _fits(tensor, axes, value, shape, padded, findings):
            found[key.value] = axes
    return found


def _fits(
    tensor: Tensor, axes: Axes, node: Node, shape: Mapping[str, int] | None, uneven: bool,
    findings: Findings,
) -> bool:  # fmt: skip
    before = len(findings.diagnostics)
    name = tensor.name.replace("[i]", "")
    if len(axes) != len(tensor.shape):
        hint = f"its dimensions: {', '.join(tensor.dims) or 'none'}"
        message = f"'{name}' has {len(tensor.shape)} dimensions, {len(axes)} are given"
        findings.add("wrong-rank", message, node.place, hint)
        return False
    seen: set[str] = set()
    for i, entry in enumerate(axes):
        for k, axis in enumerate(entry):
            _check_axis(axis, seen, shape, _place(node, i, k), findings)
            seen.add(axis)
        parts = prod((shape or {}).get(axis, 1) for axis in entry)
        if not divides(tensor.shape[i], parts, uneven):
            findings.add(
                "not-divisible", f"dimension {tensor.dims[i]} of '{name}' is {tensor.shape[i]}, "
                f"which does not divide into {parts}", _place(node, i, 0),
                _not_even(tensor, tensor.shape[i], parts),
            )  # fmt: skip
    return len(findings.diagnostics) == before


def _not_even(tensor: Tensor, size: int, parts: int) -> str:
    """What could be done about a dimension that does not divide evenly."""
    if tensor.role in ARGUMENTS:
        return "JAX takes arguments only in equal shards"
    return "uneven: true permits padding" if divides(size, parts, True) else ""


def _check_axis(
    axis: str, seen: set[str], shape: Mapping[str, int] | None, place: Place, findings: Findings
) -> None:
    if axis in seen:
        message = f"axis '{axis}' is used twice: it can split one dimension of a tensor"
        findings.add("axis-twice", message, place)
    elif shape is not None and axis not in shape:
        hint = nearest(axis, shape)
        findings.add("unknown-axis", f"the mesh has no axis '{axis}'", place, hint)


def _place(node: Node, dim: int, entry: int) -> Place:
    """The place of an axis; of the whole constraint where YAML has no node for it."""
    for index in (dim, entry):
        if isinstance(node, Listing) and index < len(node.items):
            node = node.items[index]
    return node.place
