"""Files that load: what comes out of them, overrides, digests, the JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshes.yamltree import parse
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.graph.optimizers import RATE
from planner.model import Assumed, Model, Pipeline, Training
from planner.modelfile import ModelErrors, load_file, load_model, schema
from planner.modelfile.scalars import plain_data
from planner.values import reference
from planner.zoo import names, text

HERE = Path(__file__).parent / "good"
DESIGN = (HERE / "design.yaml").read_text(encoding="utf-8")
SMALL = [
    "dims.B=2", "dims.S=3", "dims.D=4", "dims.F=8", "dims.V=7", "training.optimizer=sgd",
    "mesh.shape={a: 64}", "constraints={}",
]  # fmt: skip


def load(name: str, overrides: tuple[str, ...] = ()) -> Model:
    return load_file(HERE / f"{name}.yaml", overrides)


def codes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ModelErrors) as error:
        load_model(text, "m.yaml", overrides)
    return [d.code for d in error.value.diagnostics]


# ---- the example of the documentation -----------------------------------------------------------


def test_design_example() -> None:
    model = load("design")
    assert model.name == "design"
    assert model.training == Training(batch=1024, optimizer="adamw", compute="bf16", remat="full")
    assert model.graph.parameter_count == 32000 * 4096 + 32 * 2 * 4096 * 16384
    assert model.tokens == 1024 * 4096
    assert (model.mesh, model.shape) == ("tpu-v4:4x4x4", {"data": 16, "model": 4})
    assert model.constraints == {"layers.w_in": (("data",), ("model",))}
    assert model.graph.tensors["layers.w_in"].shape == (32, 4096, 16384)


def test_design_example_computes_what_it_says() -> None:
    """The loss of the loaded graph is the loss of the same ops written in NumPy."""
    model = load_model(DESIGN, "m.yaml", SMALL)
    inputs = reference.random_inputs(model.graph)
    values = reference.evaluate(model.graph, inputs)
    x = inputs["embed"][inputs["tokens"]]
    for w_in, w_out in zip(inputs["layers.w_in"], inputs["layers.w_out"], strict=True):
        h = x @ w_in
        gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + gelu @ w_out
    logits = x @ inputs["embed"].T
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, inputs["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(values["loss"], (log_sum - picked).mean(), rtol=1e-9)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
@pytest.mark.parametrize("name", ["design", "nested", "convolutions"])
def test_training_step_descends_along_the_gradient(name: str, remat: str) -> None:
    """What SGD subtracts is the slope of the loss in a random direction, by finite differences."""
    small = SMALL if name == "design" else ()
    step = training_step(load(name, (*small, f"training.remat={remat}", "training.optimizer=sgd")))
    inputs = reference.random_inputs(step)
    rng = np.random.default_rng(1)
    direction = {old: rng.normal(size=inputs[old].shape) for old in step.aliases.values()}
    after = reference.evaluate(step, inputs)
    slope = sum(
        ((inputs[old] - after[new]) / RATE * direction[old]).sum()
        for new, old in step.aliases.items()
    )

    def loss(size: float) -> float:
        moved = {old: inputs[old] + size * d for old, d in direction.items()}
        return float(reference.evaluate(step, {**inputs, **moved})[step.outputs[0]])

    size = 1e-5
    assert slope == pytest.approx((loss(size) - loss(-size)) / (2 * size), rel=1e-4)


def test_nested_repeats() -> None:
    model = load("nested")
    tensors = model.graph.tensors
    assert tensors["blocks.layers.w_in"].shape == (2, 3, 8, 32)
    assert tensors["blocks.ln"].shape == (2, 8)
    assert tensors["embed"].shape == (100, 8)
    assert tensors["tokens"].shape == (4, 16)  # one of two accumulation steps
    assert model.training.batch == 8
    assert model.tokens == 8 * 16
    assert model.layout == {"data": {"x": 2, "y": 2}, "model": {"z": 2}}
    assert model.constraints["blocks.layers.w_in"] == ((), ("data", "model"))
    assert model.constraints["logits"] == (("data",), (), ("model",))
    assert model.assumed == (Assumed("training.batch", 8, 4, 16, "the source does not say"),)
    assert model.published_parameters == 2000
    assert {t.dtype for t in model.graph.parameters()} == {"bf16"}


def test_images_count_as_examples() -> None:
    assert load("convolutions").tokens == 4
    assert load("convolutions", ("graph.inputs.labels=f32[B]", "graph.ops=[l = mean(images)]"))


def test_smallest_file() -> None:
    """An architecture needs no more than eight lines; this one has three."""
    source = (HERE / "smallest.yaml").read_text(encoding="utf-8")
    model = load("smallest")
    assert source.count("\n") <= 8
    assert model.tokens == 64 * 128
    assert model.training == Training(batch=64)


@pytest.mark.parametrize("name", names())
def test_zoo_files_load(name: str) -> None:
    model = load_model(text(name), f"{name}.yaml")
    assert model.name == name
    assert model.digest


def test_mesh_file_beside_the_model_file(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text("base: tpu-v4:2x2x1\nchip: {usable_bytes: 20GiB}\n")
    source = "mesh: pod.yaml\n" + _without_mesh((HERE / "smallest.yaml").read_text())
    (tmp_path / "m.yaml").write_text(source)
    assert load_file(tmp_path / "m.yaml").mesh == "pod.yaml"
    (tmp_path / "pod.yaml").write_text("base: tpu-v4:2x2x1\nchip: {usable: 20GiB}\n")
    with pytest.raises(ModelErrors) as error:
        load_file(tmp_path / "m.yaml")
    (d,) = error.value.diagnostics
    assert (d.file, d.line, d.column) == (str(tmp_path / "pod.yaml"), 2, 8)
    (tmp_path / "pod.yaml").unlink()  # whoever lays the mesh out needs it, the model does not
    assert load_file(tmp_path / "m.yaml").mesh == "pod.yaml"


def _without_mesh(source: str) -> str:
    return "".join(line for line in source.splitlines(True) if not line.startswith("mesh"))


def test_standard_input_has_no_name() -> None:
    source = (HERE / "smallest.yaml").read_text(encoding="utf-8")
    assert {load_model(source, file).name for file in ("-", "<stdin>", "model.yaml")} == {"model"}


# ---- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e9", 10**9), ("512k", 512_000), ("16GiB", 16 * 2**30), ("64Ki", 65536),
        ("1.5k", 1500), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("+7", 7), ("4096.0", 4096),
        ("16 GiB", 16 * 2**30), ("012", 12), ("2M", 2 * 10**6),
    ],
)  # fmt: skip
def test_numbers(written: str, meant: int) -> None:
    model = load_model(f"training: {{batch: {written}}}\n" + ARCHITECTURE, "m.yaml")
    assert model.training.batch == meant


@pytest.mark.parametrize("written", ["1e999", "no", "1:30", "5 apples", "16gib", ".nan", "1__k_"])
def test_no_numbers(written: str) -> None:
    assert codes(f"training: {{batch: {written}}}\n" + ARCHITECTURE)


def test_no_and_yes_are_text() -> None:
    model = load_model(f"name: no\ntraining: {{batch: 8}}\n{ARCHITECTURE}", "m.yaml")
    assert model.name == "no"


ARCHITECTURE = "architecture: {kind: decoder, layers: 2, d_model: 128, sequence: 16}\n"


def test_dims_in_an_architecture() -> None:
    source = "dims: {B: 8, L: 3}\ntraining: {batch: B}\n" + ARCHITECTURE
    model = load_model(source.replace("layers: 2", "layers: L"), "m.yaml")
    assert model.graph.tensors["layers.wq"].shape[0] == 3


# ---- overrides --------------------------------------------------------------------------------


def test_overrides() -> None:
    model = load_model(
        DESIGN, "m.yaml",
        ["dims.B=512", "training.remat=none", "mesh.shape.data=8", "mesh.shape.model=8",
         "constraints.layers.w_in=[[data, model], null]", "name=other"],
    )  # fmt: skip
    assert (model.training.batch, model.training.remat) == (512, "none")
    assert model.shape == {"data": 8, "model": 8}
    assert model.constraints == {"layers.w_in": (("data", "model"), ())}
    assert model.name == "other"


def test_override_of_an_assumption_settles_it() -> None:
    assert load("nested", ("training.batch=16", "training.accumulation_steps=1")).assumed == ()


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ("training.batch", "bad-override"),
        ("=5", "bad-override"),
        ("training..batch=5", "bad-override"),
        ("training.batch=", "bad-override"),
        ("training.batch=[1", "bad-override"),
        ("training.batch.size=5", "bad-override"),
        ("graph.ops.0=x", "bad-override"),
        ("training.bach=5", "unknown-key"),
        ("training.batch=-5", "bad-value"),
        ("training.optimizer=adamm", "bad-value"),
        ("dims.B=b*", "bad-size"),
    ],
)
def test_bad_overrides_are_named(option: str, code: str) -> None:
    with pytest.raises(ModelErrors) as error:
        load_model(DESIGN, "m.yaml", [option])
    (d,) = error.value.diagnostics
    assert d.code == code
    assert d.file == f"--set {option}"


# ---- digest -----------------------------------------------------------------------------------


def test_digest_ignores_spelling() -> None:
    digest = load_model(DESIGN, "m.yaml").digest
    same = DESIGN.replace("x + y", "x  +  y  # a comment").replace("B: 1024", "B: 1024.0")
    same = same.replace("gather(embed, tokens)", "gather( embed,tokens )")
    same = "# another\nname: other\n" + same
    assert load_model(same, "n.yaml").digest == digest
    mesh = DESIGN.replace("data: 16, model: 4", "data: 8, model: 8")
    assert load_model(mesh, "m.yaml").digest == digest
    explicit = load_model(DESIGN, "m.yaml", ["training.params=f32", "training.sequence=S"])
    assert explicit.digest == digest


@pytest.mark.parametrize(
    "override",
    ["dims.F=8192", "training.remat=none", "training.optimizer=sgd", "constraints={}",
     "training.states=bf16", "uneven=true", "graph.params.embed=[V, D ,]"],
)  # fmt: skip
def test_digest_changes_with_the_content(override: str) -> None:
    if override.startswith("graph"):
        assert codes(DESIGN, override)
        return
    assert load_model(DESIGN, "m.yaml", [override]).digest != load_model(DESIGN, "m.yaml").digest


# ---- uneven ------------------------------------------------------------------------------------


def test_uneven_constraints() -> None:
    """Only where asked for, with little padding, and not of what a step is given."""
    pinned = "constraints={logits: [null, null, model], layers.h: [null, data, null]}"
    sizes = ("dims.V=50257", "dims.S=4100", "mesh.shape={data: 16, model: 4}")
    assert codes(DESIGN, *sizes, pinned) == ["not-divisible", "not-divisible"]
    model = load_model(DESIGN, "m.yaml", [*sizes, pinned, "uneven=true"])
    assert model.uneven
    assert model.constraints["logits"] == ((), (), ("model",))
    table = "constraints={embed: [model, null]}"
    assert codes(DESIGN, *sizes, table, "uneven=true") == ["not-divisible"]
    assert codes(DESIGN, *sizes, "dims.S=17", pinned, "uneven=true") == ["not-divisible"]


# ---- schema ------------------------------------------------------------------------------------


def test_schema_describes_every_key() -> None:
    found = schema()
    for name, field in found["properties"].items():
        assert field.get("description"), name
    for name, part in found["$defs"].items():
        for key, field in part.get("properties", {}).items():
            assert "description" in field or "const" in field, f"{name}.{key}"
        assert part.get("additionalProperties") is False, name


def test_schema_accepts_the_files() -> None:
    """A validator of the subset of JSON Schema that `schema()` uses, on all good files."""
    found = schema()
    texts = [text(name) for name in names()]
    texts += [p.read_text(encoding="utf-8") for p in sorted(HERE.glob("*.yaml"))]
    for source in texts:
        assert mismatch(found, plain_data(parse(source, "m.yaml").root), found) == ""
    assert mismatch(found, {"graph": {"inputs": {}, "opps": []}}, found)
    assert mismatch(found, {"training": {"batch": 8, "optimizer": "adamm"}}, found)
    assert mismatch(found, {"architecture": {"kind": "decoder", "layers": []}}, found)


TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
    "boolean": bool, "null": type(None),
}  # fmt: skip


def mismatch(part: Any, value: Any, root: Any, path: str = "$") -> str:
    """Where `value` breaks the schema, or ''."""
    if "$ref" in part:
        return mismatch(root["$defs"][part["$ref"].split("/")[-1]], value, root, path)
    for key in ("anyOf", "oneOf"):
        if key in part:
            tries = [mismatch(p, value, root, path) for p in part[key]]
            return "" if "" in tries else tries[0]
    if "const" in part or "enum" in part:
        return "" if value in part.get("enum", [part.get("const")]) else path
    wanted = part.get("type")
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not any(_is(value, kind) for kind in wanted):
        return path
    if isinstance(value, dict):
        return _object_mismatch(part, value, root, path)
    if isinstance(value, list):
        found = (mismatch(part.get("items", {}), v, root, path + "[]") for v in value)
        return next((p for p in found if p), "")
    return ""


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _object_mismatch(part: Any, value: Any, root: Any, path: str) -> str:
    fields, extra = part.get("properties", {}), part.get("additionalProperties", True)
    if set(part.get("required", [])) - set(value):
        return path
    for key, inner in value.items():
        if key not in fields and extra is False:
            return f"{path}.{key}"
        rule = fields.get(key, extra if isinstance(extra, dict) else {})
        found = mismatch(rule, inner, root, f"{path}.{key}")
        if found:
            return found
    return ""


# ---- layers of a named architecture in a graph of one's own --------------------------------------

WRITTEN_OUT = """
dims: {B: 2, S: 3, D: 8, V: 7}
training: {batch: B, optimizer: sgd, remat: REMAT}
graph:
  inputs: {tokens: "i32[B, S]", targets: "i32[B, S]"}
  params: {embed: "[V, D]", ln_f: "[D]"}
  ops:
    - x = gather(embed, tokens)
    - architecture: {kind: KIND, name: layers, carry: x, layers: 2, SETTINGS}
    - x = rms_norm(x, ln_f)
    - loss = cross_entropy(einsum("B S D, V D -> B S V", x, embed), targets)
