"""How long work tells a watcher what it does; None wherever nobody watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """`share`: how much of the whole is done, None where that is not known."""

    def __call__(self, text: str, share: float | None = None) -> None: ...
