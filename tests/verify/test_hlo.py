"""The HLO parser on stored output of four compilers (see verify_support.mlp) and on small texts."""

from __future__ import annotations

import re
from math import inf
from pathlib import Path

import numpy as np
import pytest
from verify_support import BATCH, FLOPS, HIDDEN, LAYERS, WIDTH

from planner.verify.compare import compiled_moves
from planner.verify.hlo import HloError, arrays, parse, replica_groups, trip_count
from planner.verify.hlo_reading import Reading, read
from planner.verify.normalise import normalised

DATA = Path(__file__).parent / "data"
MESH = (("x", 2), ("y", 4))
DEVICES = 8


def reading(name: str) -> Reading:
    return read(parse((DATA / f"mlp-{name}.hlo").read_text(encoding="utf-8")), MESH)


def totals(r: Reading) -> dict[tuple[str, tuple[str, ...]], int]:
    found: dict[tuple[str, tuple[str, ...]], int] = {}
    for c in r.collectives:
        found[c.kind, c.axes] = found.get((c.kind, c.axes), 0) + c.bytes * c.count
    return found


# ---- stored programs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu-v3", "tpu-v4", "cpu", "gpu"])
def test_flops_are_those_of_the_model(name: str) -> None:
    """Convolutions of the TPU, library calls of the GPU, dots of the CPU; loops run 3 times."""
    assert reading(name).flops == FLOPS / DEVICES


@pytest.mark.parametrize("name", ["tpu-v3", "tpu-v4"])
def test_tpu_collectives_with_trip_counts(name: str) -> None:
    """By hand: weights bf16 [1024, 2048] / 4 gathered over x, activations over y."""
    weight, activation = WIDTH * HIDDEN // 4 * 2, BATCH // 2 * WIDTH * 2
    assert totals(reading(name)) == {
        ("all-gather", ("x",)): LAYERS * 4 * weight,
        ("all-gather", ("y",)): LAYERS * 3 * activation,
        ("reduce-scatter", ("y",)): LAYERS * 2 * activation,
        ("reduce-scatter", ("x",)): LAYERS * 2 * weight,
        ("all-reduce", ("x", "y")): 4,  # the loss
    }


def test_decomposed_matmuls_and_asynchronous_fusions() -> None:
    """v5e, batch 32768, width 4096: permutes stand for gathers and scatters over y, and gathers
    carried out by several fusions count once."""
    r = reading("tpu-v5e")
    activation, weight = 32768 // 2 * 4096 * 2, 4096 * 8192 // 4 * 2
    found = normalised(compiled_moves(r.collectives), dict(MESH))
    assert found["all-gather", ("y",)] == pytest.approx(LAYERS * 3 * activation)
    assert found["reduce-scatter", ("y",)] == pytest.approx(LAYERS * 2 * activation)
    assert found["all-gather", ("x",)] == pytest.approx(LAYERS * 4 * weight)
    assert {c.stands_for for c in r.collectives} == {"", "all-gather", "reduce-scatter"}


@pytest.mark.parametrize(
    ("result", "operands", "target"),
    [
        ("bf16[8,28,28,32]", "bf16[8,56,56,16] %a, bf16[32,3,3,16] %b", "Forward"),
        ("bf16[8,56,56,16]", "bf16[8,28,28,32] %a, bf16[32,3,3,16] %b", "BackwardInput"),
        ("bf16[32,3,3,16]", "bf16[8,56,56,16] %a, bf16[8,28,28,32] %b", "BackwardFilter"),
    ],
)
def test_library_convolutions_and_their_gradients(
    result: str, operands: str, target: str
) -> None:
    """All three are one product: 28 x 28 positions, 9 taps, 16 to 32 features, 8 images."""
    arguments = [f"  {name} = {shape} parameter({i})" for i, (shape, name) in enumerate(
        part.split() for part in operands.split(", "))]
    text = "\n".join([
        "HloModule m", "", f"ENTRY %main (p: {result}) -> {result} {{", *arguments,
        f"  ROOT %c = ({result}, u8[0]) custom-call(%a, %b), window={{size=3x3 stride=2x2}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{target}"', "}", "",
    ])  # fmt: skip
    assert read(parse(text), ()).flops == 2 * 8 * 28 * 28 * 9 * 16 * 32


def test_phases_of_collectives() -> None:
    gathers = [c for c in reading("tpu-v3").collectives if c.kind == "all-gather"]
    phases = sorted(c.phase for c in gathers)
    assert phases == ["backward", *["forward"] * 3, *["recompute"] * 3]


