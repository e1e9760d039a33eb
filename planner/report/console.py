"""Where output goes: data to stdout, everything else to stderr, in the colours asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from planner.progress import Progress

COLORS = ("auto", "always", "never")
PIPED_WIDTH = 10_000  # columns where the output is no terminal: nothing is cut or wrapped


@dataclass(frozen=True)
class Screen:
    """`quiet`: no progress and no remarks; data and errors stay."""

    quiet: bool = False
    color: str = "auto"

    def show(self, what: RenderableType) -> None:
        """Something to read on stdout. Text that comes from users is never taken for markup."""
        console = _console(self.color, stderr=False)
        with console.capture() as captured:
            console.print(what, markup=False, highlight=False, emoji=False)
        lines = captured.get().split("\n")
        sys.stdout.write("\n".join(line.rstrip() for line in lines))

    def data(self, text: str) -> None:
        """Exact text on stdout."""
        sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def remark(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """A bar, and a function to tell what is going on; None where nobody watches."""
        console = _console(self.color, stderr=True)
        if self.quiet or not console.is_terminal:
            yield None
            return
        columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False)
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=None)

            def tell(text: str, share: float | None = None) -> None:
                total = None if share is None else 1.0
                bar.update(task, description=text, total=total, completed=share or 0.0)

            yield tell


def _console(color: str, stderr: bool) -> Console:
    """NO_COLOR is honoured unless colour is asked for."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    wanted = color == "always" or (color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    return Console(
        file=stream, force_terminal=terminal or color == "always", no_color=not wanted,
        width=None if terminal else PIPED_WIDTH, color_system="auto" if wanted else None,
        legacy_windows=False,
    )  # fmt: skip
