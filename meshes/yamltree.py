"""YAML text as a tree in which every key and value knows its place; no meaning.

Only the tame part of YAML is let in: one document, text keys, no anchors that are used, no
tags, bounded size and depth, so that no input takes more than a moment or much memory. What a
scalar means (a number, a name, nothing) is for the reader of the tree to decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

# A model or mesh file is written by hand: the longest one in the zoo has a few thousand
# characters. Beyond this something else was passed by mistake (data, a checkpoint index).
MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 64  # nesting of mappings and lists; a model file needs about 10

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML 1.1 parsers count as a line end
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Source:
    """A text and what errors call it."""

    file: str
    text: str = field(repr=False)

    @cached_property
    def lines(self) -> list[str]:
        return _BREAK.split(self.text)

    def line(self, number: int) -> str:
        """Line `number`, counted from 1; empty past the end."""
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""

    def place(self, index: int) -> Place:
        """The place of the character at `index`."""
        before = _BREAK.split(self.text[:index])
        return Place(self, len(before), len(before[-1]) + 1)


@dataclass(frozen=True)
class Place:
    """Line and column, both counted from 1."""

    source: Source
    line: int
    column: int

    @property
    def text(self) -> str:
        """The line of the source."""
        return self.source.line(self.line)


class YamlProblem(ValueError):
    """Text that is no tree: a stable `code`, what is wrong, what to do, and where."""

    def __init__(self, code: str, message: str, hint: str, place: Place) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.place = code, message, hint, place


@dataclass(frozen=True)
class Scalar:
    """`plain`: written without quotes, so that it may mean a number or nothing."""

    place: Place
    value: str
    plain: bool
    start: int  # indices of the source's characters that spell it, quotes included
    end: int

    def place_of(self, offset: int) -> Place:
        """The place of the value's character number `offset`, across folded lines.

        What is no space is spelled literally and in order; where an escape breaks that, the
        start of the value has to do.
        """
        if offset == 0:  # the value as a whole: with its quote
            return self.place
        source = self.place.source
        wanted = [c for c in self.value[:offset] if not c.isspace()]
        spelled = [i for i in range(self._body(), self.end) if not source.text[i].isspace()]
        before, rest = spelled[: len(wanted)], spelled[len(wanted) :]
        if [source.text[i] for i in before] != wanted or not rest:
            return self.place
        return source.place(rest[0])

    def _body(self) -> int:
        """Where the value begins: after a quote, or after the head of a block (`|`, `>`)."""
        text = self.place.source.text
        if self.plain:
            return self.start
        if text[self.start] in "|>":
            found = _BREAK.search(text, self.start, self.end)
            return found.end() if found else self.end
        return self.start + 1


@dataclass(frozen=True)
class Listing:
    place: Place
    items: list[Node]


@dataclass(frozen=True)
class Table:
    """A mapping in the order of the text; `entries` holds the first of equal keys only."""

    place: Place
    entries: list[tuple[Scalar, Node]]

    def get(self, key: str) -> Node | None:
        return next((value for name, value in self.entries if name.value == key), None)

    def key(self, key: str) -> Scalar | None:
        return next((name for name, _ in self.entries if name.value == key), None)

    def names(self) -> list[str]:
        return [name.value for name, _ in self.entries]


Node = Scalar | Listing | Table


@dataclass
class Document:
    """The tree of a text and the keys that appear twice (in order of the text)."""

    root: Node
    repeated: list[Scalar]


def read_text(path: Path) -> str:
    """Text of a file that is meant to be read as a model or mesh; YamlProblem or OSError."""
    with path.open("rb") as stream:
        data = stream.read(4 * MAX_CHARACTERS + 1)  # UTF-8 takes up to 4 bytes a character
    return decode(data, str(path))


def decode(data: bytes, file: str) -> str:
    """UTF-8 text; YamlProblem `too-large` or `not-text` with the place of the first bad byte."""
    if len(data) > 4 * MAX_CHARACTERS:
        raise _too_large(Source(file, ""))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        good = Source(file, data[: error.start].decode("utf-8"))
        raise YamlProblem(
            "not-text", f"not UTF-8 text (byte 0x{data[error.start]:02x})",
            "a model or mesh file is YAML text, saved as UTF-8", good.place(len(good.text)),
        ) from None  # fmt: skip


def _too_large(source: Source) -> YamlProblem:
    limit = f"{MAX_CHARACTERS >> 20} MiB"
    return YamlProblem(
        "too-large", f"larger than {limit}, the most a model or mesh file may have",
        "is it the right file?", Place(source, 1, 1),
    )  # fmt: skip


def parse(text: str, file: str) -> Document:
    """The tree of a YAML text; YamlProblem if there is none."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        raise _too_large(Source(file, ""))
    source = Source(file, text)
    bad = _FORBIDDEN.search(text)
    if bad:
        raise YamlProblem(
            "not-text", f"control character U+{ord(bad[0]):04X}, so this is no YAML text",
            "a model or mesh file is YAML text, saved as UTF-8", source.place(bad.start()),
        )  # fmt: skip
    try:
        return _build(source)
    except yaml.MarkedYAMLError as error:
        raise _syntax(source, error) from None


