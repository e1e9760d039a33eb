"""When to stop: a wall-clock deadline, or somebody asking.

Only time and interruption belong here. Solvers poll `over()` between steps and hand `left()` to
HiGHS. Without a time limit nothing depends on the wall clock.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass
class Stop:
    """Set by a signal handler; shared by a clock and all shorter clocks taken from it."""

    asked: bool = False


@dataclass(frozen=True)
class Clock:
    """`deadline` on `time.monotonic`; None runs until the work limit."""

    deadline: float | None = None
    stop: Stop = field(default_factory=Stop)
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, seconds: float | None, stop: Stop | None = None) -> Clock:
        now = time.monotonic()
        deadline = None if seconds is None else now + seconds
        return cls(deadline, Stop() if stop is None else stop, now)

    @property
    def limited(self) -> bool:
        return self.deadline is not None

    def seconds(self) -> float:
        """Since the clock was started."""
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Seconds to the deadline, at least 0; inf without one."""
        if self.stop.asked:
            return 0.0
        return math.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def over(self) -> bool:
        return self.left() <= 0.0

    def within(self, seconds: float) -> Clock:
        """A clock that ends after `seconds` at the latest; unlimited ones stay unlimited."""
        if self.deadline is None:
            return self
        now = time.monotonic()
        return Clock(min(self.deadline, now + seconds), self.stop, now)

    def share(self, part: float) -> Clock:
        """A clock that ends after this part of what is left."""
        return self.within(self.left() * part)
