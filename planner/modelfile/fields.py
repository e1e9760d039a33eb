"""The shape of a model file: its keys, their types, what each of them says.

Strict and frozen; one pydantic model per mapping of the file. What spans several keys (dims that
are used, tensors that exist, sizes that divide) is checked by other modules. JSON Schema for
editors comes from here too.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from planner.model import (
    OPTIMIZERS,
    PHASES,
    REMAT_POLICIES,
    SCHEDULES,
    Pipeline,
    Training,
)

LARGEST = 2**48  # far above any size in use; keeps products of a few sizes printable


def _size(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError("wrong_type", "must be a whole number, or made of dims")
    if isinstance(value, int) and not 0 < value <= LARGEST:
        raise PydanticCustomError("bad_value", "must be from 1 to 2^48")
    return value


def _sizes_or_word(value: Any) -> str:
    return "<word>" if isinstance(value, str) else "<sizes>"


def _mesh(value: Any) -> Any:
    """`mesh: tpu-v4:4x4x4` is short for `mesh: {topology: tpu-v4:4x4x4}`."""
    return {"topology": value} if isinstance(value, str) else value


def _axes(value: Any) -> Any:
    if value is None or value == "-":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise PydanticCustomError("wrong_type", "must be a mesh axis, a list of them, or null")


def _scalar(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PydanticCustomError("wrong_type", "must be a number or a word")
    return value


_SIZE_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}],
    "description": "a number, the name of a dim, or a product such as 4*D",
}
_AXES_SCHEMA = {
    "anyOf": [
        {"type": "string"}, {"type": "null"}, {"type": "array", "items": {"type": "string"}},
    ]
}  # fmt: skip

Size = Annotated[Any, BeforeValidator(_size), WithJsonSchema(_SIZE_SCHEMA)]
Axes = Annotated[Any, BeforeValidator(_axes), WithJsonSchema(_AXES_SCHEMA)]
Value = Annotated[Any, BeforeValidator(_scalar), WithJsonSchema({"type": ["number", "string"]})]
AxisSize = Annotated[int, Field(gt=0, le=LARGEST)]
# The tags of unions can be no keys of a file: they show up in the paths of errors.
Shape = Annotated[
    Annotated[dict[str, AxisSize], Tag("<sizes>")] | Annotated[Literal["auto"], Tag("<word>")],
    Discriminator(_sizes_or_word),
]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Mesh(_Strict):
    topology: Name = Field(
        description="catalogue name with sizes (tpu-v4:4x4x4, dgx-a100-80gb:16), or a mesh file"
    )
    shape: Shape | None = Field(
        None, description="sizes of the named mesh axes, in devices; or auto"
    )
    layout: dict[str, dict[str, AxisSize]] | None = Field(
        None, description="axis → physical dimension → size: overrides how axes are laid out"
    )


class TrainingFields(_Strict):
    batch: Size = Field(description="sequences (images) of one optimizer step")
    sequence: Size | None = Field(None, description="tokens of one sequence, for tokens/s")
    optimizer: Literal[OPTIMIZERS] = Field(  # type: ignore[valid-type]
        Training.optimizer, description="update rule, which decides the optimizer's state"
    )
    compute: Literal["bf16", "f16", "f32"] = Field(
        "bf16", description="type of activations and matrix products"
    )
    params: Literal["f32", "bf16", "f16"] = Field("f32", description="type of stored parameters")
    states: Literal["f32", "bf16"] = Field("f32", description="type of optimizer states")
    master: bool = Field(
        Training.master, description="an f32 copy of the parameters among the optimizer states"
    )
    gradients: Literal["f32", "bf16", "f16"] = Field(
        "f32", description="type in which gradients of several parts are added up and reduced"
    )
    fused_accumulation: bool = Field(
        Training.fused_accumulation,
        description="products add to the gradients of earlier parts, without a pass of its own",
    )
    reduce_once: bool | None = Field(
        None,
        description="gradients may stay unreduced until the last part; left out: if the pipeline's "
        "stages have programs of their own",
    )
    remat: Literal[REMAT_POLICIES] = Field(  # type: ignore[valid-type]
        "full", description="what is recomputed in the backward pass; auto: what is fastest"
    )
    accumulation_steps: Size = Field(1, description="gradient accumulation: parts of the batch")
    pipeline_microbatches: Size = Field(1, description="parts of the batch in a pipeline")


class InferenceFields(_Strict):
    phase: Literal[PHASES] = Field(  # type: ignore[valid-type]
        description="prefill: prompts are read; decode: every sequence gets one more token"
    )
    batch: Size = Field(description="sequences that are worked on at once")
    context: Size = Field(description="tokens of a prompt; decode: slots of the cache")
    compute: Literal["bf16", "f16", "f32"] = Field(
        "bf16", description="type of activations, matrix products and the cache"
    )
    params: Literal["f32", "bf16", "f16"] = Field("bf16", description="type of stored parameters")


class PipelineFields(_Strict):
    axis: Name = Field(description="mesh axis along which the layers are dealt out")
    schedule: Literal[SCHEDULES] = Field(  # type: ignore[valid-type]
        Pipeline.schedule, description="the order in which stages work on microbatches"
    )
    interleave: Size | None = Field(
        None, description="stages per device of interleaved and circular schedules; 2 if left out"
    )
    inside: bool = Field(
        Pipeline.inside,
        description="whether embedding and softmax belong to the first and last stage; else they "
        "run outside of the pipeline, on all devices",
    )


class RepeatFields(_Strict):
    name: Name = Field(description="prefix of the tensors inside")
    times: Size = Field(description="how often the body runs")
    carry: list[str] = Field(description="tensors that one run hands to the next")


def _op_or_block(value: Any) -> str:
    keys = set(value) if isinstance(value, dict) else set()
    if "architecture" in keys:
        return "<stack>"
    return "<block>" if keys & {"repeat", "params", "ops"} else "<op>"


class RepeatBlock(_Strict):
    repeat: RepeatFields = Field(description="name, number of runs, what each hands on")
    params: dict[str, str] = Field({}, description='parameters of one run: w_in: "[D, F]"')
    ops: list[OpOrBlock] = Field(description="ops of one run, in order")


class StackFields(BaseModel):
    """Settings are checked against those of the kind."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    kind: str = Field(description="the named architecture whose layers these are")
    name: Name = Field(description="prefix of the tensors inside")
    carry: Name = Field(description="the tensor [B, S, D] that the layers change")
    memory: Name | None = Field(None, description="what layers of a decoder attend to, too")


