"""The parts of the documentation that the program itself says: docs/cli.md, the README's report.

`python docs/generated_docs.py` rewrites both; tests/docs compares them with the program.
Only text that can be derived belongs here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

import cli  # noqa: E402

CLI_PAGE = ROOT / "docs" / "cli.md"
README = ROOT / "README.md"
OUTPUT_BEGINS, OUTPUT_ENDS = "<!-- output: plan -->\n```\n", "```\n"
WIDTH = 96  # a code block of this width is not cut on the usual hosts of Markdown

INTRODUCTION = """\
# Commands

Made from the help texts by `python docs/generated_docs.py`; a test compares them.

Exit codes: 0 done; 1 a verdict was printed and it is no; 2 bad options or invalid input; 3 the
program or a solver failed, or a time limit passed without a plan; 130 interrupted. Data goes to
stdout, everything else to stderr.
"""


def help_text(*command: str) -> str:
    arguments = [*command, "--help"]
    result = CliRunner().invoke(cli.cli, arguments, prog_name="plan", terminal_width=WIDTH)
    if result.exit_code != 0:
        raise RuntimeError(f"plan {' '.join(arguments)}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.rstrip().splitlines())


def cli_page() -> str:
    context = click.Context(cli.cli)
    named = [n for n in cli.cli.list_commands(context) if not cli.cli.commands[n].hidden]
    sections = [("plan MODEL", help_text()), *((f"plan {n}", help_text(n)) for n in named)]
    blocks = (f"\n## {title}\n\n```\n{text}\n```\n" for title, text in sections)
    return INTRODUCTION + "".join(blocks)


def shown_report(report: str) -> str:
    """The report down to where the step's time ends: the README says what follows."""
    lines = report.splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("step "))
    return "\n".join(line.rstrip() for line in lines[: last + 1]) + "\n"


def readme_report() -> str:
    _, _, rest = README.read_text(encoding="utf-8").partition(OUTPUT_BEGINS)
    return rest.partition(OUTPUT_ENDS)[0]


def refresh() -> None:
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    report = CliRunner().invoke(cli.cli, ["lamda-137b", "--quiet"], prog_name="plan").stdout
    before, begins, rest = README.read_text(encoding="utf-8").partition(OUTPUT_BEGINS)
    _, ends, after = rest.partition(OUTPUT_ENDS)
    README.write_text(before + begins + shown_report(report) + ends + after, encoding="utf-8")


if __name__ == "__main__":
    refresh()
