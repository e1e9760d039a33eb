"""Head to head with XLA's own auto-sharding: the same training step, compiled by the same compiler.

    python benchmarks/auto_sharding.py --python /opt/auto-venv/bin/python --keep rows.jsonl
    python benchmarks/auto_sharding.py --table rows.jsonl --write

The interpreter needs the last releases that have both auto-sharding and a compiler for TPUs:
jax 0.6.2 and libtpu 0.0.17. Every zoo model is compiled twice, on a small mesh (two layers of
2048 wide) and at full size on a full one: with our plan's annotations, and with none and `AUTO`
for all arguments and results. Both compiled programs are read by planner.verify: memory, the
compiler's own estimate of compute time, and the time of the collectives on rings of the chip's
links. Planning time is ours, and for XLA how much longer it compiles with AUTO than with our
annotations. Rows in --keep are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tests" / "support")]

from scaled_zoo import SMALL, scaled  # noqa: E402

import meshes  # noqa: E402
from meshes import LogicalMesh  # noqa: E402
from planner import zoo  # noqa: E402
from planner.export.jax_program import result_program  # noqa: E402
from planner.model import Model  # noqa: E402
from planner.modelfile import load_model  # noqa: E402
from planner.planning import Infeasible, Options, Unsolved, plan_model  # noqa: E402
from planner.verify import BackendError, ExportError  # noqa: E402
from planner.verify.compare import clock_hz  # noqa: E402
from planner.verify.compile import Compiled, compile_program  # noqa: E402
from planner.verify.hlo import parse  # noqa: E402
from planner.verify.hlo_reading import Executed, read  # noqa: E402

PAGE = ROOT / "docs" / "auto-sharding.md"
BEGINS, ENDS = "<!-- auto_sharding -->\n", "<!-- end of auto_sharding -->\n"
LIMIT_S = 1800.0  # of one compilation
LINK_BYTES_PER_S = 70e9  # of one link in one direction, TPU v3 (the same for both programs)
SMALL_MESH, SMALL_BATCH = ("tpu-v3:2x2", {"x": 2, "y": 4}), 64
# Those of the zoo's machines that libtpu compiles for; a TPU of about the size for the others.
FULL_MESHES: dict[str, tuple[str, dict[str, int]]] = {
    "bert-480b": ("tpu-v4:8x16x16", {"x": 64, "y": 32}),
    "glam-1.2t": ("tpu-v3:32x32", {"x": 64, "y": 32}),
    "gpt3-175b": ("tpu-v3:32x32", {"x": 64, "y": 32}),
    "gshard-m4": ("tpu-v3:32x32", {"expert": 2048}),
    "lamda-137b": ("tpu-v3:32x32", {"x": 32, "y": 64}),
    "llama3-8b": ("tpu-v3:8x8", {"x": 16, "y": 8}),
    "mixtral-8x7b": ("tpu-v3:16x32", {"x": 128, "y": 8}),
    "t5-11b": ("tpu-v3:8x8", {"x": 16, "y": 8}),
    "vit-22b": ("tpu-v4:8x8x16", {"x": 128, "y": 8}),
}  # fmt: skip
# The end of a generated program, for XLA's own search.
AUTO = '''

def compiled_step(mesh):
    from jax._src.sharding_impls import AUTO

    return jax.jit(
        train_step, in_shardings=AUTO(mesh), out_shardings=AUTO(mesh), donate_argnums=(0, 1)
    )
'''
HEAD = (
    "| model | mesh | | planning | peak | compute | collectives | both |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
)


@dataclass(frozen=True)
class Side:
    """One compiled program. `status`: compiled, exhausted, or why there is none."""

    status: str
    planning_s: float | None = None
    peak_bytes: int | None = None
    compute_s: float = 0.0
    ring_s: float = 0.0
    seconds: float = 0.0  # of the compiler

    @property
    def both_s(self) -> float:
        return self.compute_s + self.ring_s


@dataclass(frozen=True)
class Pair:
    model: str
    mesh: str
    ours: Side
    theirs: Side


def pair(name: str, model: Model, mesh: LogicalMesh, python: str) -> Pair:
    started = time.monotonic()
    try:
        planned = plan_model(model, mesh, Options(time_limit_s=LIMIT_S))
        planning_s = time.monotonic() - started
        program = result_program(planned)
    except (Infeasible, Unsolved, ExportError) as error:
        return Pair(name, _place(mesh), Side(str(error).splitlines()[0]), Side("not compiled"))
    ours = side(program, mesh, python, planning_s)
    theirs = side(program + AUTO, mesh, python, None)
    if theirs.seconds:
        longer = max(theirs.seconds - ours.seconds, 0.0)
        theirs = Side(**{**asdict(theirs), "planning_s": longer})
    return Pair(name, _place(mesh), ours, theirs)


def side(program: str, mesh: LogicalMesh, python: str, planning_s: float | None) -> Side:
    try:
        compiled = compile_program(program, mesh, "tpu", python, LIMIT_S)
    except BackendError as error:
        return Side(str(error).strip().splitlines()[-1][:160], planning_s)
    return measured(compiled, mesh, planning_s)


def measured(compiled: Compiled, mesh: LogicalMesh, planning_s: float | None) -> Side:
    peak, seconds = compiled.peak_bytes, compiled.seconds
    if compiled.status != "compiled":
        return Side(compiled.status, planning_s, peak, seconds=seconds)
    found = read(parse(compiled.hlo), mesh.axes)
    return Side(
        "compiled", planning_s, peak, found.cycles / clock_hz(mesh),
        ring_seconds(found.collectives, dict(mesh.axes), LINK_BYTES_PER_S), seconds,
    )  # fmt: skip


def ring_seconds(
    collectives: Iterable[Executed], sizes: Mapping[str, int], bytes_per_s: float
) -> float:
    """Seconds of all of a step's collectives on rings that send in both directions.

    Of a payload of b bytes on n devices a gather or scatter sends (n − 1)/n · b, a reduction
    twice that, an exchange b · n / 4 along the ring (a quarter of it on average), a permute b.
    """
    total = 0.0
    for c in collectives:
        n = prod(int(a.partition("/")[2] or sizes[a.partition("/")[0]]) for a in c.axes)
        share = (n - 1) / n
        sent = {"all-reduce": 2 * share, "all-to-all": n / 4, "collective-permute": 1.0}
        total += sent.get(c.kind, share) * c.bytes * c.count
    return total / (2 * bytes_per_s)


def _place(mesh: LogicalMesh) -> str:
    return f"{mesh.topology.name} " + ",".join(f"{a}={n}" for a, n in mesh.axes)


def cases(models: list[str], sizes: list[str]) -> Iterator[tuple[str, Model, LogicalMesh]]:
    if "small" in sizes:
        for name in SMALL:
            if not models or name in models:
                topology, shape = SMALL_MESH
                model = scaled(name, SMALL[name], SMALL_BATCH)
                yield f"{name}, 2 layers", model, _mesh(topology, shape)
    if "full" in sizes:
        for name, (topology, shape) in FULL_MESHES.items():
            if not models or name in models:
                yield name, load_model(zoo.text(name), name), _mesh(topology, shape)


def _mesh(topology: str, shape: Mapping[str, int]) -> LogicalMesh:
    return meshes.logical(meshes.resolve(topology), shape)


# ---- the table -----------------------------------------------------------------------------------


def load(path: Path) -> list[Pair]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Pair(r["model"], r["mesh"], Side(**r["ours"]), Side(**r["theirs"])) for r in rows
    ]


def table(pairs: Iterable[Pair]) -> str:
    lines = [HEAD]
    for p in pairs:
        for i, (who, s) in enumerate((("shardplan", p.ours), ("XLA", p.theirs))):
            place = (p.model, p.mesh) if i == 0 else ("", "")
            lines.append(f"| {' | '.join([*place, who, *_cells(s)])} |\n")
    return "".join(lines)


def _cells(s: Side) -> list[str]:
    planning = "–" if s.planning_s is None else f"{s.planning_s:.1f} s"
    peak = "–" if s.peak_bytes is None else f"{s.peak_bytes / 2**30:.2f} GiB"
    if s.status == "compiled":
        return [planning, peak, *(_time(x) for x in (s.compute_s, s.ring_s, s.both_s))]
    why = f"does not fit ({peak})" if s.status == "exhausted" and s.peak_bytes else s.status
    return [planning, why, "–", "–", "–"]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--sizes", default="small,full")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", type=Path, default=Path("auto-sharding.jsonl"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what FILE holds")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    given = parser.parse_args()
    if given.table is None:
        known = {(p.model, p.mesh) for p in load(given.keep)}
        for name, model, mesh in cases(given.models, given.sizes.split(",")):
            if (name, _place(mesh)) in known:
                continue
            made = pair(name, model, mesh, given.python)
            with given.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(made)) + "\n")
            print(table([made])[len(HEAD) :], end="", flush=True)
    text = table(load(given.table or given.keep))
    print("\n" + text)
    if given.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGINS)
        PAGE.write_text(before + BEGINS + text + ENDS + rest.split(ENDS)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
