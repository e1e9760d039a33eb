"""`plan init`: a commented model file of every architecture, and one with a graph of its own.

The keys and their comments come from the settings themselves, the numbers from a built-in model
of that kind, so that a starter is always a file that can be planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from planner import zoo
from planner.architectures import ARCHITECTURES
from planner.errors import InputError, nearest

GRAPH = "graph"
_COMMENT_COLUMN = 28

_HEAD = """\
# {title}. Plan it with: plan FILE
name: my-{kind}
mesh: {{topology: "tpu-v5e:16x16"}}  # `plan meshes` lists machines; shape: {{x: 16, y: 16}} fixes it
training:
  batch: 256                # {examples} per step
  optimizer: adamw          # sgd, momentum, adam, adamw, adafactor
  compute: bf16             # type of matrix products
  remat: full               # none, full, dots, attention: what the backward pass recomputes
"""

_GRAPH = """\
dims: {B: 256, S: 1024, D: 1024, F: 4096, V: 32000}
graph:
  inputs: {tokens: "i32[B, S]", targets: "i32[B, S]"}
  params: {embed: "[V, D]"}
  ops:
    - x = gather(embed, tokens)
    - repeat: {name: layers, times: 12, carry: [x]}
      params: {w_in: "[D, F]", w_out: "[F, D]"}
      ops:
        - h = einsum("B S D, D F -> B S F", x, w_in)
        - y = einsum("B S F, F D -> B S D", gelu(h), w_out)
        - x = x + y
    - logits = einsum("B S D, V D -> B S V", x, embed)
    - loss = cross_entropy(logits, targets)
# constraints:                # tensors that must lie in a certain way, one entry per dimension
#   layers.w_in: [x, y]
"""


def kinds() -> tuple[str, ...]:
    return (*ARCHITECTURES, GRAPH)


def text(kind: str) -> str:
    """The starter of an architecture, or of `graph`. InputError for another kind."""
    if kind == GRAPH:
        head = _HEAD.format(title="A model of your own", kind="model", examples="sequences")
        return head.replace("batch: 256 ", "batch: B   ") + _GRAPH
    if kind not in ARCHITECTURES:
        near = nearest(kind, kinds(), 1)
        hint = f"did you mean {near[0]}?" if near else f"kinds: {', '.join(kinds())}"
        raise InputError(f"no kind of model {kind!r}", hint)
    example, settings = _example(kind)
    words = "sequences" if "sequence" in settings else "examples"
    title = f"A model of kind {kind}, with the numbers of {example}"
    lines = ["architecture:", f"  kind: {kind}"]
    lines += [_line(name, field, settings) for name, field in _fields(kind).items()]
    return _HEAD.format(title=title, kind=kind, examples=words) + "\n".join(lines) + "\n"


def _fields(kind: str) -> Mapping[str, Any]:
    return ARCHITECTURES[kind].model_fields


def _line(name: str, field: Any, settings: Mapping[str, Any]) -> str:
    """A setting that the example gives; others as comments with their defaults."""
    given = name in settings or field.default is PydanticUndefined
    value = settings.get(name, field.default)
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    line = f"  {'' if given else '# '}{name}: {shown}"
    return f"{line:<{_COMMENT_COLUMN}}# {field.description}" if field.description else line


def _example(kind: str) -> tuple[str, Mapping[str, Any]]:
    """(name, architecture settings) of the first built-in model of that kind."""
    for name in zoo.names():
        settings = yaml.safe_load(zoo.text(name)).get("architecture", {})
        if settings.get("kind") == kind:
            return name, {key: value for key, value in settings.items() if key != "kind"}
    raise InputError(f"there is no example of kind {kind!r} yet", "docs/model-files.md has its keys")
