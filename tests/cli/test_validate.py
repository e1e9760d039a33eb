"""plan validate and plan calibrate: what they print, write and exit with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import plan

import meshes
from costmodels.compute import efficiency, matmul_seconds, stream_seconds

SUITE = """
layouts:
  data: {activations: {B: x}}
runs:
  - id: small
    source: nobody
    model:
      mesh: {topology: "dgx-a100-80gb:1x2", shape: {x: 2}}
      training: {batch: 4}
      architecture: {kind: decoder, layers: 1, d_model: 64, heads: 4, sequence: 16, vocab: 64}
    layout: data
    measured: {step_time_s: SECONDS}
"""
KEYS = {"rows", "mean_abs_error", "median_abs_error", "max_abs_error", "halves", "runs"}


def suite(folder: Path, seconds: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(SUITE.replace("SECONDS", seconds))
    return path


def test_validate_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = plan(capsys, "validate", "--suite", suite(tmp_path, "1.0"), "--format", "json")
    assert ran.code == 0
    found = json.loads(ran.out)["suites"]["mine"]
    assert set(found) >= KEYS
    (run,) = found["runs"]
    assert found["rows"] == 1
    assert run["error"] == pytest.approx(run["predicted"]["step_time_s"] - 1)
    assert found["mean_abs_error"] == pytest.approx(abs(run["error"]))
    halves = found["halves"]
    assert halves[run["half"]]["rows"] == 1
    assert sum(half["rows"] for half in halves.values()) == 1


def test_an_error_that_is_too_large_is_a_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = suite(tmp_path, "1.0")
    ran = plan(capsys, "validate", "--suite", path, "--max-error", "10%")
    assert ran.code == 1
    assert "small" in ran.out
    assert "mine: mean error" in ran.err
    assert plan(capsys, "validate", "--suite", path, "--max-error", "100%").code == 0


def test_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    ran = plan(capsys, "validate", "--suite", "sedes")
    assert ran.code == 2
    assert "did you mean 'seeds'" in ran.err


def measured(folder: Path) -> Path:
    chip = meshes.resolve("dgx-a100-80gb:1").chip
    lines = ["kind,dtype,batch,m,n,k,bytes,seconds"]
    for size in (512, 1024, 2048, 4096, 8192):
        seconds = 2 * float(matmul_seconds(chip, 1, size, size, size))
        lines.append(f"matmul,bf16,1,{size},{size},{size},,{seconds}")
        moved = 1000.0 * size**2
        lines.append(f"stream,bf16,,,,,{moved},{2 * float(stream_seconds(chip, moved))}")
    path = folder / "kernels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_calibrate_writes_a_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    ran = plan(capsys, "calibrate", measured(tmp_path), "-o", path, "--mesh", "dgx-a100-80gb:1")
    assert ran.code == 0, ran.err
    assert "cross-validated" in ran.out
    chip = meshes.resolve(str(path)).chip
    assert efficiency(chip.efficiency) != efficiency("a100")
    size = 8192
    slow = float(matmul_seconds(chip, 1, size, size, size))
    plain = float(matmul_seconds(meshes.resolve("dgx-a100-80gb:1").chip, 1, size, size, size))
    assert slow == pytest.approx(2 * plain, rel=0.15)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("matmul,bf16,1,0,2,3,,1e-3", "kernels.csv:12: 'm' must be positive"),
        ("matmul,bf17,1,1,2,3,,1e-3", "kernels.csv:12: unknown dtype 'bf17'"),
        ("conv,bf16,1,1,2,3,,1e-3", "kernels.csv:12: unknown kind 'conv'"),
        ("stream,bf16,,,,,x,1e-3", "kernels.csv:12: 'bytes' must be a number"),
    ],
)
def test_a_wrong_kernel_says_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, message: str
) -> None:
    path = measured(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    out = tmp_path / "mine.yaml"
    ran = plan(capsys, "calibrate", path, "-o", out, "--mesh", "dgx-a100-80gb:1")
    assert ran.code == 2
    assert message in ran.err
    assert not out.exists()
