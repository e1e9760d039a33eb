"""Compiles a generated program ahead of time. Runs in a Python of its own: only jax is imported.

    python worker.py request.json

The request names the program, the backend, the topology and where to write; the answer is JSON.
Kept free of imports from this package because the environment of a backend may not have it.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

MEMORY = ("argument", "output", "alias", "temp", "generated_code")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")
EXHAUSTED = "RESOURCE_EXHAUSTED"


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"versions": _versions()}
    started = time.monotonic()
    try:
        answer.update(compiled(request))
    except Exception as error:  # whatever the compiler raises becomes the answer
        if EXHAUSTED not in str(error):
            raise
        answer.update(status="exhausted", error=str(error))
    answer["seconds"] = time.monotonic() - started
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles in this process; the answer without times and versions."""
    program = runpy.run_path(request["program"])
    mesh = program["make_mesh"](_devices(request))
    lowered = program["compiled_step"](mesh).lower(*program["shapes"]())
    done = lowered.compile(compiler_options=request["compiler_options"] or None)
    text = done.as_text()
    if text:
        Path(request["hlo"]).write_text(text, encoding="utf-8")
    analysis = done.memory_analysis()
    memory = {f"{kind}_bytes": getattr(analysis, f"{kind}_size_in_bytes") for kind in MEMORY}
    memory["peak_bytes"] = getattr(analysis, "peak_memory_in_bytes", None)
    return {"status": "compiled", "memory": memory}


def _devices(request: dict[str, Any]) -> list[Any]:
    import jax
    from jax.experimental import topologies

    if request["backend"] == "cpu":
        return list(jax.devices("cpu"))
    topology = topologies.get_topology_desc(**request["topology"])
    return list(topology.devices)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1])
