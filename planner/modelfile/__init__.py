"""Model files: YAML in, a Model out, or every error with its place.

    model = load_model(text, "model.yaml", overrides=["training.batch=512"])
"""

from __future__ import annotations

from planner.modelfile.diagnostics import (
    Diagnostic,
    ModelErrors,
    from_mesh,
    render,
)
from planner.modelfile.fields import schema
from planner.modelfile.load import load_file, load_model

__all__ = [
    "Diagnostic", "ModelErrors", "from_mesh", "load_file", "load_model", "render", "schema",
]  # fmt: skip
