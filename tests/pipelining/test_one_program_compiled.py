"""Circular pipelines as one JAX program: on eight virtual devices, and by XLA's TPU compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import meshes
from planner.export.jax_program import result_program
from planner.modelfile import load_model
from planner.planning import plan_model
from planner.result import Result
from planner.verify import text, verify

SUPPORT = Path(__file__).parents[1] / "support"
MODEL = """
name: circular
training: {{batch: {batch}, pipeline_microbatches: 8, optimizer: adamw, compute: {compute}}}
pipeline: {{axis: pipe, schedule: circular, inside: false}}
architecture: {{kind: decoder, layers: 8, d_model: {width}, heads: 8, vocab: 512, sequence: 256}}
"""
CLOSE = 1e-4  # sums of a few thousand terms in f32, in another order
RUN = """
import sys
from on_cpu import largest_difference
print(largest_difference(sys.stdin.read()))
"""


def planned(topology: str, shape: dict[str, int], **sizes: str | int) -> Result:
    model = load_model(MODEL.format(**sizes), "circular.yaml")
    return plan_model(model, meshes.logical(meshes.resolve(topology), shape))


def test_eight_devices_compute_what_one_does() -> None:
    """Loss and gradients of the program, sharded, against the same without a mesh (which
    tests/export compares with the derived step)."""
    pytest.importorskip("jax")
    result = planned(
        "dgx-a100-80gb:1x8", {"pipe": 4, "data": 2}, batch=16, width=64, compute="f32"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(SUPPORT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=result_program(result), env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < CLOSE


@pytest.mark.compiler
def test_the_tpu_compiler_makes_the_same_of_it() -> None:
    """FLOPs of all ticks, bubbles included, and what moves from stage to stage."""
    pytest.importorskip("libtpu")
    result = planned("tpu-v4:2x2x1", {"pipe": 2, "data": 2}, batch=64, width=512, compute="bf16")
    v = verify(result)
    exact = [r for r in v.rows if r.name in ("arguments", "FLOPs per device")]
    assert all(r.error == pytest.approx(0, abs=0.001) for r in exact), text(v)
    (moved,) = (r for r in v.collectives if r.name == "collective-permute over pipe")
    assert moved.error == pytest.approx(0, abs=0.01), text(v)
