"""From a file of measured kernels to a machine file with efficiencies of one's own.

CSV with a header. Columns: `kind` (matmul or stream), `dtype`, `batch`, `m`, `n`, `k` of a
product, `bytes` of a stream, `seconds`. docs/validation.md has an example.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import meshes
from costmodels.calibrate import Fit, Sample, calibrate, mean_error
from costmodels.compute import efficiency, to_data
from meshes import MeshError, Topology, canonical_dtype
from planner.errors import InputError
from planner.export.jsontext import read_text

COLUMNS = ("kind", "dtype", "batch", "m", "n", "k", "bytes", "seconds")
SIZES = ("batch", "m", "n", "k")
LEAST_SAMPLES = 3  # fewer decide nothing


@dataclass(frozen=True)
class Calibration:
    """A fit for the chip of the machine called `mesh`, to `samples` kernels of `file`."""

    mesh: str
    file: str
    samples: int
    fit: Fit
    before: float  # mean error of the catalogue's table

    def machine(self) -> str:
        """The machine file: the catalogue's entry with the fitted table."""
        table = json.dumps({k: _rounded(v) for k, v in to_data(self.fit.table).items()})
        return (
            f"# Efficiencies fitted to {self.samples} measured kernels of {self.file}: mean error "
            f"{self.fit.error:.1%}.\n"
            f"base: {self.mesh}\n"
            f"chip:\n  efficiency: '{table}'\n"
        )

    def report(self) -> str:
        lines = [
            f"{self.samples} kernels of {self.file}, chip of {self.mesh}",
            f"mean error: {self.before:.1%} as in the catalogue, {self.fit.error:.1%} fitted",
        ]
        if self.fit.cross_validated is None:
            return "\n".join([*lines, "too few kernels for cross-validation"])
        folds = ", ".join(f"{error:.1%}" for error in self.fit.folds)
        return "\n".join([*lines, f"cross-validated: {self.fit.cross_validated:.1%} ({folds})"])


def fit_file(path: Path, mesh: str) -> Calibration:
    """Fits the chip of the machine `mesh` to the kernels of a CSV file.

    Raises InputError for a file that cannot be used, MeshError for an unknown machine.
    """
    topology = meshes.resolve(mesh)
    samples = read_samples(read_text(path), str(path), topology)
    fit = calibrate(topology.chip, samples)
    before = mean_error(efficiency(topology.chip.efficiency), topology.chip, samples)
    return Calibration(mesh, path.name, len(samples), fit, before)


def read_samples(text: str, file: str, topology: Topology) -> list[Sample]:
    """The kernels of a file; InputError names the line that is wrong."""
    lines = csv.DictReader(text.splitlines())
    if lines.fieldnames is None:
        raise InputError(f"{file}: empty")
    missing = [c for c in COLUMNS if c not in lines.fieldnames]
    if missing:
        raise InputError(f"{file}:1: no column {missing[0]!r}", f"columns: {', '.join(COLUMNS)}")
    found = [_sample(row, f"{file}:{lines.line_num}", topology) for row in lines]
    if len(found) < LEAST_SAMPLES:
        raise InputError(f"{file}: {len(found)} kernels, needed are at least {LEAST_SAMPLES}")
    return found


def _sample(row: Mapping[str, str | None], where: str, topology: Topology) -> Sample:
    def number(column: str) -> float:
        try:
            value = float(row[column] or "")
        except ValueError:
            raise InputError(f"{where}: {column!r} must be a number") from None
        if not 0 < value < float("inf"):
            raise InputError(f"{where}: {column!r} must be positive")
        return value

    kind, dtype = row["kind"], canonical_dtype(row["dtype"] or "")
    try:
        topology.chip.peak_flops(dtype)
    except (MeshError, ValueError):
        raise InputError(f"{where}: unknown dtype {row['dtype']!r}", "such as bf16, f32") from None
    if kind == "matmul":
        batch, m, n, k = (int(number(c)) for c in SIZES)
        return Sample(dtype, number("seconds"), (batch, m, n, k))
    if kind == "stream":
        return Sample(dtype, number("seconds"), bytes=number("bytes"))
    raise InputError(f"{where}: unknown kind {kind!r}", "matmul or stream")


def _rounded(value: object) -> object:
    """Numbers with the digits that a fit has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