def _syntax(source: Source, error: yaml.MarkedYAMLError) -> YamlProblem:
    mark = error.problem_mark or error.context_mark
    place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source, 1, 1)
    if error.problem and "nesting depth" in error.problem:  # the parser's own, far above ours
        return _too_deep(place)
    hint = f"{error.context}, begun in line {error.context_mark.line + 1}" if (
        error.context and error.context_mark
    ) else ""  # fmt: skip
    if place.text[place.column - 1 : place.column] == "\t":
        hint = "YAML is indented with spaces, never with tabs"
    elif error.problem and "mapping values" in error.problem:
        hint = "put text that contains ': ' into quotes"
    return YamlProblem("yaml-syntax", f"not valid YAML: {error.problem}", hint, place)


def _too_deep(place: Place) -> YamlProblem:
    return YamlProblem("too-deep", f"nested deeper than {MAX_DEPTH} levels", "", place)


def _build(source: Source) -> Document:
    """One pass over the parser's events, with an explicit stack: depth costs no recursion."""
    builder = _TreeBuilder(source)
    for event in yaml.parse(source.text, Loader=LOADER):
        builder.take(event)
    if builder.root is None:
        raise YamlProblem("empty", "the file is empty", "", Place(source, 1, 1))
    return Document(builder.root, builder.repeated)


@dataclass
class _Open:
    """A mapping or list whose end has not come yet; `key` waits for its value."""

    node: Table | Listing
    key: Scalar | None = None
    seen: set[str] = field(default_factory=set)


@dataclass
class _TreeBuilder:
    source: Source
    root: Node | None = None
    repeated: list[Scalar] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)

    def take(self, event: Any) -> None:
        first, last = event.start_mark, event.end_mark
        place = Place(self.source, first.line + 1, first.column + 1)
        if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise YamlProblem("several-documents", "a second YAML document", "keep one", place)
        if isinstance(event, yaml.AliasEvent):
            raise YamlProblem(
                "alias", f"aliases (*{event.anchor}) are not supported", "repeat the value", place
            )
        if getattr(event, "tag", None):
            raise YamlProblem("tag", f"tags ({event.tag}) are not supported", "leave it out", place)
        if isinstance(event, yaml.ScalarEvent):
            # The C parser says None for plain or '' depending on its version.
            plain = not event.style
            self.add(Scalar(place, event.value, plain, first.index, last.index))
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            mapping = isinstance(event, yaml.MappingStartEvent)
            self.open(Table(place, []) if mapping else Listing(place, []))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self.stack.pop()

    def open(self, node: Table | Listing) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise _too_deep(node.place)
        self.add(node)
        self.stack.append(_Open(node))

    def add(self, node: Node) -> None:
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if isinstance(top.node, Listing):
            top.node.items.append(node)
        elif top.key is None:
            if not isinstance(node, Scalar):
                raise YamlProblem("bad-key", "a key must be plain text", "", node.place)
            top.key = node
        else:
            self._entry(top, top.key, node)

    def _entry(self, top: _Open, key: Scalar, value: Node) -> None:
        top.key = None
        if key.value in top.seen:
            self.repeated.append(key)
            return
        top.seen.add(key.value)
        if isinstance(top.node, Table):
            top.node.entries.append((key, value))

