"""A small model for the compilers: MLP layers in a loop, whose FLOPs are known by hand."""

from __future__ import annotations

import re

import meshes
from planner.graph import expr as ex
from planner.graph.builder import Builder
from planner.model import Model, Training
from planner.sharding.spec import Spec

LAYERS, BATCH, WIDTH, HIDDEN = 3, 512, 1024, 2048
# Forward two products, recomputed one (the second one's result is not needed again), backward four.
FLOPS = LAYERS * 7 * 2 * BATCH * WIDTH * HIDDEN


def mlp(batch: int = BATCH, width: int = WIDTH) -> Model:
    hidden = width * HIDDEN // WIDTH
    b = Builder()
    x = b.input("x", (batch, width), ("B", "D"), "bf16")
    r = b.repeat("layers", LAYERS)
    entry = r.enter(x)
    w_in = r.param("w_in", (width, hidden), ("D", "F"))
    w_out = r.param("w_out", (hidden, width), ("F", "D"))
    h = r.pointwise("act", ("tanh", ex.x(0)), r.einsum("B D, D F -> B F", entry, w_in, name="h"))
    y = r.einsum("B F, F D -> B D", h, w_out, name="y")
    (out,) = r.end_repeat([(x, entry, r.pointwise("x", ex.add(ex.x(0), ex.x(1)), entry, y))])
    value = ex.div(ex.square(ex.x(0)), ex.c(batch * width))
    loss = b.map("loss", [(out, ("B", "D"))], (), value, dtype="f32")
    return Model("mlp", b.graph([loss]), Training(batch, "momentum"), batch)


def mesh(topology: str) -> meshes.LogicalMesh:
    return meshes.logical(meshes.resolve(topology), {"x": 2, "y": 4})


SPECS = {
    "x": Spec((("x",), ("y",))),
    "layers.w_in": Spec(((), ("x",), ("y",))),
    "layers.w_out": Spec(((), ("y",), ("x",))),
    "layers.x.in": Spec((("x",), ("y",))),
    "layers.h": Spec((("x",), ("y",))),
    "layers.x": Spec((("x",), ("y",))),
}


def trimmed(hlo: str) -> str:
    """HLO text without what the reader does not look at."""
    kept = []
    for line in hlo.splitlines():
        if line.startswith("HloModule"):
            kept.append(line.split(",")[0])
            continue
        if re.match(r"^(\d+ |FileNames|FunctionNames|FileLocations|StackFrames)", line):
            continue
        config = re.search(r", backend_config=(\{.*\})", line)
        if config:
            facts = re.findall(
                r'"(?:estimated_cycles":"\d+"|known_trip_count":\{"n":"?\d+"?\}'
                r'|lhs_contracting_dimensions":\[[^\]]*\])', config[1]
            )
            short = f", backend_config={{{','.join(facts)}}}" if facts else ""
            line = line.replace(config[0], short)
        line = re.sub(r"\{\d[\d,]*:[^}]*\}", "", line)  # layouts
        line = re.sub(r'metadata=\{[^}]*?(op_name="[^"]*")?[^}]*\}', r"metadata={\1}", line)
        line = re.sub(r', frontend_attributes=\{(chain_id="\d+")?[^}]*\}', r", \1", line)
        kept.append(line)
    return "\n".join(line for line in kept if line.strip()) + "\n"
