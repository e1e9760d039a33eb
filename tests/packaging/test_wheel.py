"""The wheel, installed, works from a folder whose modules have the same names as ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DECOYS = ("planner/__init__.py", "costmodels/__init__.py", "meshes/__init__.py", "cli.py")
OURS = re.compile(r"(planner|costmodels|meshes|shardplan-[^/]*\.dist-info)/|cli\.py$")


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built the long way round, sdist first, so that both hold what is needed."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    run(binaries / "python", "-m", "pip", "install", "-q", wheel)
    return binaries


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    for name in DECOYS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('this is the user\\'s own module')\n", encoding="utf-8")
    return tmp_path


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not OURS.match(name)] == []


def test_lists_what_is_built_in(scripts: Path, decoys: Path) -> None:
    zoo = {path.stem for path in (ROOT / "planner" / "zoo").glob("*.yaml")}
    assert zoo <= set(run(scripts / "plan", "models", cwd=decoys).split())
    catalogue = {path.stem for path in (ROOT / "meshes" / "catalogue").glob("*.yaml")}
    assert catalogue <= set(run(scripts / "shardplan", "meshes", cwd=decoys).split())


def test_plans_among_decoys(scripts: Path, decoys: Path) -> None:
    report = run(scripts / "plan", "lamda-137b", "-o", "out", cwd=decoys)
    assert report.startswith("1024 chips, 2048 devices, mesh ")
    written = {path.name for path in (decoys / "out").iterdir()}
    assert written == {"plan.json", "annotations.py", "annotations.json"}
