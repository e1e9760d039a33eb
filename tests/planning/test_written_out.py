"""Layers written out in a model file: planned like a repeat, shown in the names of the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import meshes
from planner.annotations import annotated, axes_by_name
from planner.export.bundle import exporter, files
from planner.export.planfile import load as load_plan
from planner.modelfile import load_model
from planner.pins import PinError
from planner.planning import plan_model, price_annotations
from planner.request import Planned, Request, plan, read_plan
from planner.result import Result
from planner.source import Source

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from cli_support import plan as run_cli

ON = meshes.logical(meshes.resolve("dgx-a100-80gb:1"), {"x": 2, "y": 4})
HEAD = """\
mesh: {topology: "dgx-a100-80gb:1", shape: {x: 2, y: 4}}
dims: {B: 64, S: 128, D: 512, F: 1024, E: 4, V: 1024}
training: {batch: B, optimizer: adamw, remat: full}
graph:
  inputs: {tokens: "i32[B, S]", targets: "i32[B, S]"}
"""
START = "x = gather(embed, tokens)"
END = (
    'logits = einsum("B S D, V D -> B S V", x, embed)',
    "loss = cross_entropy(logits, targets)",
)
# Kinds of layers: parameters and ops; {i} is the number of the layer.
LAYERS = {
    "dense": (
        {"wi{i}": "[D, F]", "wo{i}": "[F, D]"},
        (
            'h{i} = einsum("B S D, D F -> B S F", x, wi{i})',
            'y{i} = einsum("B S F, F D -> B S D", gelu(h{i}), wo{i})',
            "x = x + y{i}",
        ),
    ),
    "normed": (
        {"scale{i}": "[D]", "wa{i}": "[D, F]", "wb{i}": "[D, F]", "wc{i}": "[F, D]"},
        (
            "n{i} = rms_norm(x, scale{i})",
            'a{i} = einsum("B S D, D F -> B S F", n{i}, wa{i})',
            'b{i} = einsum("B S D, D F -> B S F", n{i}, wb{i})',
            'c{i} = einsum("B S F, F D -> B S D", silu(a{i}) * b{i}, wc{i})',
            "x = x + c{i}",
        ),
    ),
    "experts": (
        {"we{i}": "[E, D, F]", "wf{i}": "[E, F, D]"},
        (
            'e{i} = einsum("B S D, E D F -> E B S F", x, we{i})',
            'f{i} = einsum("E B S F, E F D -> B S D", relu(e{i}), wf{i})',
            "x = x + f{i}",
        ),
    ),
}
Block = tuple[str, ...]  # the kinds of layers that are repeated together


def _params(kinds: Block, first: int) -> str:
    found = [
        f'{name.format(i=i)}: "{shape}"'
        for i, kind in enumerate(kinds, first)
        for name, shape in LAYERS[kind][0].items()
    ]
    return ", ".join(found)


def _ops(kinds: Block, first: int) -> list[str]:
    return [op.format(i=i) for i, kind in enumerate(kinds, first) for op in LAYERS[kind][1]]


def unrolled(block: Block, times: int, before: Block = (), more: str = "") -> str:
    """A file whose layers are written out; `before` are layers of another kind."""
    kinds = (*before, *block * times)
    ops = [START, *_ops(kinds, 0), *END]
    lines = "".join(f"    - {op}\n" for op in ops)
    return f'{HEAD}  params: {{embed: "[V, D]", {_params(kinds, 0)}}}\n  ops:\n{lines}{more}'


def rolled(block: Block, times: int, before: Block = (), more: str = "") -> str:
    """The same model with a repeat, whose parameters are called as those of its first layer."""
    first = len(before)
    params = 'embed: "[V, D]"' + (f", {_params(before, 0)}" if before else "")
    inside = "".join(f"        - {op}\n" for op in _ops(block, first))
    return "".join(
        [
            f"{HEAD}  params: {{{params}}}\n  ops:\n",
            *(f"    - {op}\n" for op in [START, *_ops(before, 0)]),
            f"    - repeat: {{name: layers, times: {times}, carry: [x]}}\n",
            f"      params: {{{_params(block, first)}}}\n      ops:\n{inside}",
            *(f"    - {op}\n" for op in END),
            more,
        ]
    )


def planned(text: str) -> Result:
    return plan_model(load_model(text, "m.yaml"), ON)


def figures(result: Result) -> tuple[float, float, int]:
    return result.plan.proof.objective_s, result.timing.step_time_s, result.memory.peak_bytes


CASES: dict[str, tuple[Block, int, Block]] = {
    "dense": (("dense",), 5, ()),
    "normed": (("normed",), 3, ()),
    "a period of two": (("dense", "experts"), 3, ()),
    "another first layer": (("normed",), 4, ("experts",)),
}
SETTINGS = {
    "": "remat: full",
    "saved": "remat: none",
    "dots": "remat: dots",
    "accumulated": "remat: full, accumulation_steps: 4",
}


@pytest.mark.parametrize(("block", "times", "before"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_it_plans_like_a_repeat(block: Block, times: int, before: Block, setting: str) -> None:
    texts = (unrolled(block, times, before), rolled(block, times, before))
    results = [planned(text.replace("remat: full", setting)) for text in texts]
    assert figures(results[0]) == figures(results[1])


@pytest.mark.parametrize("schedule", ["schedule: 1f1b", "schedule: gpipe, inside: false"])
def test_it_is_pipelined_like_a_repeat(schedule: str) -> None:
    on = meshes.logical(meshes.resolve("dgx-a100-80gb:1"), {"pipe": 2, "x": 4})
    more = f"pipeline: {{axis: pipe, {schedule}}}\n"
    results = []
    for write in (unrolled, rolled):
        text = write(("dense",), 4, more=more).replace("{x: 2, y: 4}", "{pipe: 2, x: 4}")
        text = text.replace("remat: full", "remat: full, pipeline_microbatches: 4")
        results.append(plan_model(load_model(text, "m.yaml"), on))
    assert figures(results[0]) == figures(results[1])
    assert {f"wi{i}" for i in range(4)} <= axes_by_name(results[0]).keys()


def test_a_pin_on_one_layer_holds_for_all() -> None:
    pin = "constraints:\n  {name}: [x, y]\n"
    found = planned(unrolled(("dense",), 4, more=pin.format(name="wi2")))
    wanted = planned(rolled(("dense",), 4, more=pin.format(name="layers.wi0")))
    assert figures(found) == figures(wanted)
    axes = axes_by_name(found)
    assert all(axes[f"wi{i}"] == (("x",), ("y",)) for i in range(4))


APART = """\
constraints:
  wi0: [x, y]
  wi1: [x, y]
  wi2: [y, x]
  wi3: [y, x]
  h1: [x, [], y]
