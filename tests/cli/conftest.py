from pathlib import Path

import pytest
from cli_support import DATA, TINY

import cli


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the tiny model's plan."""
    folder = tmp_path_factory.mktemp("planned") / "out"
    assert cli.run([TINY, "-o", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def on_cpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a mesh file whose devices call themselves cpu."""
    folder = tmp_path_factory.mktemp("cpus") / "out"
    mesh = str(DATA / "eight-cpus.yaml")
    assert cli.run([TINY, "--mesh", mesh, "--shape", "x=2,y=4", "-o", str(folder), "-q"]) == 0
    return folder