class StackBlock(_Strict):
    architecture: StackFields = Field(description="layers of a named architecture")


OpOrBlock = Annotated[
    Annotated[str, Tag("<op>")]
    | Annotated[RepeatBlock, Tag("<block>")]
    | Annotated[StackBlock, Tag("<stack>")],
    Discriminator(_op_or_block),
]


class Graph(_Strict):
    inputs: dict[str, str] = Field(description='data of a step: tokens: "i32[B, S]"')
    params: dict[str, str] = Field({}, description='parameters: embed: "[V, D]"')
    ops: list[OpOrBlock] = Field(
        min_length=1, description="name = function(…), in order; the loss is last or called loss"
    )


class AssumedFields(_Strict):
    key: Name = Field(description="dotted key of this file, for example training.batch")
    value: Value = Field(description="what this file uses there")
    low: Value = Field(description="the least it may be")
    high: Value = Field(description="the most it may be")
    why: str = Field(description="why this value, and what leaves it open")


class File(_Strict):
    """A model: its graph or architecture, how it is trained or used and, optionally, on which
    mesh."""

    schema_version: Literal[1] = Field(1, description="version of this format")
    name: Name | None = Field(None, description="name of the model; else that of the file")
    source: str | list[str] | None = Field(None, description="where the numbers come from")
    mesh: Annotated[Mesh, BeforeValidator(_mesh)] | None = Field(
        None, description="the machine; --mesh and --shape override it"
    )
    dims: dict[Name, Size] = Field({}, description="named sizes; a dim may be made of others")
    training: TrainingFields | None = Field(None, description="how a step is trained")
    pipeline: PipelineFields | None = Field(None, description="layers in stages along a mesh axis")
    inference: InferenceFields | None = Field(
        None, description="a step of inference instead of training"
    )
    architecture: dict[str, Any] | None = Field(None, description="a named builder: kind, sizes")
    graph: Graph | None = Field(None, description="a model of one's own: inputs, params, ops")
    constraints: dict[str, list[Axes]] = Field(
        {}, description="tensor → mesh axes of every dimension: layers.w_in: [data, null]"
    )
    uneven: bool = Field(
        False, description="whether axes may split dimensions that they do not divide, with padding"
    )
    assumed: list[AssumedFields] = Field(
        [], description="values that the source leaves open, with their range"
    )
    published_parameters: Annotated[float, Field(gt=0, lt=float("inf"))] | None = Field(
        None, description="parameter count that the source states, to compare with"
    )