"""


def test_pins_that_differ_are_all_kept() -> None:
    axes = axes_by_name(planned(unrolled(("dense",), 4, more=APART)))
    assert [axes[f"wi{i}"] for i in range(4)] == [(("x",), ("y",))] * 2 + [(("y",), ("x",))] * 2
    assert axes["h1"] == (("x",), (), ("y",))


def test_layers_planned_as_one_cannot_be_told_apart_afterwards() -> None:
    model = load_model(unrolled(("dense",), 4), "m.yaml")
    with pytest.raises(PinError, match="'wi3': its layer is planned as one with that of 'wi0'"):
        price_annotations(model, ON, {"wi0": [["x"], []], "wi3": [[], ["x"]]})


def test_annotations_have_the_tensors_of_the_file_and_no_others() -> None:
    model = load_model(unrolled(("dense",), 4), "m.yaml")
    names = {a.name: a for a in annotated(plan_model(model, ON))}
    written = axes_by_name(plan_model(model, ON))
    parameters = {"embed", *(f"{w}{i}" for w in ("wi", "wo") for i in range(4))}
    values = {f"{v}{i}" for v in ("h", "y") for i in range(4)}
    assert parameters | values | {"tokens", "targets", "x"} <= written.keys()
    assert not [name for name in written if ".in" in name or "[i]" in name]
    assert names["wi0"].title == "wi0 … wi3"
    assert names["wi0"].stacked == (4,)


@pytest.fixture(params=["", APART], ids=["alike", "apart"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model file and, in `out`, what its plan writes."""
    text = unrolled(("dense",), 4, more=request.param)
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    done = _plan(text)
    (tmp_path / "out").mkdir()
    for name, content in files(done).items():
        (tmp_path / "out" / name).write_text(content, encoding="utf-8")
    return tmp_path


