"""Why a program could not be compiled: a message and what to do about it."""

from __future__ import annotations


class BackendError(Exception):
    """The backend is missing, unsuitable, or failed; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
