"""annotations.py: the plan as a module that needs only jax.

Only the data part is made here, laid out to be read; the code is in `jax_template`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

from meshes import LogicalMesh
from planner.annotations import Annotated, written_out
from planner.export.stamp import Stamp, signature
from planner.result import Result

_MARKER = "# >>> code\n"


def dump(result: Result) -> str:
    """The text of annotations.py."""
    return _data(result) + _code()


def _code() -> str:
    text = files("planner.export").joinpath("jax_template.py").read_text(encoding="utf-8")
    return text.split(_MARKER, 1)[1]


def _data(result: Result) -> str:
    mesh, stamp = result.mesh, Stamp.of(result.model, result.mesh)
    tensors = written_out(result)
    return "\n".join(
        [
            f'"""Shardings of {stamp.model} on {mesh.describe()};',
            f"{signature()}, do not edit.",
            "",
            "    from annotations import constrain, make_mesh, shardings",
            "",
            "    mesh = make_mesh()",
            "    params = jax.device_put(params, shardings(params, mesh))",
            "    x = constrain(\"NAME\", x, mesh)    # inside the jitted step, for activations",
            '"""',
            "",
            f"MODEL = {stamp.model!r}",
            f"MODEL_HASH = {stamp.model_hash!r}",
            f"MESH = {stamp.mesh!r}",
            f"MESH_HASH = {stamp.mesh_hash!r}",
            "",
            "# Every dimension's mesh axes; a stacked layer dimension is left out.",
            *_table("SPECS", [(a.name, _axes(a), _dims(a)) for a in tensors]),
            "",
            "# Shapes of the parameters: (stacked layer dimensions, the rest).",
            *_table("PARAMETERS", [(a.name, _shape(a), "") for a in tensors if a.parameter]),
            "",
            *_layout(mesh),
            "",
        ]
    )  # fmt: skip


def _table(name: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """A dict literal, one tensor a line, comments aligned."""
    lines = [(f"    {key!r}: {value},", comment) for key, value, comment in rows]
    width = max((len(line) for line, comment in lines if comment), default=0)
    body = [f"{line:<{width}}  # {comment}" if comment else line for line, comment in lines]
    return [f"{name} = {{", *body, "}"]


def _dims(a: Annotated) -> str:
    shape = " ".join(f"{d}={n}" for d, n in zip(a.dims, a.shape, strict=True))
    stacked = f", {'×'.join(map(str, a.stacked))} layers" if a.stacked else ""
    return f"{a.role} {shape}{stacked}".rstrip()


def _axes(a: Annotated) -> str:
    return _tuple(_tuple(map(repr, axes)) for axes in a.axes)


def _shape(a: Annotated) -> str:
    return f"({a.stacked!r}, {a.shape!r})"


def _tuple(items: Iterable[str]) -> str:
    items = list(items)
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _layout(mesh: LogicalMesh) -> list[str]:
    physical = tuple((d.name, d.size) for d in mesh.topology.links)
    parts = tuple((p.axis, p.size) for p in mesh.parts)
    return [
        f"AXES = {mesh.axes!r}",
        f"DEVICE_KIND = {mesh.chip.device_kind!r}",
        "# Dimensions of the machine, outermost first, and the axis that owns each part of them.",
        f"PHYSICAL = {physical!r}",
        f"LAYOUT = {parts!r}",
        "",
    ]
