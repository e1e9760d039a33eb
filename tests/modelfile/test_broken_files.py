"""Broken model and mesh files: places and codes as stated by hand, texts as recorded.

`expected.yaml` was written before any output was seen; the `.golden` files are what people read
(SHARDPLAN_GOLDEN=write records them anew).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from meshes import MeshError, resolve, yamltree
from planner.modelfile import Diagnostic, ModelErrors, from_mesh, load_model, render

HERE = Path(__file__).parent
EXPECTED = yaml.safe_load((HERE / "expected.yaml").read_text(encoding="utf-8"))


def errors_of(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    monkeypatch.chdir(HERE / folder)
    file = f"{name}.yaml"
    if folder == "broken_meshes":
        with pytest.raises(MeshError) as mesh_error:
            resolve(file)
        return (from_mesh(mesh_error.value),)
    with pytest.raises(ModelErrors) as error:
        load_model(Path(file).read_text(encoding="utf-8"), file)
    return error.value.diagnostics


CASES = [(folder, name) for folder, names in EXPECTED.items() for name in names]


def test_every_file_has_an_expectation() -> None:
    for folder, names in EXPECTED.items():
        assert {p.stem for p in (HERE / folder).glob("*.yaml")} == set(names)
    assert len(CASES) >= 60


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_place_and_code(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors_of(folder, name, monkeypatch)
    places = [f"{d.line}:{d.column} {d.code}" for d in found]
    assert places == sorted(EXPECTED[folder][name], key=_by_place)
    for d in found:
        assert d.source == (HERE / folder / f"{name}.yaml").read_text().split("\n")[d.line - 1]
        assert d.message
        assert "Traceback" not in d.message


def _by_place(text: str) -> tuple[int, int]:
    line, column = text.split(" ")[0].split(":")
    return int(line), int(column)


@pytest.mark.parametrize("folder", list(EXPECTED))
def test_rendered_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [render(errors_of(folder, name, monkeypatch)) for name in EXPECTED[folder]]
    golden = HERE / f"{folder}.golden"
    text = "\n\n".join(texts) + "\n"
    if os.environ.get("SHARDPLAN_GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_python_loader_agrees(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C library the same errors are found (its parser places a few elsewhere)."""
    monkeypatch.setattr(yamltree, "LOADER", yaml.SafeLoader)
    found = [d.code for d in errors_of(folder, name, monkeypatch)]
    assert sorted(found) == sorted(t.split(" ")[1] for t in EXPECTED[folder][name])


def test_codes_are_documented() -> None:
    text = (HERE.parents[1] / "docs" / "model-files.md").read_text(encoding="utf-8")
    codes = {t.split(" ")[1] for names in EXPECTED.values() for ts in names.values() for t in ts}
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []
