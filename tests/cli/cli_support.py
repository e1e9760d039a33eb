"""Running the command line inside the test process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import cli

DATA = Path(__file__).parent / "data"
TINY = str(DATA / "tiny.yaml")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    capsys.readouterr()
    code = cli.run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)
