"""From the text of a model file to a Model, or all that is wrong with it.

The steps: tree → overrides → sections against their fields → dims → training or inference →
mesh → graph → constraints and assumptions. A step whose input is broken is left out or works on
what is known, so that one run reports every mistake once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

import meshes
from meshes import MeshError
from meshes.yamltree import Listing, Node, Place, Scalar, Table, YamlProblem, parse, read_text
from planner.graph.builder import GraphError
from planner.graph.core import Graph
from planner.graph.fold import Folded, fold
from planner.model import (
    SEVERAL_CHUNKS,
    STACKED,
    Assumed,
    Inference,
    Model,
    Pipeline,
    Training,
)
from planner.modelfile import compile as graphs
from planner.modelfile import fields, named, overriding, validate
from planner.modelfile.constraints import check_constraints
from planner.modelfile.diagnostics import Findings, ModelErrors, from_mesh, from_yaml, nearest
from planner.modelfile.language import OpSyntax, parse_statement
from planner.modelfile.scalars import plain_data, value_of
from planner.modelfile.sizes import Dims, SizeError, Unknown, evaluate, resolve
from planner.pins import Annotation, exact


def load_file(path: Path, overrides: Sequence[str] = ()) -> Model:
    """The model in a file; ModelErrors (too large, not text, …), OSError if it cannot be read."""
    try:
        text = read_text(path)
    except YamlProblem as problem:
        raise ModelErrors([from_yaml(problem)]) from None
    return load_model(text, str(path), overrides)


def load_model(
    text: str, file: str, overrides: Sequence[str] = (), under: Annotation | None = None
) -> Model:
    """The model that `text` describes; `file` is what errors call it. `overrides` are changes
    such as "training.batch=512", `under` is what it is planned under if not its own constraints.
    Raises ModelErrors with every error of the text."""
    try:
        document = parse(text, file)
    except YamlProblem as problem:
        raise ModelErrors([from_yaml(problem)]) from None
    findings = Findings()
    for key in document.repeated:
        findings.add("duplicate-key", f"key '{key.value}' appears twice", key.place, "keep one")
    root = document.root
    if not isinstance(root, Table):
        findings.add("wrong-type", "a model file is a YAML mapping", root.place)
        raise ModelErrors(findings.diagnostics)
    changed = overriding.apply(root, overrides, findings)
    gone = overriding.settle(root, changed)
    model = _Loader(root, file, findings, changed, gone).model(under)
    if model is None or findings.diagnostics:
        raise ModelErrors(findings.diagnostics)
    return model


@dataclass
class _Loader:
    root: Table
    file: str
    findings: Findings
    changed: tuple[str, ...]
    gone: frozenset[str]  # sections that `changed` has replaced by others
    data: dict[str, Any] = field(default_factory=dict)
    dims: Dims = field(default_factory=Dims)
    training: Training | None = None
    inference: Inference | None = None
    sequence: int | None = None
    shape: Mapping[str, int] | None = None

    def model(self, under: Annotation | None) -> Model | None:
        self.data = validate.validate_file(self.root, self.findings)
        self._required()
        self.dims = self._dims({})
        self.training = self._training()
        self.inference = self._inference()
        mesh = self._mesh()
        pipeline = self._pipeline()
        graph, settings = self._graph()
        constraints = self._constraints(graph) if graph else {}
        assumed = self._assumed()
        workload = self.workload
        if self.findings.diagnostics or graph is None or workload is None:
            return None
        shape = mesh.shape if mesh else None
        folded = Folded(graph, {})
        if settings is None:  # the layers of architectures are loops already
            folded = fold(graph, exact(constraints if under is None else under))
        return Model(
            name=self.data.get("name") or _stem(self.file),
            graph=folded.graph,
            workload=workload,
            tokens=self._tokens(graph, settings, workload),
            pipeline=pipeline,
            mesh=mesh.topology if mesh else None,
            shape=shape,
            layout=mesh.layout if mesh else None,
            constraints=constraints,
            members=folded.members,
            uneven=self.uneven,
            assumed=assumed,
            published_parameters=self.data.get("published_parameters"),
            digest=self._digest(settings, workload, pipeline),
        )

    @property
    def workload(self) -> Training | Inference | None:
        return self.inference or self.training

    @property
    def uneven(self) -> bool:
        return bool(self.data.get("uneven", False))

    def _add(self, code: str, message: str, place: Place, hint: str = "") -> None:
        self.findings.add(code, message, place, hint)

    def _required(self) -> None:
        """Keys that a file needs or that exclude each other."""
        has = self.root.names()
        graph = self.root.key("graph")
        if "inference" in has:
            self._only_inference()
        elif "training" not in has:
            hint = "for example training: {batch: 256, optimizer: adamw}"
            message = "the file lacks the key 'training' or 'inference'"
            self._add("missing-key", message, self.root.place, hint)
        if graph and "architecture" in has:
            message = "a model has either an architecture or a graph"
            self._add("conflicting-keys", message, graph.place)
        elif not graph and "architecture" not in has:
            hint = "architecture: {kind: decoder, …} is the short way, graph: the general one"
            message = "the file lacks the key 'architecture' or 'graph'"
            self._add("missing-key", message, self.root.place, hint)

    def _only_inference(self) -> None:
        """What a file with inference cannot have."""
        for name in ("training", "pipeline"):
            key = self.root.key(name)
            if key:
                hint = "a plan is for one kind of step: keep one of them"
                self._add("conflicting-keys", f"inference excludes {name}", key.place, hint)
        graph, inference = self.root.key("graph"), self.root.key("inference")
        if graph and inference:
            message = "inference of a graph is not supported: only an architecture knows its cache"
            hint = "architecture: {kind: decoder, …}"
            self._add("not-supported", message, inference.place, hint)

    # ---- dims and workload -------------------------------------------------------------------

    def _dims(self, replaced: Mapping[str, int]) -> Dims:
        """Sizes of the dims, some of them `replaced`. Errors are noted the first time only."""
        node = self.root.get("dims")
        if node is None:
            return Dims()
        if not isinstance(node, Table):
            return Dims(lost=True)
        given: dict[str, int | str] = {}
        for key, value in node.entries:
            entry = value_of(value) if isinstance(value, Scalar) else None
            if isinstance(entry, int | str) and not isinstance(entry, bool):
                given[key.value] = replaced.get(key.value, entry)
            if not key.value.isidentifier() and not replaced:
                self._add("bad-name", f"'{key.value}' is no name", key.place, _NAME_HINT)
        sizes, errors = resolve(given)
        if not replaced:
            for name, error in errors.items():
                self._size_error(error, node.get(name))
        return Dims(sizes, set(node.names()) - set(sizes))

    def _size_error(self, error: SizeError, node: Node | None) -> None:
        node = node or self.root
        place = node.place_of(error.offset) if isinstance(node, Scalar) else node.place
        # A number that is out of range is noted where fields are checked.
        if not isinstance(node, Scalar) or isinstance(value_of(node), str):
            self._add(error.code, error.message, place, error.hint)

    def _training(self) -> Training | None:
        given = self.data.get("training")
        if given is None:
            return None
        values = given.model_dump()
        sizes = {}
        for key in _TRAINING_SIZES:
            size = self._size("training", key, values[key])
            if size is not None:
                sizes[key] = size
        sequence = values.pop("sequence")
        if sequence is not None:
            self.sequence = self._size("training", "sequence", sequence)
        if len(sizes) < len(_TRAINING_SIZES):
            return None
        batch, steps, parts = (sizes[key] for key in _TRAINING_SIZES)
        if batch % steps:
            self._not_divisible("accumulation_steps", f"batch {batch}", steps)
            return None
        if batch // steps % parts:
            self._not_divisible("pipeline_microbatches", f"{batch // steps} sequences", parts)
            return None
        return Training(**{**values, **sizes})

    def _inference(self) -> Inference | None:
        given: fields.InferenceFields | None = self.data.get("inference")
        if given is None:
            return None
        sizes = {key: self._size("inference", key, getattr(given, key)) for key in _INFERENCE_SIZES}
        if None in sizes.values():
            return None
        return Inference(**{**given.model_dump(), **sizes})

    def _not_divisible(self, key: str, what: str, parts: int) -> None:
        place = self._node("training", key).place
        self._add("not-divisible", f"{what} does not divide into {parts} {key}", place)

    def _size(self, section: str, key: str, value: int | str) -> int | None:
        try:
            return evaluate(value, self.dims)
        except SizeError as error:
            self._size_error(error, self._node(section, key))
        except Unknown:
            pass  # reported where the dim is defined
        return None

    def _node(self, *path: str) -> Node:
        """The node at `path`, or the nearest above that exists."""
        node: Node = self.root
        for part in path:
            child = node.get(part) if isinstance(node, Table) else None
            if child is None:
                break
            node = child
        return node

    def _micro_dims(self) -> Dims:
        """Dims as one run of the graph sees them: the batch is only a part."""
        parts = self.training.parts if self.training else 1
        if self.training is None or parts == 1:
            return self.dims
        name = self.data["training"].batch
        if isinstance(name, str) and name in self.dims:
            return self._dims({name: self.training.batch // parts})
        key = _TRAINING_SIZES[1 if self.training.accumulation_steps > 1 else 2]
        self._add(
            "bad-value", f"{key} needs a batch that is the name of a dim",
            self._node("training", "batch").place,
            "write dims: {B: 1024} and batch: B, so that the graph can be built for a part",
        )  # fmt: skip
        return self.dims

    # ---- mesh ---------------------------------------------------------------------------------

    def _mesh(self) -> fields.Mesh | None:
        mesh: fields.Mesh | None = self.data.get("mesh")
        if mesh is None:
            return None
        if isinstance(mesh.shape, dict):
            self.shape = mesh.shape
        path = self._mesh_file(mesh.topology)
        if path is not None and not path.is_file():
            return mesh  # an option may name another mesh; else laying it out will miss the file
        try:
            topology = meshes.resolve(str(path or mesh.topology))
        except MeshError as error:
            self._mesh_error(error, self._node("mesh", "topology"))
            return mesh
        if isinstance(mesh.shape, dict):
            try:
                meshes.logical(topology, mesh.shape, mesh.layout)
            except MeshError as error:
                key = "layout" if error.code == "bad-layout" else "shape"
                self._mesh_error(error, self._node("mesh", key))
        return mesh

    def _mesh_error(self, error: MeshError, node: Node) -> None:
        if error.line is not None:  # a mistake inside the mesh file
            self.findings.diagnostics.append(from_mesh(error))
            return
        code = "unknown-mesh" if error.code == "unknown-chip" else "bad-mesh"
        self._add(code, error.message, node.place, error.hint)

    def _mesh_file(self, name: str) -> Path | None:
        """Where a mesh that is no catalogue name should be: beside the model file."""
        beside = Path(PurePath(self.file).parent / name)
        return beside if name.endswith((".yaml", ".yml")) or beside.is_file() else None

    # ---- pipeline -----------------------------------------------------------------------------

    def _pipeline(self) -> Pipeline | None:
        given: fields.PipelineFields | None = self.data.get("pipeline")
        training = self.training
        if given is None:
            if (
                training is not None
                and training.pipeline_microbatches > 1
                and not (self.root.get("pipeline"))
            ):
                place = self._node("training", "pipeline_microbatches").place
                message = "pipeline_microbatches needs a pipeline"
                self._add("missing-key", message, place, "pipeline: {axis: pipe}")
            return None
        overridden = any(key.startswith("pipeline.") for key in self.changed)  # as --shape may be
        if self.shape is not None and given.axis not in self.shape and not overridden:
            message, hint = f"the mesh has no axis '{given.axis}'", nearest(given.axis, self.shape)
            self._add("unknown-axis", message, self._node("pipeline", "axis").place, hint)
        if training is not None and training.accumulation_steps > 1:
            self._add(
                "conflicting-keys", "a pipeline accumulates over its microbatches already",
                self._node("training", "accumulation_steps").place,
                "leave accumulation_steps out and raise pipeline_microbatches",
            )  # fmt: skip
        chunks, inside = self._interleave(given), self._inside(given)
        return Pipeline(given.axis, given.schedule, chunks, inside)

    def _interleave(self, given: fields.PipelineFields) -> int:
        several = given.schedule in SEVERAL_CHUNKS
        if given.interleave is None:
            return 2 if several else 1
        node = self._node("pipeline", "interleave")
        try:
            chunks = evaluate(given.interleave, self.dims)
        except SizeError as error:
            self._size_error(error, node)
            return 1
        except Unknown:  # reported where the dim is defined
            return 1
        if several == (chunks == 1):
            which = "at least 2" if several else "1"
            message = f"'pipeline.interleave' of schedule {given.schedule} is {which}"
            hint = "the schedules with several stages per device are interleaved and circular"
            self._add("bad-value", message, node.place, "" if several else hint)
        return chunks

    def _inside(self, given: fields.PipelineFields) -> bool:
        """Only where one program holds all stages can embedding and softmax be outside."""
        if not given.inside and given.schedule not in STACKED:
            message = f"schedule {given.schedule} has embedding and softmax in its stages"
            hint = f"one program holds all stages only with {' or '.join(STACKED)}"
            self._add("bad-value", message, self._node("pipeline", "inside").place, hint)
        return given.inside

    # ---- graph ----------------------------------------------------------------------------------

    def _graph(self) -> tuple[Graph | None, BaseModel | None]:
        """The graph and, if an architecture made it, that one's settings."""
        node = self.root.get("graph")
        if node is None:
            return self._architecture()
        dims = self._micro_dims()
        compute, params = "bf16", "f32"
        if self.training:
            compute, params = self.training.compute, self.training.params
        if "graph" in self.data and isinstance(node, Table):
            return graphs.compile_graph(node, dims, compute, params, self.findings), None
        graphs.check_syntax(node, self.findings)
        return None, None

    def _architecture(self) -> tuple[Graph | None, BaseModel | None]:
        settings = self._settings()
        workload = self.workload
        if settings is None or workload is None:
            return None, settings
        batch = workload.batch // (self.training.parts if self.training else 1)
        build = importlib.import_module("planner.architectures").build
        try:
            return build(settings, batch, workload), settings
        except GraphError as error:
            if self.inference:
                place = self._node("inference").place
                self._add("bad-value", f"'inference' cannot be: {error}", place)
            else:
                self._add("bad-architecture", str(error), self._node("architecture").place)
        return None, settings

    def _settings(self) -> BaseModel | None:
        node = self.root.get("architecture")
        if not isinstance(node, Table) or "architecture" not in self.data:
            return None
        model = named.chosen(node, fields.architectures(), self.findings)
        if model is None:
            return None
        return named.settings(self.root, model, named.values(node, self.dims), self.findings)

    def _tokens(
        self, graph: Graph, settings: BaseModel | None, training: Training | Inference
    ) -> int:
        """What one step processes: tokens of sequences, else examples."""
        if isinstance(training, Inference):
            return training.tokens
        if self.sequence is not None:
            return training.batch * self.sequence
        if settings is not None:
            return training.batch * int(getattr(settings, "tokens", 1))
        ids = [t for t in map(graph.tensors.__getitem__, graph.inputs) if t.dtype.startswith("i")]
        if not ids:
            return training.batch
        return prod(ids[0].shape) * training.parts

    # ---- what refers to the rest --------------------------------------------------------------

    def _constraints(self, graph: Graph) -> dict[str, tuple[tuple[str, ...], ...]]:
        node, given = self.root.get("constraints"), self.data.get("constraints")
        if not isinstance(node, Table) or given is None:
            return {}
        return check_constraints(given, node, graph, self.shape, self.uneven, self.findings)

    def _assumed(self) -> tuple[Assumed, ...]:
        """Assumptions that hold of this file; one that an override replaces is none any more."""
        node, found = self.root.get("assumed"), []
        for i, entry in enumerate(self.data.get("assumed", [])):
            item = node.items[i] if isinstance(node, Listing) else None
            if entry is None or not isinstance(item, Table) or entry.key in self.changed:
                continue
            if entry.key.split(".")[0] in self.gone:
                continue
            if self._assumption_holds(entry, item):
                found.append(Assumed(entry.key, entry.value, entry.low, entry.high, entry.why))
        return tuple(found)

    def _assumption_holds(self, entry: fields.AssumedFields, item: Table) -> bool:
        used = overriding.find(self.root, entry.key)
        if used is None or entry.key.startswith("assumed"):
            hint = nearest(entry.key, overriding.paths(self.root), "a dotted key of this file")
            place = self._of(item, "key")
            self._add("unknown-key", f"this file has no key '{entry.key}'", place, hint)
            return False
        value = value_of(used) if isinstance(used, Scalar) else plain_data(used)
        if entry.value not in (value, self.dims.sizes.get(str(value))):
            message = f"'{entry.key}' is {value} in this file, not {entry.value}"
            self._add("assumed-mismatch", message, self._of(item, "value"))
            return False
        numbers = (entry.low, entry.value, entry.high)
        if all(isinstance(n, int | float) for n in numbers) and sorted(numbers) != list(numbers):
            message = f"{entry.value} is not within {entry.low} … {entry.high}"
            self._add("bad-value", message, self._of(item, "low"))
            return False
        return True

    def _of(self, table: Table, key: str) -> Place:
        node = table.get(key)
        return node.place if node else table.place

    def _digest(
        self, settings: BaseModel | None, workload: Training | Inference,
        pipeline: Pipeline | None,
    ) -> str:  # fmt: skip
        """Hash of what decides the step, whatever the file's spelling, comments and mesh."""
        graph = self.root.get("graph")
        content = {
            "inference" if self.inference else "training": asdict(workload),
            "architecture": settings.model_dump() if settings else None,
            "dims": self.dims.sizes if graph else None,
            "graph": _canonical(graph) if graph else None,
            "constraints": self.data.get("constraints", {}),
        }
        if pipeline is not None:
            content["pipeline"] = asdict(pipeline)
        if self.uneven:
            content["uneven"] = True
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


_TRAINING_SIZES = ("batch", "accumulation_steps", "pipeline_microbatches")
_INFERENCE_SIZES = ("batch", "context")
_NAME_HINT = "a name is made of letters, digits and _"


def _canonical(node: Node) -> Any:
    """Plain data with ops and declarations in one spelling."""
    if isinstance(node, Table):
        return {key.value: _canonical(value) for key, value in node.entries}
    if isinstance(node, Listing):
        return [_canonical(item) for item in node.items]
    value = value_of(node)
    if not isinstance(value, str):
        return value
    try:
        return parse_statement(value).canonical
    except OpSyntax:
        return "".join(value.split())


def _stem(file: str) -> str:
    return "model" if file in ("", "-") or file.startswith("<") else PurePath(file).stem
