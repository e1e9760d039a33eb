"""What a compiler must be told about a topology that is not attached.

TPU: the name and layout options of libtpu's topologies. GPU: XLA's description of one device, and
nodes × GPUs. CPU: as many virtual devices as the mesh has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshes import LogicalMesh
from meshes.chip import Chip
from planner.verify.errors import BackendError

BACKENDS = ("tpu", "gpu", "cpu")
MAX_CPU_DEVICES = 512  # virtual devices are threads and whole copies of every buffer's bookkeeping

# Catalogue family → libtpu's name of the generation.
_GENERATIONS = {
    "tpu-v2": "v2", "tpu-v3": "v3", "tpu-v4": "v4", "tpu-v5e": "v5e", "tpu-v5p": "v5p",
    "tpu-v6e": "v6e", "tpu-v7": "tpu7x",
}  # fmt: skip
# v4 shows two single-core devices per chip unless asked for the two cores as one.
_MEGACORE = {"chip_config_name": "megacore", "num_slices": 1}
_V4_HOST = (2, 2, 1)  # chips of one v4 host


@dataclass(frozen=True)
class Target:
    """A backend ready to compile for: environment, topology and compiler options."""

    backend: str
    topology: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    compiler_options: Mapping[str, str] = field(default_factory=dict)


def backend_of(mesh: LogicalMesh) -> str:
    """The compiler that the machine itself would use."""
    return mesh.chip.family


def target(mesh: LogicalMesh, backend: str) -> Target:
    """Raises BackendError if the backend cannot stand for this topology."""
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend '{backend}'", f"use {', '.join(BACKENDS)}")
    if backend == "cpu":
        return _cpu(mesh)
    if mesh.chip.family != backend:
        raise BackendError(
            f"{mesh.topology.name} is no {backend.upper()} machine",
            f"use --backend {mesh.chip.family} (or cpu, for collectives and FLOPs only)",
        )
    return _tpu(mesh) if backend == "tpu" else _gpu(mesh)


def _cpu(mesh: LogicalMesh) -> Target:
    if mesh.devices > MAX_CPU_DEVICES:
        raise BackendError(
            f"{mesh.devices} virtual CPU devices are too many",
            f"the limit is {MAX_CPU_DEVICES}; use --backend {mesh.chip.family}",
        )
    flags = f"--xla_force_host_platform_device_count={mesh.devices}"
    return Target("cpu", environment={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})


def _tpu(mesh: LogicalMesh) -> Target:
    generation = _GENERATIONS.get(mesh.chip.name)
    if generation is None:
        raise BackendError(
            f"the TPU compiler has no chip '{mesh.chip.name}'",
            f"it knows {', '.join(_GENERATIONS)}",
        )
    # Of a stage's submesh any dimension may be 1. Hosts are flat: libtpu wants these last, and the
    # order of the devices stays.
    dims = sorted(mesh.topology.dims, key=lambda size: size == 1)
    topology: dict[str, Any] = {
        "platform": "tpu", "topology_name": f"{generation}:{'x'.join(map(str, dims))}",
    }  # fmt: skip
    if generation == "v4":
        host = [min(n, h) for n, h in zip(dims, _V4_HOST, strict=True)]
        topology.update(_MEGACORE, chips_per_host_bounds=host)
    # JAX itself runs on the CPU; libtpu must not look for a metadata server, and may be loaded by
    # several compilers at once: none of them holds a TPU.
    environment = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    return Target("tpu", topology, environment)


# ---- GPU -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Architecture:
    """Figures of NVIDIA's CUDA programming guide, table of technical specifications per compute
    capability; cache sizes of the architecture white papers."""

    capability: tuple[int, int]
    shared_bytes: int  # per multiprocessor, for programs
    reserved_bytes: int  # of it, per block
    fpus: int
    l2_bytes: int


_SHARED_DEFAULT = 48 * 1024  # per block without opting in to more
_ARCHITECTURES = {
    "V100": _Architecture((7, 0), 96 * 1024, 0, 64, 6 * 2**20),
    "A100": _Architecture((8, 0), 164 * 1024, 1024, 64, 40 * 2**20),
    "H100": _Architecture((9, 0), 228 * 1024, 1024, 128, 50 * 2**20),
}


def gpu_config(chip: Chip) -> str:
    """XLA's GpuTargetConfig of a catalogue chip, as protocol buffer text."""
    known = next((a for name, a in _ARCHITECTURES.items() if name in chip.device_kind), None)
    if known is None:
        raise BackendError(
            f"no description of '{chip.device_kind}' for the GPU compiler",
            f"there are some for {', '.join(_ARCHITECTURES)}",
        )
    major, minor = known.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {_SHARED_DEFAULT}
  shared_memory_per_core: {known.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {chip.matrix_unit.units}
  fpus_per_core: {known.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_bytes_per_s)}
  l2_cache_size: {known.l2_bytes}
  clock_rate_ghz: {chip.clock_hz / 1e9:.3f}
  device_memory_size: {int(chip.hbm_bytes)}
  shared_memory_per_block_optin: {known.shared_bytes - known.reserved_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{chip.device_kind}"
"""


def _gpu(mesh: LogicalMesh) -> Target:
    nodes, gpus = (*(1,) * (2 - len(mesh.topology.dims)), *mesh.topology.dims)
    name = f"1x{nodes}x{gpus}"  # slices × hosts × GPUs of a host
    topology = {
        "topology_name": name, "platform": "cuda", "target_config": gpu_config(mesh.chip),
        "topology": name,
    }  # fmt: skip
    environment = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    # Without a GPU nothing can be timed, so the compiler must not try.
    return Target("gpu", topology, environment, {"xla_gpu_autotune_level": "0"})
