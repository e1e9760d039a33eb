"""Sections of a file against their fields: pydantic's errors become diagnostics with a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from meshes.yamltree import Listing, Node, Scalar, Table
from planner.modelfile.diagnostics import Findings, nearest
from planner.modelfile.fields import RENAMED, AssumedFields, Axes, File
from planner.modelfile.scalars import plain_data

Path = tuple[str | int, ...]

_CONSTRAINT: TypeAdapter[list[Any]] = TypeAdapter(list[Axes], config={"strict": True})
_ASSUMED = TypeAdapter(AssumedFields)


def validate_file(root: Table, findings: Findings) -> dict[str, Any]:
    """Every section of the file that is well-formed, by key; all errors are noted."""
    found: dict[str, Any] = {}
    for key, node in root.entries:
        field = File.model_fields.get(key.value)
        if field is None:
            hint = _unknown_hint(key.value, File)
            findings.add("unknown-key", f"unknown key '{key.value}'", key.place, hint)
            continue
        if key.value == "constraints" and isinstance(node, Table):
            found[key.value] = _entries(key, node, findings)
        elif key.value == "assumed" and isinstance(node, Listing):
            found[key.value] = _items(key, node, findings)
        else:
            value = _section(key, node, field, findings)
            if value is not None:
                found[key.value] = value
    return found


def _entries(key: Scalar, node: Table, findings: Findings) -> dict[str, list[Any]]:
    """Constraints by tensor, without those that are wrong."""
    parent = Table(node.place, [(key, node)])
    found = {}
    for name in node.names():
        value = validated(_CONSTRAINT, parent, key.value, findings, at=(name,))
        if value is not None:
            found[name] = value
    return found


def _items(key: Scalar, node: Listing, findings: Findings) -> list[AssumedFields | None]:
    """Assumptions in their order, None where one is wrong."""
    parent = Table(node.place, [(key, node)])
    return [
        validated(_ASSUMED, parent, key.value, findings, at=(i,)) for i in range(len(node.items))
    ]


def _section(key: Scalar, node: Node, field: FieldInfo, findings: Findings) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(
        _annotated(field), config={"strict": True, "title": key.value}
    )
    return validated(adapter, Table(node.place, [(key, node)]), key.value, findings)


def _annotated(field: FieldInfo) -> Any:
    """The field's type with its constraints, as an annotation."""
    annotation: Any = field.annotation
    for extra in field.metadata:
        annotation = Annotated[annotation, extra]
    return annotation


def validated(
    adapter: TypeAdapter[Any], parent: Table, key: str, findings: Findings,
    data: Any = None, model: type[BaseModel] | None = None, at: Path = (),
) -> Any:  # fmt: skip
    """`parent[key]` (what is `at` in it; or the `data` made of it) as the adapter's type; None
    if it is wrong. `model`: whose keys they are, if File does not say."""
    node = parent.get(key)
    for part in at:
        node = _child(node, part)
    if node is None:
        return None
    try:
        return adapter.validate_python(plain_data(node) if data is None else data)
    except ValidationError as error:
        _note(error, parent, (key, *at), findings, model)
    return None


def _note(
    error: ValidationError, parent: Table, start: Path, findings: Findings,
    model: type[BaseModel] | None,
) -> None:  # fmt: skip
    seen: set[Path] = set()
    for detail in error.errors(include_url=False, include_context=True):
        path = _real_path(parent, (*start, *detail["loc"]), detail["type"])
        if path in seen:  # the alternatives of a union say the same thing
            continue
        seen.add(path)
        _note_one(detail, parent, path, findings, model)


def _note_one(
    detail: Mapping[str, Any], parent: Table, path: Path, findings: Findings,
    model: type[BaseModel] | None,
) -> None:  # fmt: skip
    kind, last = detail["type"], path[-1]
    dotted = ".".join(str(p) for p in path)
    if kind == "missing":
        place = _key_place(parent, path[:-1])
        findings.add("missing-key", f"'{_dotted(path[:-1])}' lacks the key '{last}'", place)
    elif kind == "extra_forbidden":
        hint = _unknown_hint(str(last), model or _model_at(path[:-1]))
        findings.add("unknown-key", f"unknown key '{last}'", _key_place(parent, path), hint)
    else:
        code, message, hint = _describe(detail)
        findings.add(code, f"'{dotted}' {message}", _value_place(parent, path), hint)


def _dotted(path: Path) -> str:
    return ".".join(str(p) for p in path)


def _describe(detail: Mapping[str, Any]) -> tuple[str, str, str]:
    """(code, what is wrong, hint) of a pydantic error."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error":
        known = context["expected"].replace("'", "")
        words = known.replace(" or ", ", ").split(", ")
        return "bad-value", f"must be {known}, not {_shown(value)}", nearest(str(value), words)
    if kind == "wrong_type":
        return "wrong-type", f"{detail['msg']}, not {_shown(value)}", ""
    if kind in _WANTED:
        hint = _type_hint(_WANTED[kind], value)
        return "wrong-type", f"must be {_WANTED[kind]}, not {_shown(value)}", hint
    if kind == "too_short":
        return "bad-value", "is empty", ""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if kind == "value_error":  # the settings' own words about several of their fields
        return "bad-value", f"cannot be: {message}", ""
    return "bad-value", f"is {_shown(value)}: {message}", ""


_WANTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "text", "dict_type": "a mapping",
    "list_type": "a list", "model_type": "a mapping", "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping", "none_required": "left out", "tuple_type": "a list",
}  # fmt: skip


def _type_hint(wanted: str, value: Any) -> str:
    if "number" in wanted and isinstance(value, str):
        return "numbers look like 1024, 1e9, 512k or 16GiB, without quotes"
    if wanted == "text" and isinstance(value, dict):
        return "text that contains ': ' needs quotes"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value[:40]}…'" if len(value) > 40 else f"'{value}'"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _unknown_hint(key: str, model: type[BaseModel] | None) -> str:
    fields = list(model.model_fields) if model else []
    if key in RENAMED and any(f in RENAMED[key] for f in fields):
        return f"it is called {RENAMED[key]} here"
    return nearest(key, fields, f"known: {', '.join(fields)}" if fields else "")


def _model_at(path: Path) -> type[BaseModel] | None:
    """The model of the mapping at `path` of a file."""
    model: type[BaseModel] | None = File
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The (only) model inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found:
            return found
    return None


# ---- places ---------------------------------------------------------------------------------


def _child(node: Node | None, part: str | int) -> Node | None:
    if isinstance(node, Table):
        return node.get(str(part))
    if isinstance(node, Listing) and isinstance(part, int) and part < len(node.items):
        return node.items[part]
    return None


def _real_path(parent: Table, path: Path, kind: str) -> Path:
    """`path` without what pydantic adds: names of union members, keys that are not there."""
    node: Node | None = parent
    real: list[str | int] = []
    for i, part in enumerate(path):
        child = _child(node, part)
        if child is None:
            last = i == len(path) - 1
            if last and kind == "missing" and isinstance(node, Table):
                real.append(part)
            continue
        real.append(part)
        node = child
    return tuple(real)


def _key_place(parent: Table, path: Path) -> Any:
    """The place of the key at `path`; of the item, in a list."""
    node: Node | None = parent
    for part in path[:-1]:
        node = _child(node, part)
    key = node.key(str(path[-1])) if isinstance(node, Table) else None
    return key.place if key else _value_place(parent, path)


def _value_place(parent: Table, path: Path) -> Any:
    node: Node = parent
    for part in path:
        child = _child(node, part)
        if child is None:
            break
        node = child
    return node.place
