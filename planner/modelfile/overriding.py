"""`--set training.batch=512`: values put into the tree before it is read; dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshes.yamltree import Node, Place, Scalar, Source, Table, YamlProblem, parse
from planner.modelfile.diagnostics import Findings

# Keys of these mappings have dots in them: the rest of a path is one key.
_DOTTED = ("constraints",)
_INSTEAD = (("inference", ("training", "pipeline")), ("training", ("inference",)))


def apply(root: Table, overrides: Sequence[str], findings: Findings) -> tuple[str, ...]:
    """Sets every `path=value` in the tree (in place); returns the paths."""
    return tuple(path for option in overrides if (path := _apply(root, option, findings)))


def settle(root: Table, changed: Sequence[str]) -> frozenset[str]:
    """A file says how to train or how to infer: where --set says the other, what the file says
    of the first goes (in place). Returns the keys that have gone."""
    named = {path.split(".")[0] for path in changed}
    gone: set[str] = set()
    for wanted, others in _INSTEAD:
        if wanted in named and not named.intersection(others):
            gone.update(key.value for key, _ in root.entries if key.value in others)
    root.entries[:] = [entry for entry in root.entries if entry[0].value not in gone]
    return frozenset(gone)


def _apply(root: Table, option: str, findings: Findings) -> str:
    source = Source(f"--set {option}", option)
    path, equals, text = option.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        findings.add(
            "bad-override", f"--set takes KEY=VALUE, not '{option}'", Place(source, 1, 1),
            "for example --set training.batch=512",
        )  # fmt: skip
        return ""
    try:
        value = parse(text, source.file).root
    except YamlProblem as problem:
        findings.add("bad-override", f"--set {option}: {problem.message}", Place(source, 1, 1))
        return ""
    if not _set(root, parts, value, source):
        message = f"--set {option}: no such place in the file"
        findings.add("bad-override", message, Place(source, 1, 1))
    return ".".join(parts)


def _set(table: Table, parts: list[str], value: Node, source: Source) -> bool:
    """Whether the value found its place; missing mappings on the way are made."""
    name, rest = _split(table, parts)
    key = Scalar(Place(source, 1, 1), name, True, 0, 0)
    if not rest:
        _replace(table, key, value)
        return True
    inner = table.get(name)
    if inner is None:
        inner = Table(key.place, [])
        table.entries.append((key, inner))
    if not isinstance(inner, Table):
        return False
    if name in _DOTTED:
        rest = [".".join(rest)]
    return _set(inner, rest, value, source)


def _replace(table: Table, key: Scalar, value: Node) -> None:
    for i, (old, _) in enumerate(table.entries):
        if old.value == key.value:
            table.entries[i] = (old, value)
            return
    table.entries.append((key, value))


def _split(table: Table, parts: list[str]) -> tuple[str, list[str]]:
    """The first key of a path (the longest that exists), and what is left of the path."""
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if table.get(name) is not None:
            return name, parts[n:]
    return parts[0], parts[1:]


def find(root: Table, path: str) -> Node | None:
    """What stands at a dotted key."""
    node: Node | None = root
    parts = path.split(".")
    while parts:
        if not isinstance(node, Table):
            return None
        name, parts = _split(node, parts)
        node = node.get(name)
    return node


def paths(root: Table, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for key, value in root.entries:
        yield f"{prefix}{key.value}"
        if isinstance(value, Table):
            yield from paths(value, f"{prefix}{key.value}.")
