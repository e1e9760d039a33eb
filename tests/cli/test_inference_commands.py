"""Inference through the commands: planned by --set, reported, stored, priced again, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import TINY, plan

DECODE = (
    "--set", "inference.phase=decode", "--set", "inference.batch=8",
    "--set", "inference.context=256",
)  # fmt: skip
MESH = ("--mesh", "tpu-v4:2x2x1", "--shape", "x=2,y=2")


def test_the_report_says_what_inference_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    ran = plan(capsys, "llama3-8b", *DECODE, *MESH)
    assert ran.code == 0, ran.err
    for words in (
        "decode of batch 8, context 256, bf16", "tokens/s per device", "KV cache 64.00 MiB",
        "memory bandwidth utilization", "kv cache", "parameters, inputs and caches",
        "layers.k_cache",
    ):  # fmt: skip
        assert words in ran.out
    assert "remat" not in ran.out


def test_the_document_of_a_decoding_step(capsys: pytest.CaptureFixture[str]) -> None:
    ran = plan(capsys, "llama3-8b", *DECODE, *MESH, "--format", "json")
    found = json.loads(ran.out)
    inference, memory = found["inference"], found["memory"]
    assert inference["phase"] == "decode"
    assert inference["latency_s"] == found["step_time_s"]
    assert found["tokens_per_s"] == pytest.approx(8 / found["step_time_s"])
    assert inference["tokens_per_s_per_device"] == pytest.approx(found["tokens_per_s"] / 4)
    cache = 2 * 32 * 8 * 256 * 8 * 128 * 2
    assert inference["kv_cache_bytes"] == memory["kv_cache_bytes"] == cache // 4
    read = 2 * (found["parameters"] - 128256 * 4096) + cache
    assert inference["bandwidth_utilization"] == pytest.approx(
        read / (found["step_time_s"] * 4 * 1.2e12)
    )
    assert found["remat"] is None
    whole = ("limit_bytes", "peak_bytes")
    parts = [v for k, v in memory.items() if k.endswith("_bytes") and k not in whole]
    assert sum(parts) == memory["peak_bytes"]


def test_a_training_step_has_no_inference(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, TINY, "--format", "json").out)
    assert found["inference"] is None
    assert found["memory"]["kv_cache_bytes"] == 0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import cli

    folder = tmp_path_factory.mktemp("decode") / "out"
    assert cli.run([TINY, *DECODE, "-o", str(folder), "--quiet"]) == 0
    return folder


def test_stored_plans_and_annotations_are_priced_the_same(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((stored / "plan.json").read_text(encoding="utf-8"))["predicted"]
    for given in (("--plan", stored), ("--annotations", stored / "annotations.json")):
        ran = plan(capsys, "simulate", TINY, *DECODE, *given, "--format", "json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["step_time_s"] == pytest.approx(first["step_time_s"], rel=1e-3)
    assert plan(capsys, "check", TINY, *DECODE, "--plan", stored).code == 0
    other = plan(capsys, "check", TINY, *DECODE[:-1], "inference.context=512", "--plan", stored)
    assert other.code == 1
    assert "stale" in other.err + other.out


@pytest.mark.parametrize("form", ["jax", "json", "flax", "maxtext", "shardy"])
def test_exports_hold_the_cache(
    form: str, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = plan(capsys, "export", stored, "--format", form)
    assert ran.code == 0, ran.err
    assert "layers.k_cache" in ran.out or (form == "maxtext" and "activation_kv" in ran.out)
    assert "k_cache.new" not in ran.out


def test_what_is_not_written_says_so(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = plan(capsys, "export", stored, "--format", "jax-program")
    assert ran.code == 2
    assert "planned for decode" in ran.err


def test_what_does_not_fit_says_what_to_relax(capsys: pytest.CaptureFixture[str]) -> None:
    ran = plan(capsys, TINY, *DECODE[:-1], "inference.context=100k", "--memory", "64MiB")
    assert ran.code == 1
    assert "a smaller inference.batch or inference.context" in ran.out
    assert "training" not in ran.out
