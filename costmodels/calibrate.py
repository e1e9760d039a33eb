"""Fits a chip's efficiency table to measured kernels: what a user's own measurements are for.

The sample is products and streams with their seconds. Minimised is the mean of |log(predicted /
measured)|, by a pattern search over the logarithms of a few parameters: no derivatives, no
random numbers. Tile shapes, splits and vector rates stay those of the table that one starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from costmodels.compute import Efficiency, efficiency, matmul_with, stream_with
from meshes import Chip

Array = NDArray[np.float64]

FIRST_STEP, LAST_STEP = 0.3, 1e-3  # of the search, in logarithms: 30 % down to 0.1 %
MOST_SHARE = 1.0  # nothing runs faster than the rates of the datasheet
LEAST_S = 1e-7  # a latency of zero could not be scaled
LEAST_FILL = 8.0
FOLDS = 5
MOST_EVALUATIONS = 2000  # of a search whose step does not become small


@dataclass(frozen=True)
class Sample:
    """One measured kernel: `matmul` (batch, m, n, k) or None, `bytes` moved if a stream."""

    dtype: str
    seconds: float
    matmul: tuple[int, int, int, int] | None = None
    bytes: float = 0.0


@dataclass(frozen=True)
class Fit:
    """A table, its mean absolute error on what it was fitted to, and what cross-validation
    gives: the error of every fold under a table fitted to the other folds."""

    table: Efficiency
    error: float
    folds: tuple[float, ...]

    @property
    def cross_validated(self) -> float | None:
        return float(np.mean(self.folds)) if self.folds else None


def calibrate(chip: Chip, samples: Sequence[Sample]) -> Fit:
    """The chip's own table fitted to `samples`. Folds take every fifth sample in turn; with
    fewer than two samples per fold there is no cross-validation."""
    start = efficiency(chip.efficiency)
    folds = []
    if len(samples) >= 2 * FOLDS:
        for fold in range(FOLDS):
            rest = [s for i, s in enumerate(samples) if i % FOLDS != fold]
            out = [s for i, s in enumerate(samples) if i % FOLDS == fold]
            folds.append(mean_error(_fitted(chip, start, rest), chip, out))
    table = _fitted(chip, start, samples)
    return Fit(table, mean_error(table, chip, samples), tuple(folds))


def mean_error(table: Efficiency, chip: Chip, samples: Sequence[Sample]) -> float:
    """Mean of |predicted / measured - 1|."""
    measured = np.array([s.seconds for s in samples])
    return float(np.mean(np.abs(predicted(table, chip, samples) / measured - 1)))


def predicted(table: Efficiency, chip: Chip, samples: Sequence[Sample]) -> Array:
    """Seconds of every sample."""
    seconds = np.zeros(len(samples))
    for dtype in {s.dtype for s in samples}:
        products = [i for i, s in enumerate(samples) if s.dtype == dtype and s.matmul]
        streams = [i for i, s in enumerate(samples) if s.dtype == dtype and not s.matmul]
        if products:
            b, m, n, k = np.array([samples[i].matmul for i in products], dtype=float).T
            seconds[products] = matmul_with(table, chip, b, m, n, k, dtype=dtype)
        if streams:
            moved = np.array([samples[i].bytes for i in streams])
            seconds[streams] = stream_with(table, chip, moved, dtype=dtype)
    return seconds


def search(
    start: Sequence[float], loss: Callable[[Sequence[float]], float],
    evaluations: int = MOST_EVALUATIONS,
) -> list[float]:  # fmt: skip
    """Positive parameters of least loss: each in turn is scaled up and down, by less and less."""
    best, least, step = list(start), loss(start), FIRST_STEP
    while step > LAST_STEP and evaluations > 0:
        improved = False
        for i in range(len(best)):
            for factor in (1 + step, 1 / (1 + step)):
                tried = [*best[:i], best[i] * factor, *best[i + 1 :]]
                found = loss(tried)
                evaluations -= 1
                if found < least:
                    best, least, improved = tried, found, True
                    break
        step = step if improved else step / 2
    return best


def _fitted(chip: Chip, start: Efficiency, samples: Sequence[Sample]) -> Efficiency:
    measured = np.array([s.seconds for s in samples])
    products = any(s.matmul for s in samples)
    streams = any(not s.matmul for s in samples)

    def loss(values: Sequence[float]) -> float:
        table = _table(start, values, products, streams)
        if max(table.compute, table.memory, *(share for _, share in table.stream)) > MOST_SHARE:
            return float("inf")
        return float(np.mean(np.abs(np.log(predicted(table, chip, samples) / measured))))

    best = search(_values(start), loss)
    sides = [side for s in samples if s.matmul for side in s.matmul[1:]]
    sizes = (min(sides), max(sides)) if sides else start.sizes
    return replace(_table(start, best, products, streams), sizes=sizes)


def _values(table: Efficiency) -> list[float]:
    return [
        min(table.compute, MOST_SHARE), min(table.memory, MOST_SHARE),
        max(table.overhead_s, LEAST_S), max(table.fill, LEAST_FILL), 1.0,
        max(table.stream_overhead_s, LEAST_S),
    ]  # fmt: skip


def _table(
    start: Efficiency, values: Sequence[float], products: bool, streams: bool
) -> Efficiency:
    """`start` with other values, for what was measured."""
    compute, memory, overhead_s, fill, stream, stream_overhead_s = values
    table = start
    if products:
        fill = fill if start.tiles else start.fill  # systolic arrays have a model of their own
        table = replace(
            table, compute=compute, memory=memory, overhead_s=overhead_s, fill=fill
        )
    if streams:
        shares = tuple((width, share * stream) for width, share in start.stream)
        table = replace(table, stream=shares, stream_overhead_s=stream_overhead_s)
    return table
