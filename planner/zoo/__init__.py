"""Model files of published models: `names()` lists them, `text(name)` is a file's content.

The files lie beside this module; each names its sources, and marks as assumed what they leave
open.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_SUFFIX = ".yaml"


def names() -> tuple[str, ...]:
    """Names of all models, sorted."""
    found = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in found if n.endswith(_SUFFIX)))


def text(name: str) -> str:
    """The model file called `name`; KeyError if there is none."""
    if name not in names():
        raise KeyError(name)
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def published(name: str) -> dict[str, Any]:
    """The annotation that the source of model `name` publishes; KeyError if there is none."""
    path = files(__name__) / "published" / f"{name}.json"
    if not path.is_file():
        raise KeyError(name)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