"""
NAMED = """
training: {batch: 2, optimizer: sgd, remat: REMAT}
architecture: {kind: KIND, layers: 2, d_model: 8, vocab: 7, sequence: 3, SETTINGS}
"""


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("decoder", "heads: 2, norm: rms"), ("encoder", "heads: 2, norm: rms, gated: true"),
     ("moe-decoder", "heads: 2, norm: rms, experts: 4, moe_every: 2")],
)  # fmt: skip
def test_layers_in_a_graph_are_those_of_the_architecture(
    kind: str, settings: str, remat: str
) -> None:
    """The whole training step is the same: every value that it computes."""


    def step_of(text: str) -> Graph:
        filled = text.replace("KIND", kind).replace("SETTINGS", settings)
        return training_step(load_model(filled.replace("REMAT", remat), "m.yaml"))

    mixed, named = step_of(WRITTEN_OUT), step_of(NAMED)
    assert set(mixed.outputs) == set(named.outputs)
    inputs = reference.random_inputs(named)
    got, wanted = (reference.evaluate(step, inputs) for step in (mixed, named))
    for name in named.outputs:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-9, err_msg=name)


PIPELINED = "training: {batch: 64, pipeline_microbatches: 8}\n" + ARCHITECTURE


def test_a_pipelines_graph_is_for_one_microbatch() -> None:
    model = load_model(PIPELINED + "pipeline: {axis: pipe}\n", "m.yaml")
    assert model.pipeline == Pipeline("pipe", "1f1b", 1, inside=True)
    assert model.graph.tensors["tokens"].shape[0] == 8
    plain = load_model("training: {batch: 64}\n" + ARCHITECTURE, "m.yaml")
    assert model.tokens == plain.tokens
    assert model.digest != plain.digest


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ("{axis: p, schedule: interleaved}", Pipeline("p", "interleaved", 2)),
        ("{axis: p, schedule: interleaved, interleave: 3}", Pipeline("p", "interleaved", 3)),
        ("{axis: p, schedule: gpipe}", Pipeline("p", "gpipe", 1, inside=True)),
        ("{axis: p, schedule: circular, inside: false}", Pipeline("p", "circular", 2, False)),
    ],
)
def test_what_a_schedule_says_need_not_be_said(block: str, wanted: Pipeline) -> None:
    assert load_model(f"{PIPELINED}pipeline: {block}\n", "m.yaml").pipeline == wanted
