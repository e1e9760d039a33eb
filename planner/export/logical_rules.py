"""Logical-axis rules for Flax and MaxText: dimension names to mesh axes.

A rule says where a *name* lies, a plan where every *tensor* lies. Where tensors disagree about
a name, Flax gets one name per way of lying; MaxText's names are fixed, so there the larger
tensors decide and the others are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from planner.annotations import Annotated, written_out
from planner.export.stamp import signature
from planner.result import Result

Axes = tuple[str, ...]

# What MaxText calls the dimensions of weights and of activations (its configs/base.yml).
MAXTEXT_WEIGHTS = {
    "D": "embed", "F": "mlp", "N": "q_heads", "K": "kv_heads", "H": "kv", "V": "vocab", "E": "exp",
}  # fmt: skip
MAXTEXT_ACTIVATIONS = {
    "B": "activation_batch", "S": "activation_length", "T": "activation_length",
    "D": "activation_embed", "F": "activation_mlp", "N": "activation_heads",
    "K": "activation_kv_heads", "H": "activation_kv", "V": "activation_vocab",
    "E": "activation_exp",
}  # fmt: skip


def flax(result: Result) -> str:
    """Python: RULES for `flax.linen.logical_axis_rules`, and the logical names of every tensor."""
    tensors = written_out(result)
    names = _names(tensors)
    rules = {names[label, axes]: axes for label, axes in names}
    lines = [
        f"# Flax logical-axis rules of {result.model.name} on {result.mesh.describe()};",
        f"# {signature()}.",
        "#",
        "#   with mesh, flax.linen.logical_axis_rules(RULES): ...",
        "#   flax.linen.with_logical_partitioning(init, LOGICAL_AXES[\"layers.wq\"])",
        "",
        "RULES = [",
        *(f"    ({name!r}, {_value(axes)!r})," for name, axes in rules.items()),
        "]",
        "",
        "# Stacked layer dimensions are left out; they lie whole.",
        "LOGICAL_AXES = {",
        *(f"    {a.name!r}: {_logical(a, names)!r}," for a in tensors),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _logical(a: Annotated, names: Mapping[tuple[str, Axes], str]) -> tuple[str, ...]:
    return tuple(names[pair] for pair in zip(a.dims, a.axes, strict=True))


def _names(tensors: Iterable[Annotated]) -> dict[tuple[str, Axes], str]:
    """A name for every (dimension, axes) that occurs: the dimension's own for what most
    elements do, with the axes behind it for the others."""
    found: dict[tuple[str, Axes], str] = {}
    for label, weights in _weights(tensors).items():
        main = max(weights, key=lambda axes: (weights[axes], axes))
        for axes in weights:
            found[label, axes] = label if axes == main else f"{label}_{'_'.join(axes) or 'whole'}"
    return found


def _weights(tensors: Iterable[Annotated]) -> dict[str, dict[Axes, int]]:
    """Elements that lie in each way, by dimension."""
    found: dict[str, dict[Axes, int]] = {}
    for a in tensors:
        for label, axes in zip(a.dims, a.axes, strict=True):
            ways = found.setdefault(label, {})
            ways[axes] = ways.get(axes, 0) + prod(a.shape) * prod(a.stacked)
    return found


def _value(axes: Axes) -> str | Axes | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def maxtext(result: Result) -> str:
    """YAML: `mesh_axes` and `logical_axis_rules`."""
    tensors = written_out(result)
    weights = [a for a in tensors if a.parameter]
    others = [a for a in tensors if not a.parameter]
    lines = [
        f"# MaxText rules of {result.model.name} on {result.mesh.describe()};",
        f"# {signature()}.",
        f"mesh_axes: [{', '.join(repr(name) for name in result.mesh.names)}]",
        "logical_axis_rules: [",
    ]
    exceptions: list[str] = []
    for group, names in ((others, MAXTEXT_ACTIVATIONS), (weights, MAXTEXT_WEIGHTS)):
        decided: dict[str, Axes] = {}
        for label, ways in _weights(group).items():
            if label in names:
                decided.setdefault(names[label], max(ways, key=lambda w: (ways[w], w)))
        for name, axes in decided.items():
            lines.append(f"  ['{name}', [{', '.join(repr(x) for x in axes)}]],")
        exceptions += [_exception(a, names, decided) for a in group if _differs(a, names, decided)]
    lines.append("]")
    if exceptions:
        lines += ["# These rules cannot express the plan for:", *exceptions]
    return "\n".join(lines) + "\n"


def _differs(a: Annotated, names: Mapping[str, str], decided: Mapping[str, Axes]) -> bool:
    return any(
        decided.get(names.get(label, ""), ()) != axes
        for label, axes in zip(a.dims, a.axes, strict=True)
    )


def _exception(a: Annotated, names: Mapping[str, str], decided: Mapping[str, Axes]) -> str:
    wanted = ", ".join(
        f"{names.get(label, label)}={'+'.join(axes) or 'whole'}"
        for label, axes in zip(a.dims, a.axes, strict=True)
        if decided.get(names.get(label, ""), ()) != axes
    )
    return f"#   {a.name}: {wanted}"
