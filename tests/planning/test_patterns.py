"""Plans made by hand are called what their makers call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hand_plans import PATTERNS, hand_annotation

import meshes
from costmodels.program import Collective
from planner.architectures import ARCHITECTURES, build
from planner.model import Model, Pipeline, Training
from planner.planning import plan_model, price_annotations
from planner.report.patterns import patterns

SHAPE = {"x": 2, "y": 4}
MESH = meshes.logical(meshes.resolve("tpu-v3:2x2"), SHAPE)
BATCH = 32
SIZES: dict[str, Any] = {
    "d_model": 256, "d_ff": 1024, "heads": 8, "head_dim": 32, "vocab": 1024, "sequence": 128,
    "layers": 2,
}  # fmt: skip
X, Y = ("x",), ("y",)


def model(kind: str = "decoder", **more: Any) -> Model:
    training = Training(BATCH, "adamw", remat="full")
    settings = ARCHITECTURES[kind](**SIZES, **more)
    return Model("hand", build(settings, BATCH, training), training, BATCH * 128)


def named(m: Model, annotation: Mapping[str, Any]) -> set[str]:
    return set(patterns(price_annotations(m, MESH, annotation)))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("data parallel", {"data parallel over x and y"}),
        ("FSDP", {"FSDP over x and y"}),
        ("Megatron", {"data parallel over x", "tensor parallel over y"}),
        ("GSPMD 2-D", {"2-D finalized over x and y"}),
    ],
)
def test_what_experts_write(pattern: str, names: set[str]) -> None:
    m = model()
    given = dict(hand_annotation(m.graph, PATTERNS[pattern], SHAPE, "x", "y"))
    for p in m.graph.parameters():  # states lie like parameters, or the planner would split them
        axes = given.get(p.name, ((),) * sum(d != "layers" for d in p.dims))
        given |= {f"{p.name}.m": axes, f"{p.name}.v": axes}
    assert named(m, given) == names


@pytest.mark.parametrize(("gradients", "name"), [(False, "ZeRO-1"), (True, "ZeRO-2")])
def test_zero_stages_are_where_states_and_gradients_lie(gradients: bool, name: str) -> None:
    m = model()
    given = dict(hand_annotation(m.graph, PATTERNS["data parallel"], SHAPE, "x", "y"))
    for p in m.graph.parameters():
        if len(p.dims) > 1:
            split = tuple(("x", "y") if n % 8 == 0 and n > 8 else () for n in p.shape)
            last = max(i for i, axes in enumerate(split) if axes)
            split = tuple(a if i == last else () for i, a in enumerate(split))
            split = split[p.dims.count("layers") :]
            given |= {f"{p.name}.m": split, f"{p.name}.v": split}
            given[f"{p.name}.grad"] = split if gradients else ((),) * len(split)
    assert named(m, given) == {f"{name} over x and y"}


def test_sequence_parallel_besides_tensor_parallel() -> None:
    m = model()
    given = dict(hand_annotation(m.graph, PATTERNS["Megatron"], SHAPE, "x", "y"))
    between = ("x", "layers.x.in", "layers.mid", "layers.x", "layers.o", "layers.out")
    given |= dict.fromkeys(between, (X, Y, ()))
    assert named(m, given) >= {"tensor parallel over y", "sequence parallel over y"}


def test_context_parallel() -> None:
    """Positions of queries are split in attention, too; keys and values are whole there."""
    m = model()
    given: dict[str, Any] = {
        p.name: ((),) * sum(d != "layers" for d in p.dims) for p in m.graph.parameters()
    }
    given |= dict.fromkeys(("x", "layers.x.in", "layers.x", "layers.mid", "logits"), (X, Y, ()))
    given |= {"layers.q": (X, Y, (), ()), "layers.attn.mix": (X, Y, (), ())}
    given["layers.attn.scores"] = (X, (), Y, ())
    assert "context parallel over y" in named(m, given)


def test_ring_attention() -> None:
    """The planner's own plan of a long sequence, whose scores exist for one turn at a time."""
    long = {**SIZES, "sequence": 8192, "attention_blocks": 4}
    training = Training(1, "sgd", remat="full")
    m = Model("long", build(ARCHITECTURES["decoder"](**long), 1, training), training, 8192)
    mesh = meshes.logical(meshes.resolve("tpu-v3:2x1"), {"x": 4})
    result = plan_model(m, mesh)
    assert "ring attention over x" in patterns(result)
    moves = [i for i, _ in result.one_program.instructions() if isinstance(i, Collective)]
    ring = [i for i in moves if i.shift and i.tensor.startswith("layers.attn.ring.k")]
    assert {i.wrap for i in ring} == {True}
    assert {i.phase for i in ring} >= {"forward", "backward"}


def test_a_pipeline_is_no_tensor_parallelism() -> None:
    training = Training(BATCH, "adamw", remat="full", pipeline_microbatches=4)
    graph = build(ARCHITECTURES["decoder"](**SIZES), BATCH // 4, training)
    m = Model("piped", graph, training, BATCH * 128, Pipeline("x", "gpipe", inside=False))
    found = patterns(price_annotations(m, MESH, {}))
    assert "pipeline over x" in found
    assert not [name for name in found if name.startswith("tensor") and "x" in name.split()]


def test_expert_parallel() -> None:
    m = model("moe-decoder", experts=8, expert_d_ff=256)
    given = dict(hand_annotation(m.graph, PATTERNS["data parallel"], SHAPE, "x", "y"))
    given |= {"layers.expert_w_in": (Y, (), ()), "layers.expert_w_out": (Y, (), ())}
    given |= {"layers.dispatched": (Y, X, (), ()), "layers.expert_out": (Y, X, (), ())}
    assert "expert parallel over y" in named(m, given)
