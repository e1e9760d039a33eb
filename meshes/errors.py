"""The one exception of this package: a diagnostic as data, rendered elsewhere."""

from __future__ import annotations


class MeshError(ValueError):
    """A mesh that cannot be: what is wrong, where it stands, what to do.

    `code` is a stable word for machines (`unknown-chip`, `bad-size`, `too-large`, ...).
    `file`, `line`, `column` (1-based) and `source` (that line) are set when the mesh came from
    a file.
    """

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        *,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        source: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.file = file
        self.line = line
        self.column = column
        self.source = source

    def __str__(self) -> str:
        where = ":".join(str(x) for x in (self.file, self.line, self.column) if x is not None)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} ({self.hint})" if self.hint else text
