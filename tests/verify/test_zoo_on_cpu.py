"""The zoo scaled down, planned for eight devices and run on virtual CPUs: annotations change no
value. Loss and gradients of the exported program, sharded, against the same without a mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from scaled_zoo import SMALL, TINY, scaled
from verify_support import mesh

from planner import zoo
from planner.export.jax_program import result_program
from planner.planning import price_annotations

pytest.importorskip("jax")
SUPPORT = Path(__file__).parents[1] / "support"
RUN = """
import json, sys
from pathlib import Path
from on_cpu import largest_difference
found = {}
for path in Path(sys.argv[1]).glob("*.py"):
    name, _, steps = path.stem.rpartition("@")
    found[name] = largest_difference(path.read_text(encoding="utf-8"), int(steps))
print(json.dumps(found))
"""
# Sums of a few thousand terms in f32, in another order.
CLOSE = 1e-4


def differences(names: Sequence[str], folder: Path) -> dict[str, float]:
    """Largest relative difference of loss and gradients, by model."""
    for name in names:
        overrides = ("training.compute=f32", "training.optimizer=adamw")
        model = scaled(name, TINY[name], 16, *overrides)
        result = price_annotations(model, mesh("dgx-a100-80gb:1x8"), {})
        file = folder / f"{name}@{model.training.accumulation_steps}.py"
        file.write_text(result_program(result), encoding="utf-8")
    environment = {
        **os.environ, "PYTHONPATH": str(SUPPORT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_a_gated_decoder_and_experts(tmp_path: Path) -> None:
    found = differences(("lamda-137b", "mixtral-8x7b"), tmp_path)
    assert max(found.values()) < CLOSE, found


@pytest.mark.slow
def test_the_whole_zoo(tmp_path: Path) -> None:
    found = differences(sorted(TINY), tmp_path)
    assert set(found) == set(zoo.names())
    assert max(found.values()) < CLOSE, found


def test_every_zoo_model_has_a_small_one() -> None:
    assert set(TINY) == set(zoo.names())
    assert set(SMALL) <= set(TINY)