def test_gpu_collectives_are_asynchronous_pairs_counted_once() -> None:
    r = reading("gpu")
    gathers = [c for c in r.collectives if c.kind == "all-gather"]
    assert all(c.asynchronous for c in gathers)
    assert {c.count for c in gathers} == {LAYERS}
    assert totals(r)["reduce-scatter", ("y",)] == LAYERS * 2 * BATCH // 2 * WIDTH * 2


def test_cpu_reduces_in_f32_and_never_scatters() -> None:
    found = totals(reading("cpu"))
    assert not any(kind == "reduce-scatter" for kind, _ in found)
    # The result of the second product (bf16 widened) forward, the input's gradient backward,
    # and the scalar loss.
    assert found["all-reduce", ("y",)] == LAYERS * 2 * BATCH // 2 * WIDTH * 4 + 4


@pytest.mark.parametrize("name", ["tpu-v3", "tpu-v4"])
def test_estimated_cycles_of_loop_bodies_count_with_their_trips(name: str) -> None:
    """An independent sum over the text: bodies run LAYERS times, everything else once."""
    text = (DATA / f"mlp-{name}.hlo").read_text(encoding="utf-8")
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    expected = 0
    for block in text.split("\n}\n"):
        head = re.search(r"%([\w.\-]+) \(", block)
        times = LAYERS if head and head[1] in bodies else 1
        expected += times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', block)))
    assert reading(name).cycles == expected > 0


def test_an_estimate_that_has_run_over_is_no_estimate() -> None:
    """libtpu prints the largest integer for some decomposed products of v5e."""
    text = (DATA / "mlp-tpu-v3.hlo").read_text(encoding="utf-8")
    over = text.replace('"estimated_cycles":"21128"', f'"estimated_cycles":"{2**63 - 1}"', 1)
    assert over != text
    assert read(parse(over), MESH).cycles == inf


# ---- syntax --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[3,2]<=[6]", [[0, 1], [2, 3], [4, 5]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_replica_groups(text: str, groups: list[list[int]]) -> None:
    np.testing.assert_array_equal(replica_groups(text), groups)


def test_the_comma_of_a_mesh_does_not_end_its_groups() -> None:
    """As the CPU compiler of jax 0.10.2 prints a reduction over the last axis of two."""
    groups = "mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}"
    r = read(parse(loop(LESS).replace("groups={}", f"groups={groups}")), (("a", 2), ("b", 2)))
    assert [c.axes for c in r.collectives] == [("b",)]


@pytest.mark.parametrize("text", ["mesh['a'=2", "(0,1)", "[2,2]"])
def test_unknown_replica_groups_are_an_error(text: str) -> None:
    with pytest.raises(HloError, match="replica groups"):
        replica_groups(text)


def test_shapes_with_tuples_layouts_and_dynamic_sizes() -> None:
    found = arrays("(bf16[8,1024]{1,0:T(8,128)(2,1)}, s32[]{:T(256)}, /*index=2*/f32[<=4,2]{1,0})")
    assert [(a.dtype, a.shape, a.bytes) for a in found] == [
        ("bf16", (8, 1024), 16384), ("s32", (), 4), ("f32", (4, 2), 32),
    ]  # fmt: skip


def loop(condition: str, start: int = 0, step: str = "add(%i, %one)", extra: str = "") -> str:
    """A module whose body all-reduces 8 floats over all of 4 devices."""
    return f"""HloModule test

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
{extra}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %two = s32[] constant(2)
  %next = s32[] {step}
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={{}}, to_apply=%sum
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %r)
}}

%condition (p: (s32[], f32[8])) -> pred[] {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  {condition}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %init = (s32[], f32[8]{{0}}) tuple(%start, %x)
  %while = (s32[], f32[8]{{0}}) while(%init), condition=%condition, body=%body
  ROOT %y = f32[8]{{0}} get-tuple-element(%while), index=1
}}
"""


LESS = "ROOT %lt = pred[] compare(%i, %n), direction=LT"


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (loop(LESS), 6),
        (loop(LESS, start=2), 4),
        (loop(LESS, step="add(%i, %two)"), 3),
        (loop(LESS, start=1, step="add(%i, %two)"), 3),  # 1, 3, 5
        (loop("ROOT %le = pred[] compare(%i, %n), direction=LE"), 7),
        (loop("ROOT %ne = pred[] compare(%i, %n), direction=NE"), 6),
        (loop("ROOT %gt = pred[] compare(%i, %n), direction=GT", 9, "subtract(%i, %one)"), 3),
        (loop(LESS, start=7), 0),
        (loop("ROOT %f = pred[] fusion(%n, %i), kind=kLoop, calls=%fused", extra="""
%fused (limit: s32[], counter: s32[]) -> pred[] {
  %limit = s32[] parameter(0)
  %counter = s32[] parameter(1)
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}
"""), 6),
    ],
)  # fmt: skip
def test_trip_counts_from_constants(text: str, times: int) -> None:
    r = read(parse(text), (("a", 4),))
    assert [(c.kind, c.axes, c.bytes, c.count) for c in r.collectives] == [
        ("all-reduce", ("a",), 32, times)
    ]