# Keys people try that have another name here.
RENAMED = {
    "microbatches": "accumulation_steps (gradient accumulation) or pipeline_microbatches",
    "gradient_accumulation": "accumulation_steps",
    "global_batch_size": "batch", "batch_size": "batch", "seq_len": "sequence",
    "dtype": "compute", "precision": "compute", "parameters": "params", "model": "architecture",
    "layers": "repeat", "checkpointing": "remat",
}  # fmt: skip


def architectures() -> Mapping[str, type[BaseModel]]:
    """kind → settings; imported late, for a graph needs none of them."""
    found: Mapping[str, type[BaseModel]] = importlib.import_module(
        "planner.architectures"
    ).ARCHITECTURES
    return found


def stacks() -> Mapping[str, Any]:
    """kind → stack of layers that may stand among the ops of a graph."""
    found: Mapping[str, Any] = importlib.import_module("planner.architectures").STACKS
    return found


def schema() -> dict[str, Any]:
    """JSON Schema of a model file, for editors."""
    base = File.model_json_schema()
    base["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    base["title"] = "shardplan model file"
    # Text stands for a whole mesh: `mesh: tpu-v4:4x4x4`.
    base["properties"]["mesh"]["anyOf"].append({"type": "string"})
    base["properties"]["architecture"] = {
        "description": "a named builder: kind, sizes",
        "oneOf": [_settings(base, kind, model) for kind, model in architectures().items()],
    }
    stack = base["$defs"].pop("StackFields")["properties"]
    stack.pop("kind")
    base["$defs"]["StackBlock"]["properties"]["architecture"] = {
        "description": StackBlock.model_fields["architecture"].description,
        "oneOf": [
            _settings(base, kind, found.settings, stack, found.outside)
            for kind, found in stacks().items()
        ],
    }
    return base


def _settings(
    base: dict[str, Any], kind: str, model: type[BaseModel],
    stack: Mapping[str, Any] | None = None, outside: Collection[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Adds the settings of a kind to the definitions; for a `stack`, its own keys are among them,
    and none of those `outside`. Returns the reference."""
    settings = model.model_json_schema(ref_template="#/$defs/{model}")
    base["$defs"].update(settings.pop("$defs", {}))
    fields = {
        name: _with_dim_names(field)
        for name, field in settings["properties"].items()
        if name not in outside
    }
    settings["properties"] = {**(stack or {}), **fields, "kind": {"const": kind}}
    required = {"kind", *settings.get("required", [])}
    if stack:  # the width is that of what the layers carry
        required = required - {"d_model"} | {"name", "carry"}
    settings["required"] = sorted(required)
    name = f"stack-{kind}" if stack else f"architecture-{kind}"
    base["$defs"][name] = settings
    return {"$ref": f"#/$defs/{name}"}


def _with_dim_names(field: dict[str, Any]) -> dict[str, Any]:
    """A whole number may be given as the name of a dim."""
    kinds = field.get("anyOf", [field])
    if not any(kind.get("type") == "integer" for kind in kinds):
        return field
    return {"anyOf": [field, {"type": "string"}], "description": field.get("description", "")}
