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
from planner.architectures import ARCHITECTURES, INFERENCE
from planner.errors import InputError, nearest
from planner.model import DECODE

GRAPH = "graph"
_COMMENT_COLUMN = 28

_HEAD = """\
# {title}. Plan it with: plan FILE
name: my-{kind}
mesh: {{topology: "{topology}"}}  # `plan meshes` lists machines; shape: {{x: …, y: …}} fixes axes
training:
  {batch:<24}# {examples} per step
  optimizer: adamw          # sgd, momentum, adam, adamw, adafactor
  compute: bf16             # type of matrix products
  remat: full               # none, full, dots, attention, auto: what is recomputed
"""

_INFERENCE = """\
# inference: {phase: decode, batch: 8, context: 1024}  # instead of training; or prefill
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
        title = "A model of your own"
        return _head(title, "model", "sequences", "tpu-v5e:4x4", "B") + _GRAPH
    if kind not in ARCHITECTURES:
        near = nearest(kind, kinds(), 1)
        hint = f"did you mean {near[0]}?" if near else f"kinds: {', '.join(kinds())}"
        raise InputError(f"no kind of model {kind!r}", hint)
    example = _example(kind)
    settings = {k: v for k, v in example["architecture"].items() if k != "kind"}
    words = "sequences" if "sequence" in settings else "examples"
    title = f"A model of kind {kind}, with the numbers of {example['name']}"
    head = _head(title, kind, words, example["mesh"]["topology"], example["training"]["batch"])
    if DECODE in INFERENCE.get(kind, ()):
        head += _INFERENCE
    sizes = [f"dims: {_flow(example['dims'])}"] if "dims" in example else []
    lines = [*sizes, "architecture:", f"  kind: {kind}"]
    lines += [_line(name, field, settings) for name, field in _fields(kind).items()]
    return head + "\n".join(lines) + "\n"


def _head(title: str, kind: str, examples: str, topology: str, batch: object) -> str:
    return _HEAD.format(
        title=title, kind=kind, examples=examples, topology=topology, batch=f"batch: {batch}"
    )


def _fields(kind: str) -> Mapping[str, Any]:
    fields = ARCHITECTURES[kind].model_fields
    return {name: field for name, field in fields.items() if name != "kind"}


def _line(name: str, field: Any, settings: Mapping[str, Any]) -> str:
    """A setting that the example gives; others as comments with their defaults."""
    given = name in settings or field.default is PydanticUndefined
    value = settings.get(name, field.default)
    line = f"  {'' if given else '# '}{name}: {_flow(value)}"
    return f"{line:<{_COMMENT_COLUMN}}# {field.description}" if field.description else line


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def _example(kind: str) -> Mapping[str, Any]:
    """The smallest built-in model of that kind, as plain data."""
    files = [yaml.safe_load(zoo.text(name)) for name in zoo.names()]
    same = [f for f in files if f.get("architecture", {}).get("kind") == kind]
    if not same:
        hint = "docs/model-files.md has its keys"
        raise InputError(f"no built-in model is of kind {kind!r}", hint)
    return min(same, key=lambda f: float(f.get("published_parameters", "inf")))
