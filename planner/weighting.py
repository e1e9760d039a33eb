"""What a second of communication counts in the surrogate, where a chip hides it.

The ILP adds up seconds; how many of them computation hides only the simulator knows, of a plan
that there is already. So planning takes turns: a few guesses (weights of parameters are fetched
ahead and their gradients drain late, activations wait), then what was exposed in the last plan,
averaged over the rounds, decides what the next one pays for. Where guesses are dear, on meshes of
many axes, what the plan of a mesh of fewer axes exposes comes in their place.

Only the weights belong here; plans are made of them in `planner.planning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from costmodels.exposure import Moved
from planner.sharding.flow import Conversion

Weights = tuple[float, float]  # of parameters and their gradients, and of the rest
Counts = Sequence[float]  # of every conversion

PLAIN = (1.0, 1.0)
GUESSES = ((0.1, 1.0), (0.1, 0.3), (0.02, 0.1), PLAIN)
GUESSED_AXES = 2  # with more, what is exposed where two axes are joined comes first
ROUNDS = 8  # that follow what was exposed
LOOK = 4  # rounds after which the promise of a plan is known,
PROMISE = 0.06  # by how much it may get better after those (measured: 0.04),
LATER = {5: 0.03, 6: 0.01}  # and after more (measured: 0.021 and 0.009)
LEAST = 0.03  # what is hidden is not free: there may be too much of it
RESTS = 0.003  # share by which three rounds that have come to rest may differ
NEWEST = 0.25  # least weight of the last round in the average


@dataclass(frozen=True)
class Seen:
    """Of a plan its step time and the shares of communication that it exposes."""

    step_s: float
    exposed: Mapping[Moved, float]


@dataclass
class Exposure:
    """Exposed shares of what has been moved in any round."""

    shares: dict[Moved, float] = field(default_factory=dict)
    rounds: int = 0

    def see(self, shares: Mapping[Moved, float]) -> None:
        """One more round: averages, in which the latest rounds count most."""
        self.rounds += 1
        newest = max(NEWEST, 1 / self.rounds)
        for moved, share in shares.items():
            known = self.shares.get(moved, share)
            self.shares[moved] = known + newest * (share - known)

    def counts(self, conversions: Sequence[Conversion], guessed: Counts) -> list[float]:
        """Of each conversion; a guess for what has never been moved."""
        return [
            max(LEAST, self.shares.get((c.tensor, c.phase), guess))
            for c, guess in zip(conversions, guessed, strict=True)
        ]


def settled(seconds: Sequence[float]) -> bool:
    """Whether the step times of the rounds have come to rest."""
    last = seconds[-3:]
    return len(last) == 3 and max(last) - min(last) <= RESTS * min(last)
