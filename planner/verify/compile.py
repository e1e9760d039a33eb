"""Runs a backend's compiler on a generated program, in a process (and a Python) of its own.

The process is `worker.py`; request and answer are JSON files in a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meshes import LogicalMesh
from planner.verify.errors import BackendError
from planner.verify.targets import Target, target

DEFAULT_TIMEOUT_S = 900.0  # the largest models compile in two minutes on two busy cores
TAIL = 12  # lines of a failed compiler's output that are shown

# Extra and module that a backend needs besides jax.
_NEEDS = {"cpu": ("jax", "jax"), "tpu": ("libtpu", "shardplan[tpu]"),
          "gpu": ("jax_cuda12_plugin", "shardplan[gpu]")}  # fmt: skip
# Wordings of older and newer libtpu, and of the GPU's allocator.
_NEEDED = (
    r"Used ([\d.]+)([KMGT]?)i?B? of",
    r"required for [\w ]*\(([\d.]+)([KMGT]?)",
    r"allocate ([\d.]+) ?([KMGT]?)i?B",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says. `status`: compiled, or exhausted (then `needed_bytes` is known).

    Bytes are per device. `hlo`: the scheduled program's text ("" if exhausted).
    """

    backend: str
    status: str
    versions: Mapping[str, str]
    memory: Mapping[str, int] = field(default_factory=dict)
    needed_bytes: int | None = None
    error: str = ""
    hlo: str = field(default="", repr=False)
    seconds: float = 0.0

    @property
    def argument_bytes(self) -> int | None:
        return self.memory.get("argument_bytes")

    @property
    def temp_bytes(self) -> int | None:
        return self.memory.get("temp_bytes")

    @property
    def peak_bytes(self) -> int | None:
        """Arguments, results that are not donated, temporaries; what was needed if exhausted."""
        if self.status == "exhausted":
            return self.needed_bytes
        m = self.memory
        return m["argument_bytes"] + m["output_bytes"] - m["alias_bytes"] + m["temp_bytes"]


def compile_program(
    source: str, mesh: LogicalMesh, backend: str, python: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Compiled:  # fmt: skip
    """Compiles `source` (see planner.export.jax_program) for `mesh`.

    `python`: interpreter of an environment with the backend's packages; default this one.
    Raises BackendError.
    """
    goal = target(mesh, backend)
    interpreter = python or sys.executable
    with tempfile.TemporaryDirectory(prefix="plan-verify-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(source, encoding="utf-8")
        answer = _run(goal, interpreter, folder, timeout_s)
        return _compiled(goal, answer, _hlo(goal, folder))


def _run(goal: Target, interpreter: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    request = {
        "program": str(folder / "program.py"), "hlo": str(folder / "hlo.txt"),
        "answer": str(folder / "answer.json"), **asdict(goal),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [interpreter, str(Path(__file__).with_name("worker.py")), f"{folder}/request.json"]
    try:
        done = subprocess.run(
            command, env=_environment(goal, folder), cwd=folder, text=True, timeout=timeout_s,
            capture_output=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        text = f"the {goal.backend} compiler took more than {timeout_s:.0f} s"
        raise BackendError(text) from None
    except OSError as error:
        raise BackendError(
            f"cannot run {interpreter}: {error.strerror}",
            "--python takes the interpreter of an environment that has the backend",
        ) from None
    if done.returncode != 0:
        raise _failure(goal, done.returncode, done.stderr)
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer


def _environment(goal: Target, folder: Path) -> dict[str, str]:
    """This process's environment without what would lead JAX astray, plus the backend's own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    own = dict(goal.environment)
    if goal.backend == "gpu":
        own["XLA_FLAGS"] = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text"
    return {**kept, **own, "TF_CPP_MIN_LOG_LEVEL": "3"}


def _failure(goal: Target, code: int, stderr: str) -> BackendError:
    module, extra = _NEEDS[goal.backend]
    missing = re.search(r"No module named '([\w.]+)'", stderr)
    lost = "Unable to initialize backend" in stderr or "Unknown backend" in stderr
    unknown = re.search(r"(?:[Uu]nknown|not found).*(?:tpu|cuda)", stderr)
    if missing or lost or unknown:
        what = missing.group(1).split(".")[0] if missing else module
        return BackendError(
            f"the {goal.backend} compiler is not installed ({what} is missing)",
            f"install it with: pip install '{extra}' (in an environment of its own: give it with "
            "--python)",
        )
    if code < 0:
        return BackendError(f"the {goal.backend} compiler was killed by signal {-code}")
    tail = "\n".join(stderr.strip().splitlines()[-TAIL:])
    return BackendError(f"the {goal.backend} compiler failed:\n{tail}")


def _hlo(goal: Target, folder: Path) -> str:
    """The scheduled program: as the worker wrote it, or from XLA's dump (GPU)."""
    own = folder / "hlo.txt"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    dumps = sorted(
        (folder / "dump").glob("*after_optimizations.txt"), key=lambda p: p.stat().st_size
    )
    return dumps[-1].read_text(encoding="utf-8") if dumps else ""


def _compiled(goal: Target, answer: Mapping[str, Any], hlo: str) -> Compiled:
    error = str(answer.get("error", ""))
    return Compiled(
        goal.backend, answer["status"], answer["versions"], answer.get("memory", {}),
        needed_bytes(error) if error else None, error, hlo, answer["seconds"],
    )  # fmt: skip


def needed_bytes(message: str) -> int | None:
    """Bytes that a RESOURCE_EXHAUSTED message says the program needs (at least: some count only
    temporaries)."""
    for pattern in _NEEDED:
        found = re.search(pattern, message)
        if found:
            return round(float(found[1]) * _UNITS[found[2]])
    return None
