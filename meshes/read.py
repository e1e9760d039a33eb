"""From a catalogue entry or mesh file to Chip and Dimensions."""

from __future__ import annotations

from meshes.chip import Chip, MatrixUnit
from meshes.document import Section
from meshes.topology import KINDS, Curve, Dimension

CHIP_KEYS = (
    "name", "family", "device_kind", "devices_per_chip", "peak_flops", "hbm_bytes", "usable_bytes",
    "hbm_bytes_per_s", "vector_flops", "clock_hz", "launch_s", "matrix_unit", "efficiency",
    "overlap", "dispatch_s",
)  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DIMENSION_KEYS = ("name", "size", "kind", "bytes_per_s", "latency_s", "curve", "curve_apart")


def read_chip(section: Section, name: str, base: Chip | None = None) -> Chip:
    """Chip from a `chip:` section; values there are per chip, a Chip's are per device.

    With `base`, every missing value is the base's.
    """
    section.allow(CHIP_KEYS)
    per = section.count("devices_per_chip", base.devices_per_chip if base else None)

    def share(key: str, old: float | None) -> float:
        return section.positive(key, old * per if old is not None else None) / per

    usable = share("usable_bytes", base.usable_bytes if base else None)
    hbm = share("hbm_bytes", base.hbm_bytes if base else None)
    if usable > hbm:
        raise section.error(
            f"usable_bytes ({usable * per:.0f}) exceeds hbm_bytes ({hbm * per:.0f})",
            "usable_bytes is what a program may use, per chip",
        )
    return Chip(
        name=section.text("name", name),
        family=section.text("family", base.family if base else None),
        device_kind=section.text("device_kind", base.device_kind if base else None),
        devices_per_chip=per,
        peaks=_peaks(section, per, base),
        hbm_bytes=hbm,
        usable_bytes=usable,
        hbm_bytes_per_s=share("hbm_bytes_per_s", base.hbm_bytes_per_s if base else None),
        vector_flops=share("vector_flops", base.vector_flops if base else None),
        clock_hz=section.positive("clock_hz", base.clock_hz if base else None),
        launch_s=section.number("launch_s", base.launch_s if base else None),
        matrix_unit=_matrix_unit(section, per, base),
        efficiency=section.text("efficiency", base.efficiency if base else None),
        overlap=_overlap(section, base),
        dispatch_s=section.number("dispatch_s", base.dispatch_s if base else 0.0),
    )


def _peaks(section: Section, per: int, base: Chip | None) -> tuple[tuple[str, float], ...]:
    peaks = dict(base.peaks) if base else {}
    if section.has("peak_flops") or base is None:
        given = section.section("peak_flops")
        peaks |= {dtype: given.positive(dtype) / per for dtype in given.names()}
    if "f32" not in peaks:
        raise section.error("peak_flops needs at least f32, the type every other falls back to")
    return tuple(sorted(peaks.items()))


def _matrix_unit(section: Section, per: int, base: Chip | None) -> MatrixUnit:
    if base is not None and not section.has("matrix_unit"):
        return base.matrix_unit
    unit = section.section("matrix_unit")
    unit.allow(("kind", "tile", "units"))
    kind, tile = unit.text("kind"), unit.counts("tile")
    if kind not in ("mxu", "sm"):
        raise unit.error(f"kind must be mxu or sm, not {kind!r}", at=unit.child("kind"))
    if len(tile) != 3 or min(tile) < 1:
        raise unit.error("tile must be three positive numbers: m, n, k", at=unit.child("tile"))
    return MatrixUnit(kind, (tile[0], tile[1], tile[2]), max(1, unit.count("units") // per))


def _overlap(section: Section, base: Chip | None) -> frozenset[str]:
    if base is not None and not section.has("overlap"):
        return base.overlap
    kinds = section.texts("overlap")
    for kind in kinds:
        if kind not in COLLECTIVES:
            known, at = ", ".join(COLLECTIVES), section.child("overlap")
            raise section.error(f"overlap: unknown collective {kind!r}", known, at)
    return frozenset(kinds)


def read_dimension(section: Section) -> Dimension:
    """One entry of the `dims:` list of a mesh file that stands on its own."""
    section.allow(DIMENSION_KEYS)
    kind = section.text("kind")
    if kind not in KINDS:
        hint = f"one of {', '.join(KINDS)}"
        raise section.error(f"unknown kind {kind!r}", hint, section.child("kind"))
    curve, apart = (
        read_curve(section.section(key)) if section.has(key) else ()
        for key in ("curve", "curve_apart")
    )
    rate = section.positive("bytes_per_s")
    latency = section.number("latency_s", 0.0)
    if kind == "switch" and not curve:
        curve = ((2, latency, rate),)
    if kind != "switch" and (curve or apart):
        raise section.error("only a switch has a curve")
    return Dimension(
        section.text("name"), section.count("size"), kind, rate, latency, curve, apart
    )


def read_curve(section: Section) -> Curve:
    """Group size -> latency_s, bytes_per_s; sorted by size."""
    rows = []
    for key in section.names():
        if not key.isdigit() or int(key) < 2:
            raise section.error(f"curve: a group size is a whole number from 2 on, not {key!r}")
        row = section.section(key)
        row.allow(("latency_s", "bytes_per_s", "mark", "source", "note"))
        rows.append((int(key), row.number("latency_s"), row.positive("bytes_per_s")))
    if not rows:
        raise section.error("curve is empty")
    return tuple(sorted(rows))
