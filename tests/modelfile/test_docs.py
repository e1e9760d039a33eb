"""docs/model-files.md says what the code does: every key and code, and its examples load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planner.modelfile import fields, load_model

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "model-files.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_load(example: str) -> None:
    assert load_model(example, "m.yaml").graph.parameter_count > 0


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == 3
    assert EXAMPLES[1] == (ROOT / "tests/modelfile/good/design.yaml").read_text(encoding="utf-8")


def test_every_key_is_documented() -> None:
    keys = set(fields.File.model_fields) | set(fields.TrainingFields.model_fields)
    keys |= {f"mesh.{key}" for key in fields.Mesh.model_fields}
    keys |= set(fields.AssumedFields.model_fields) | set(fields.RepeatFields.model_fields)
    keys |= set(fields.PipelineFields.model_fields)
    keys |= set(fields.Graph.model_fields) | set(fields.RepeatBlock.model_fields)
    assert [key for key in sorted(keys) if f"`{key}`" not in DOCS] == []
    inference = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    for key in fields.InferenceFields.model_fields:
        assert f"| `{key}` |" in inference


def test_every_code_is_documented() -> None:
    """Codes are the first arguments of what notes or raises diagnostics."""
    folder = ROOT / "planner" / "modelfile"
    sources = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.py"))]
    sources.append((ROOT / "meshes" / "yamltree.py").read_text(encoding="utf-8"))
    call = r"(?:\badd|_add|SizeError|OpError|YamlProblem)\(\s*\"([a-z-]+)\""
    codes = {code for source in sources for code in re.findall(call, source)}
    assert len(codes) > 30
    assert [code for code in sorted(codes) if f"`{code}`" not in DOCS] == []
