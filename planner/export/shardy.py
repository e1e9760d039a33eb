"""Shardy: the mesh and one `#sdy.sharding` attribute per tensor of the model."""

from __future__ import annotations

from planner.annotations import Annotated, written_out
from planner.export.stamp import signature
from planner.result import Result


def dump(result: Result) -> str:
    """MLIR text: an `sdy.mesh` and, by tensor name, attributes to put on values of that name."""
    sizes = ", ".join(f'"{name}"={size}' for name, size in result.mesh.axes)
    lines = [
        f"// {result.model.name} on {result.mesh.describe()}; {signature()}.",
        f"sdy.mesh @mesh = <[{sizes}]>",
        "// Stacked layer dimensions come first and are whole.",
    ]
    tensors = written_out(result)
    width = max((len(a.name) for a in tensors), default=0)
    lines += [f"// {a.name:<{width}}  {attribute(a)}" for a in tensors]
    return "\n".join(lines) + "\n"


def attribute(a: Annotated) -> str:
    dims = (*((),) * len(a.stacked), *a.axes)
    inner = ", ".join("{" + ", ".join(f'"{axis}"' for axis in d) + "}" for d in dims)
    return f"#sdy.sharding<@mesh, [{inner}]>"
