"""The one look of all tables: no lines, bold head, numbers to the right, cells never wrapped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        justify = "right" if name in right else "left"
        found.add_column(Text(name), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return found
