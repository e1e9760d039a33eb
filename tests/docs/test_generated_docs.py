"""What the documentation shows is what the program says."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import zip_longest

import generated_docs
import pytest

NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Another version of the solver may find another of several best plans.
TOLERANCE = 0.05
REFRESH = "run python docs/generated_docs.py"


def test_cli_page_is_the_help() -> None:
    assert generated_docs.CLI_PAGE.read_text(encoding="utf-8") == generated_docs.cli_page(), REFRESH


def test_readme_shows_what_the_command_prints() -> None:
    command = [sys.executable, "cli.py", "lamda-137b", "--quiet"]
    run = subprocess.run(
        command, cwd=generated_docs.ROOT, capture_output=True, encoding="utf-8", check=True
    )
    shown, printed = generated_docs.readme_report(), generated_docs.shown_report(run.stdout)
    assert shown
    for ours, theirs in zip_longest(shown.splitlines(), printed.splitlines(), fillvalue=""):
        assert _words(ours) == _words(theirs), REFRESH
        assert _numbers(ours) == pytest.approx(_numbers(theirs), rel=TOLERANCE), REFRESH


def test_relative_links_lead_somewhere() -> None:
    pages = [generated_docs.README, *(generated_docs.ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_lists_every_page() -> None:
    docs = generated_docs.ROOT / "docs"
    listed = re.findall(r"\]\(([\w.-]+\.md)\)", (docs / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted({page.name for page in docs.glob("*.md")} - {"README.md"})


def _words(line: str) -> list[str]:
    return NUMBER.sub("0", line).split()


def _numbers(line: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(line)]