def test_printed_trip_count_wins() -> None:
    text = loop(LESS).replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    )
    assert read(parse(text), (("a", 4),)).collectives[0].count == 11


def test_loop_without_a_constant_bound_is_an_error() -> None:
    module = parse(loop("ROOT %lt = pred[] compare(%i, %i), direction=LT"))
    main = module.computations[module.entry]
    with pytest.raises(HloError, match="how often 'while' runs"):
        trip_count(module, main, main.by_name["while"])


def test_conditional_counts_its_larger_branch() -> None:
    text = """HloModule test

%small (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%large (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %p = f32[8]{0} collective-permute(%x.1), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}

ENTRY %main (i: s32[], x.2: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x.2 = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x.2, %x.2), branch_computations={%small, %large}
}
"""
    r = read(parse(text), (("a", 2), ("b", 2)))
    assert [(c.kind, c.axes, c.bytes) for c in r.collectives] == [
        ("collective-permute", ("b",), 32)
    ]


@pytest.mark.parametrize("text", ["", "HloModule x\n", "just text"])
def test_other_text_is_an_error(text: str) -> None:
    with pytest.raises(HloError, match="no ENTRY"):
        parse(text)


def test_groups_along_a_part_of_an_axis() -> None:
    text = loop(LESS).replace("replica_groups={}", "replica_groups={{0,1},{2,3}}")
    assert read(parse(text), (("a", 4),)).collectives[0].axes == ("a/2",)
    assert read(parse(text), (("a", 2), ("b", 2))).collectives[0].axes == ("b",)


REDUCED = """
HloModule reduced

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%sliced (p: f32[8], at: s32[]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %slice = f32[4]{0} dynamic-slice(%p, %at), dynamic_slice_sizes={4}
}

%written (zeros: f32[8], own: f32[4], at: s32[]) -> f32[8] {
  %zeros = f32[8]{0} parameter(0)
  %own = f32[4]{0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %all = f32[8]{0} dynamic-update-slice(%zeros, %own, %at)
}

ENTRY %main (x: f32[8], y: f32[4], at: s32[]) -> (f32[4], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %at = s32[] parameter(2)
  %zero = f32[] constant(VALUE)
  %zeros = f32[8]{0} broadcast(%zero), dimensions={}
  %among = f32[8]{0} fusion(%zeros, %y, %at), kind=kLoop, calls=%written
  %r = (f32[8]{0}, f32[8]{0}) all-reduce(%x, %among), replica_groups={{0,1}}, to_apply=%sum
  %first = f32[8]{0} get-tuple-element(%r), index=0
  %second = f32[8]{0} get-tuple-element(%r), index=1
  %own = f32[4]{0} fusion(%first, %at), kind=kLoop, calls=%sliced
  %READER
  ROOT %t = (f32[4]{0}, f32[8]{0}) tuple(%own, %second)
}
"""


@pytest.mark.parametrize(
    ("value", "reader", "expected"),
    [
        ("0", "", {"reduce-scatter": 32, "all-gather": 32}),
        # Somebody reads the whole sum, or the rest is not zero: then it is what it says.
        ("0", "whole = f32[8]{0} negate(%first)", {"": 32, "all-gather": 32}),
        ("1", "", {"reduce-scatter": 32, "": 32}),
    ],
)
def test_all_reduces_that_gather_or_scatter(
    value: str, reader: str, expected: dict[str, int]
) -> None:
    """Of two that the compiler has combined, one is only sliced, one is of slices among zeros."""
    text = REDUCED.replace("VALUE", value).replace("%READER", f"%{reader}" if reader else "")
    r = read(parse(text), (("a", 2),))
    assert {c.stands_for: c.bytes for c in r.collectives} == expected
    moved = normalised(compiled_moves(r.collectives), {"a": 2})
    plain = expected.get("", 0)
    assert moved.get(("all-gather", ("a",)), 0) == expected.get("all-gather", 0) + plain
    assert moved.get(("reduce-scatter", ("a",)), 0) == expected.get("reduce-scatter", 0) + plain
