"""What one device of a chip can do: rates, memory, and how its matrix unit quantises work.

Only the description. What it means for the time of an operation is for costmodels.
"""

from __future__ import annotations

from dataclasses import dataclass

# Spellings people use, and the narrower types that share a matrix unit's rate.
_DTYPE_ALIASES = {
    "bfloat16": "bf16", "float16": "f16", "half": "f16", "fp16": "f16", "float32": "f32",
    "fp32": "f32", "float": "f32", "float64": "f64", "fp64": "f64", "double": "f64",
    "int8": "i8", "s8": "i8", "u8": "i8", "uint8": "i8", "fp8": "f8", "float8": "f8",
    "f8e4m3fn": "f8", "f8e5m2": "f8", "float8_e4m3fn": "f8", "float8_e5m2": "f8",
    "int16": "f32", "i16": "f32", "int32": "f32", "i32": "f32", "u32": "f32", "int64": "f64",
    "i64": "f64", "bool": "i8",
}  # fmt: skip

# A chip without an entry of its own computes in the next wider type it has.
_WIDER = {"f8": "bf16", "i8": "bf16", "f16": "bf16", "bf16": "f32", "f64": "f32"}


def canonical_dtype(dtype: str) -> str:
    """`bfloat16` -> `bf16`, `int8` -> `i8`; integers wider than a byte count as floats."""
    return _DTYPE_ALIASES.get(dtype, dtype)


@dataclass(frozen=True)
class MatrixUnit:
    """How matmul work is cut up. `kind`: `mxu` (systolic array) or `sm` (GPU multiprocessors).

    `tile` is (m, n, k) of the smallest piece; `units` how many such pieces run at once on a
    device (matrix units of a TPU device, multiprocessors of a GPU).
    """

    kind: str
    tile: tuple[int, int, int]
    units: int


@dataclass(frozen=True)
class Chip:
    """One *device*, as JAX counts devices, of a chip. Rates per device, SI units.

    `overlap` names the collective kinds that run asynchronously beside compute.
    `efficiency` names the fitted table of costmodels that belongs to the chip.
    `device_kind` is what JAX reports for it. `dispatch_s`: time of the host to issue one kernel
    or collective where a framework does so op by op; 0 for programs compiled as a whole.
    """

    name: str
    family: str  # "tpu" | "gpu"
    device_kind: str
    devices_per_chip: int
    peaks: tuple[tuple[str, float], ...]
    hbm_bytes: float
    usable_bytes: float
    hbm_bytes_per_s: float
    vector_flops: float
    clock_hz: float
    launch_s: float
    matrix_unit: MatrixUnit
    efficiency: str
    overlap: frozenset[str]
    dispatch_s: float = 0.0

    def peak_flops(self, dtype: str = "bf16") -> float:
        """Dense matmul peak of one device in FLOP/s, 2 per multiply-add.

        A type without an entry runs at the rate of the next wider one (fp8 on a chip without
        fp8 as bf16, bf16 on a V100 as f32). Raises ValueError for a name that is no type.
        """
        table = dict(self.peaks)
        name = canonical_dtype(dtype)
        while name not in table:
            if name not in _WIDER:
                raise ValueError(f"{self.name}: no peak for dtype {dtype!r}; has {sorted(table)}")
            name = _WIDER[name]
        return table[name]