def _plan(text: str) -> Planned:
    return plan(Request(Source("m.yaml", "m.yaml", text)))


def test_its_plan_is_read_again(folder: Path) -> None:
    stored = load_plan(folder / "out")
    again = read_plan(stored).result
    assert again.timing.step_time_s == stored.predicted["step_time_s"]
    wanted = json.loads((folder / "out" / "annotations.json").read_text(encoding="utf-8"))
    found = {name: [list(d) for d in axes] for name, axes in axes_by_name(again).items()}
    assert found == wanted["annotations"]


@pytest.mark.parametrize("file", ["plan.json", "annotations.json"])
def test_its_files_are_simulated(
    folder: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--plan" if file == "plan.json" else "--annotations", folder / "out" / file)
    ran = run_cli(capsys, "simulate", folder / "m.yaml", *given, "--format", "json")
    assert ran.code == 0, ran.err
    written = (folder / "out" / "annotations.json").read_text(encoding="utf-8")
    assert json.loads(ran.out)["annotations"] == json.loads(written)["annotations"]


def test_annotations_are_completed_as_those_of_a_repeat() -> None:
    results = []
    for write in (unrolled, rolled):
        model = load_model(write(("normed",), 3), "m.yaml")
        found = axes_by_name(plan_model(model, ON))
        results.append(price_annotations(model, ON, found))
    assert figures(results[0]) == figures(results[1])


def test_any_layer_is_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_cli(capsys, "explain", folder / "out", "wo3")
    assert ran.code == 0, ran.err
    assert "planned as one" in ran.out
    assert run_cli(capsys, "explain", folder / "out", "wo4").code == 2


@pytest.mark.parametrize("form", ["jax", "json", "flax", "shardy"])
def test_every_export_names_every_layer(form: str) -> None:
    text = exporter(form)(_plan(unrolled(("dense",), 4)))
    assert all(f"{w}{i}" in text for w in ("wi", "wo", "h") for i in range(4))


def test_the_jax_program_takes_the_parameters_of_the_file() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    text = unrolled(("dense",), 4).replace("remat: full", "remat: full, compute: f32")
    program: dict[str, Any] = {"__name__": "generated"}
    exec(exporter("jax-program")(_plan(text)), program)
    names = ["embed", *(f"{w}{i}" for i in range(4) for w in ("wi", "wo"))]
    shapes = {"e": (1024, 512), "wi": (512, 1024), "wo": (1024, 512)}
    keys = jax.random.split(jax.random.key(0), len(names))
    params = {
        name: 0.05 * jax.random.normal(key, shapes["e" if name == "embed" else name[:2]])
        for name, key in zip(names, keys, strict=True)
    }
    tokens, targets = jax.random.randint(keys[0], (2, 64, 128), 0, 1024)

    def loss(params: dict[str, Any]) -> Any:
        x = params["embed"][tokens]
        for i in range(4):
            x = x + jax.nn.gelu(x @ params[f"wi{i}"]) @ params[f"wo{i}"]
        logits = jax.nn.log_softmax(x @ params["embed"].T)
        return -jnp.take_along_axis(logits, targets[..., None], -1).mean()

    stacked = program["stack"](params)
    assert {n: p.shape for n, p in stacked.items()} == {
        n: row[0] for n, row in program["PARAMETERS"].items()
    }
    found, gradients = jax.value_and_grad(program["loss_fn"])(
        stacked, {"tokens": tokens, "targets": targets}
    )
    wanted, expected = jax.value_and_grad(loss)(params)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    apart = program["unstack"](gradients)
    assert apart.keys() == expected.keys()
    for name, value in expected.items():
        assert float(jnp.abs(apart[name] - value).max()) < 1e-4 * float(jnp.abs(value).max()), name
