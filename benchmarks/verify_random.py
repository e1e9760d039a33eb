"""Random valid plans over the zoo scaled down, compiled by XLA and compared with the prediction.

    python benchmarks/verify_random.py cpu --count 50    # FLOPs, collectives, losses and gradients
    python benchmarks/verify_random.py tpu --count 40    # memory too, and verdicts near the limit

A plan is random where a user decides: mesh, batch, rematerialisation, and the shardings of the
inputs, of what passes from layer to layer, and of half of the parameters are drawn; the rest is
completed at least cost. On the TPU every plan gets a limit, drawn after compiling, so that the
compiled peak lies within 25 % of it: the verdict "fits" must then be right. Prints Markdown; a run
repeats for the same --seed, and goes on where the rows in --keep end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tests" / "support")]
# Before JAX is imported: it must see eight devices, and no TPU.
DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ.update(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

from on_cpu import largest_difference  # noqa: E402
from scaled_zoo import SMALL, TINY, scaled  # noqa: E402

import meshes  # noqa: E402
from meshes import LogicalMesh  # noqa: E402
from planner.export.jax_program import result_program  # noqa: E402
from planner.graph.core import Loop  # noqa: E402
from planner.graph.derive import training_step  # noqa: E402
from planner.model import Model  # noqa: E402
from planner.pins import Annotation  # noqa: E402
from planner.planning import DEFAULT_HEADROOM, price_annotations  # noqa: E402
from planner.result import Result  # noqa: E402
from planner.sharding.choices import WHOLE_NAMES  # noqa: E402
from planner.sharding.spec import Spec, all_specs  # noqa: E402
from planner.verify import worker  # noqa: E402
from planner.verify.compare import Thresholds, Verification, compare  # noqa: E402
from planner.verify.compile import Compiled, needed_bytes  # noqa: E402
from planner.verify.hlo import parse  # noqa: E402
from planner.verify.hlo_reading import read  # noqa: E402
from planner.verify.targets import target  # noqa: E402

MESHES = {"cpu": ("dgx-a100-80gb:1x8",), "tpu": ("tpu-v3:2x2", "tpu-v5e:2x4")}
SHAPES = ({"x": 8}, {"x": 2, "y": 4}, {"x": 4, "y": 2})
REMATS = ("none", "full", "dots")
NEAR = 0.25  # the compiled peak lies this near the limit
SMALLEST_PEAK = 256 * 2**20  # below, a compiler's fixed needs count: not judged


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    result: Result


def case(backend: str, seed: int) -> Case:
    """Models in turn, each under the next seed."""
    names = sorted(TINY if backend == "cpu" else SMALL)
    rng = random.Random(seed)
    name = names[seed % len(names)]
    mesh = _mesh(rng, backend)
    model = _model(rng, name, backend)
    pins = _pins(rng, model, mesh)
    result = price_annotations(model, mesh, pins)
    if overruled := _overruled(result) & set(pins):
        kept = {n: spec for n, spec in pins.items() if n not in overruled}
        result = price_annotations(model, mesh, kept)
    return Case(name, seed, result)


def _overruled(result: Result) -> set[str]:
    """What layers carry and every reader cuts further: no planner gathers it first, and no compiler
    does as it is told."""
    loops = (node for node in result.model.graph.nodes if isinstance(node, Loop))
    carried = {k.entry for loop in loops for k in loop.carries}
    readers: dict[str, list[Spec]] = {}
    for op, _ in result.graph.walk():
        choice = result.plan.choices.get(op.name)
        if choice is None or op.phase != "forward":
            continue
        for i, name in enumerate(op.ins):
            readers.setdefault(name, []).append(choice.operand(op.rule, i))
    return {
        name for name, read in readers.items() if name in carried
        and (lies := result.specs.get(name)) and all({*lies.axes} < {*r.axes} for r in read)
    }  # fmt: skip


def _mesh(rng: random.Random, backend: str) -> LogicalMesh:
    return meshes.logical(meshes.resolve(rng.choice(MESHES[backend])), rng.choice(SHAPES))


def _model(rng: random.Random, name: str, backend: str) -> Model:
    if backend == "cpu":
        return scaled(name, TINY[name], 16, "training.compute=f32", "training.optimizer=adamw")
    batch = rng.choice((64, 128, 256))
    remat = f"training.remat={rng.choice(REMATS)}"
    width = f"architecture.d_ff={rng.choice((4096, 8192, 16384))}"
    return scaled(name, SMALL[name], batch, remat, width)


def _pins(rng: random.Random, model: Model, mesh: LogicalMesh) -> Annotation:
    """Inputs and what layers carry split along their batch, half of the parameters anyhow."""
    sizes = {a: n for a, n in mesh.axes if n > 1}
    batch = rng.choice([(a,) for a in sizes] + [tuple(sizes)])
    pins: dict[str, tuple[tuple[str, ...], ...]] = {}
    graph = training_step(model)
    for tensor in graph.parameters():
        stacked = sum(d in WHOLE_NAMES for d in tensor.dims)
        if rng.random() < 0.5:
            pins[tensor.name] = rng.choice(all_specs(tensor.shape[stacked:], sizes)).dims
    tensors = model.graph.all_tensors()
    inputs = [n for n in model.graph.inputs if tensors[n].role != "parameter"]
    loops = (node for node in model.graph.nodes if isinstance(node, Loop))
    carried = [k.entry for loop in loops for k in loop.carries]
    known = graph.all_tensors()
    for tensor in (tensors[n] for n in (*inputs, *carried) if n in known):
        if tensor.shape and tensor.shape[0] % mesh.size(batch) == 0:
            pins[tensor.name] = (batch, *((),) * (len(tensor.shape) - 1))
    return pins


def compiled(case: Case, backend: str) -> tuple[Verification, float | None]:
    """The comparison; on the CPU also the largest relative difference of loss and gradients."""
    source, mesh = result_program(case.result), case.result.mesh
    found = compile_here(source, mesh, backend)
    reading = read(parse(found.hlo), mesh.axes) if found.hlo else None
    steps = case.result.model.training.accumulation_steps
    difference = largest_difference(source, steps) if backend == "cpu" else None
    return compare(case.result, found, reading, Thresholds()), difference


def compile_here(source: str, mesh: LogicalMesh, backend: str) -> Compiled:
    """In this process: importing JAX takes longer than compiling a small program."""
    goal = target(mesh, backend)
    os.environ.update({k: v for k, v in goal.environment.items() if k != "XLA_FLAGS"})
    with tempfile.TemporaryDirectory() as name:
        program, hlo = Path(name) / "program.py", Path(name) / "hlo.txt"
        program.write_text(source, encoding="utf-8")
        try:
            answer = worker.compiled({**asdict(goal), "program": str(program), "hlo": str(hlo)})
        except Exception as error:  # JAX has no class of its own for it
            if worker.EXHAUSTED not in str(error):
                raise
            return Compiled(backend, "exhausted", {}, needed_bytes=needed_bytes(str(error)))
        text = hlo.read_text(encoding="utf-8")
    return Compiled(backend, answer["status"], {}, answer["memory"], hlo=text)


def limit_of(case: Case, peak: float) -> float:
    """A limit with the compiled peak within NEAR of it."""
    return peak / random.Random(f"limit {case.seed}").uniform(1 - NEAR, 1 + NEAR)


def row(case: Case, v: Verification, difference: float | None) -> dict[str, Any]:
    by_name = {r.name: r for r in v.rows}
    peak = by_name["peak"]
    return {
        "model": case.name, "seed": case.seed, "mesh": v.mesh,
        "flops": by_name["FLOPs per device"].error if "FLOPs per device" in by_name else None,
        "arguments": by_name["arguments"].error, "peak": peak.error, "compiled": peak.compiled,
        "predicted": peak.predicted, "status": v.compiled.status, "difference": difference,
        "collectives": [abs(r.error) for r in v.collectives
                        if r.threshold is not None and r.error is not None],
        "limit": limit_of(case, peak.compiled) if peak.compiled else None,
    }  # fmt: skip


def headroom(rows: Sequence[Mapping[str, Any]]) -> float:
    """The worst under-prediction of a peak."""
    return max([0.0, *(1 / (1 + r["peak"]) - 1 for r in rows if r["peak"] is not None)])


def verdicts(rows: Sequence[Mapping[str, Any]], room: float) -> tuple[int, int, int]:
    """(false "fits", false "does not fit", plans)."""
    says = [(r["predicted"] * (1 + room) <= r["limit"], r["compiled"] <= r["limit"]) for r in rows]
    return (
        sum(said and not is_so for said, is_so in says),
        sum(is_so and not said for said, is_so in says), len(says),
    )  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], backend: str) -> Iterator[str]:
    yield f"| {len(rows)} plans | median | worst |\n| --- | ---: | ---: |"
    large = [r for r in rows if (r["compiled"] or 0) >= SMALLEST_PEAK]
    errors = {
        "FLOPs": [abs(r["flops"]) for r in rows if r["flops"] is not None],
        "collectives, per kind and axis": [e for r in rows for e in r["collectives"]],
    }
    if backend == "tpu":
        errors["arguments"] = [abs(r["arguments"]) for r in rows if r["arguments"] is not None]
        errors[f"peak ({len(large)} plans of 256 MiB and more)"] = [abs(r["peak"]) for r in large]
    else:
        errors["loss and gradients"] = [r["difference"] for r in rows]
    for name, found in errors.items():
        if found:
            yield f"| {name} | {median(found):.1%} | {max(found):.1%} |"
    if backend == "tpu" and large:
        yield f"\nworst under-prediction of a peak: {headroom(large):.1%}"
        for room in (0.0, DEFAULT_HEADROOM):
            wrong, careful, n = verdicts(large, room)
            yield f'headroom {room:.0%}: of {n}, {wrong} false "fits", {careful} false "does not"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("backend", choices=("cpu", "tpu"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="one JSON line per plan")
    given = parser.parse_args()
    target = given.keep or Path(tempfile.mkdtemp()) / "rows.jsonl"
    rows = []
    if target.is_file():
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    for seed in range(given.seed + len(rows), given.seed + given.count):
        drawn = case(given.backend, seed)
        rows.append(row(drawn, *compiled(drawn, given.backend)))
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(summary(rows, given.backend)))


if __name__ == "__main__":
    main()
