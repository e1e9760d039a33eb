"""What is said to a user whose input cannot be used: the message, and what to do about it.

Only the exception belongs here. Errors with positions in a file have types of their own (model
and mesh files); everything else that a user can get wrong is an InputError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid input: `message` says what is wrong, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like `word`, best first; a shared beginning counts as alike."""
    known = list(known)
    close = difflib.get_close_matches(word, known, count, 0.5)
    close += [k for k in known if word and k.startswith(word) and k not in close]
    return close[:count]
