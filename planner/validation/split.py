"""Which half of the runs may be fitted to. Committed before the first fit, never changed.

A run belongs to the even half if the first hex digit of sha256 of its id is even, else to the
odd half; the id of a row of a CSV file is the row's text without the end of the line. Cost
models may be fitted to the even half. The odd half, and the suite `seeds` in both halves, are
only ever predicted.
"""

from __future__ import annotations

from hashlib import sha256

EVEN, ODD = "even", "odd"
NEVER_FITTED = ("seeds",)  # suites


def half(run_id: str) -> str:
    """The half of a run: EVEN or ODD."""
    return ODD if int(sha256(run_id.encode()).hexdigest()[0], 16) % 2 else EVEN


def may_fit(suite: str, run_id: str) -> bool:
    """Whether a cost model may be fitted to this run."""
    return suite not in NEVER_FITTED and half(run_id) == EVEN
