"""Keys and values between the steps of inference: what every layer remembers of each position.

A prefill step stacks what its layers make and hands it out as the cache. A decode step is given
the cache, reads it layer by layer, and writes what the new token adds once all layers are done:
a loop could not write over the stack that it reads.

Dimensions: T slots of the cache, else as in `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.graph import layers
from planner.graph.builder import Builder
from planner.graph.core import Tensor
from planner.graph.layers import Remembered
from planner.graph.structural import reshape
from planner.model import DECODE, Inference

ROLE = "cache"


@dataclass
class Cache:
    """The cache of one step. `filled` (decode): an input [B], the slots that hold something,
    which is also where the new token goes."""

    how: Inference
    filled: str = ""
    stacks: dict[str, str] = field(default_factory=dict)  # prefill: the caches; decode: → added

    @classmethod
    def of(cls, b: Builder, how: Inference) -> Cache:
        if how.phase != DECODE:
            return cls(how)
        return cls(how, b.input("filled", (how.batch,), ("B",), "i32"))

    @property
    def decodes(self) -> bool:
        return self.how.phase == DECODE

    def fill(self, b: Builder, name: str, made: str) -> None:
        """Prefill: `made` [B, T, …] is what this layer remembers as `name`."""
        stack = b.leave(made, f"{b.prefix}{name}_cache", ROLE)
        self.stacks[stack] = stack

    def recall(self, b: Builder, name: str, own: str) -> Remembered:
        """Decode: what this layer remembers as `name`, `own` [B, S = 1, …] is to be added."""
        t = b.lookup(own)
        batch, _, *rest = t.shape
        dims = t.dims[2:]
        slots = Tensor(
            f"{name}_cache", (batch, self.how.context, *rest), t.dtype, ("B", "T", *dims), ROLE
        )
        old = b.argument(slots)
        row = reshape(b, own, (batch, *rest), ("B", *dims), f"{name}_row")
        self.stacks[b.reads[-1].outer] = b.leave(row, f"{b.prefix}{name}_rows", "activation")
        return Remembered(old, own)

    def close(self, b: Builder) -> dict[str, str | None]:
        """After all layers: the caches that the step hands out, and what each takes over."""
        if not self.decodes:
            return dict.fromkeys(self.stacks)
        b.phase = "update"
        return {
            layers.appended(b, stack, rows, self.filled, f"{stack}.new"): stack
            for stack, rows in self.stacks.items()
        }
