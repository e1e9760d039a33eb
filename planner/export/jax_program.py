"""A self-contained JAX training program: mesh, annotations, loss, optimizer, jitted train step.

The file needs only jax and is meant to be read and kept. It is written from the *unfused* forward
graph (`model.graph`), the training settings and the specs of named tensors; how a loss is written
is in `jax_loss.py`, the functions that are the same in every program are in `jax_sources.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshes import LogicalMesh
from planner.export.jax_expr import JNP_DTYPES, partition
from planner.export.jax_loss import LossWriter, wrapped
from planner.export.jax_ops import ExportError
from planner.export.jax_optimizers import states_of, update_source
from planner.export.jax_sources import (
    ACCUMULATED,
    FUNCTIONS,
    GROUPED,
    HELPERS,
    MOVED,
    ONE_STEP,
    STACKING,
    TAIL,
    filled,
)
from planner.export.jax_stage import (
    CROSSING,
    JOINED,
    ZEROS,
    Sides,
    split_rows,
    stage_outputs,
    step_source,
)
from planner.export.placement import Placement, Update, placement
from planner.export.unreduced import Groups, grouped
from planner.graph.core import Graph, Tensor
from planner.graph.parting import NotAlone
from planner.graph.saving import saved_values
from planner.model import SEVERAL_CHUNKS, Model, Pipeline, Training, remat_text
from planner.pipelining.stacked import stacked
from planner.result import Result
from planner.sharding.spec import Spec, replicated


@dataclass(frozen=True)
class Source:
    """Text of a program, and what its reader should know of how it differs from the plan."""

    text: str
    note: str = ""


def result_program(result: Result) -> str:
    """Source of the program that follows a plan."""
    return planned_source(result).text


def planned_source(
    result: Result, sides: Sides | None = None, mesh: LogicalMesh | None = None
) -> Source:
    """The program that follows a plan, a stage's with `sides`; `mesh`: its devices, if they are not
    the plan's."""
    model, pipeline, axes = result.model, result.model.pipeline, dict(result.mesh.axes)
    if pipeline is not None and not pipeline.inside:
        model = stacked(model, pipeline.axis, axes[pipeline.axis], pipeline.interleave)
    _refuse_others(model)  # there is no placement of what has no program
    place, groups, note = placement(result), None, ""
    crossing = () if sides is None else (*sides.boundary.received, *sides.boundary.sent)
    try:
        groups = grouped(result, place, crossing, sides is None or sides.boundary.loss)
    except NotAlone as reason:
        note = f"gradients that the plan reduces once a step are reduced in every part: {reason}"
    place = place if groups is None else groups.place
    text = jax_program(model, mesh or result.mesh, place, sides, groups, note)
    return Source(text, note)


def jax_program(
    model: Model, mesh: LogicalMesh, place: Placement, sides: Sides | None = None,
    groups: Groups | None = None, note: str = "",
) -> str:  # fmt: skip
    """Source of the program. Tensors that `place` leaves out are replicated (arguments) or left
    to the compiler (activations). `sides`: what makes the model a stage of a pipeline; `groups`: of
    devices that add up gradients by themselves; `note`: what its reader should know."""
    _refuse_others(model)
    graph, training = model.graph, model.training
    tables = _Tables(graph, training, place, sides)
    own = graph if groups is None else groups.graph
    sums = {name: partition(spec) for name, spec in place.sums.items()}
    annotated = {*tables.activations, *tables.parameters}
    kept = saved_values(model) if sides is None else sides.saved
    writer = LossWriter(
        own, annotated, kept, place.uses, sums, place.gradients, place.together, place.first,
        place.apart, place.sliced, place.rounds, frozenset() if groups is None else groups.whole,
    )  # fmt: skip
    made = stage_outputs(graph, sides.boundary) if sides else ([*graph.outputs[:1]], [])
    body, used = writer.lines([*made[0], *made[1]]), writer.helpers
    body.append(f"return {_returned(writer, made) if sides else writer.variables[made[0][0]]}")
    values = _values(training, place, sides, groups)
    parts = [
        _header(model, mesh, note),
        _mesh_source(mesh),
        tables.source(),
        _stacks_source(tables, model.members),
        _saved_source(writer),
        *_held_source(place.held),
        *_groups_source(groups, tables),
        filled(HELPERS, values),
        *(filled(text, values) for names, text in FUNCTIONS.items() if used & {*names}),
        ["def loss_fn(params, batch, mesh=None):",
         f'    """{_does(training, sides, groups)}"""',
         "    shard, copy = partial(annotate, mesh=mesh), partial(annotate_value, mesh=mesh)",
         *(("    product = partial(placed_product, mesh=mesh)",) if "product" in used else ()),
         *(f"    {line}" if line else "" for line in body)],
        update_source(graph, training),
        *_moved_source(place.updates),
        *(() if groups is None else (filled(GROUPED, values),)),
        *(() if groups is None or sides is None else (filled(CROSSING, values),)),
        _step_source(graph, training, sides, values),
        filled(TAIL, values),
    ]  # fmt: skip
    return "\n\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _refuse_others(model: Model) -> None:
    if model.inference is not None:
        raise ExportError(
            f"{model.name} is planned for {model.inference.phase}: JAX programs are written for "
            "training steps only; the annotations, those of the cache included, hold for inference"
        )
    if model.pipeline is not None:
        raise ExportError(
            f"{model.name} is pipelined with schedule {model.pipeline.schedule}: its stages run "
            "programs of their own, which one JAX program cannot hold; the nearest plan that is "
            f"one program is made with {nearest_in_one_program(model.pipeline)}"
        )


def nearest_in_one_program(pipeline: Pipeline) -> str:
    """The options that make one program of a pipeline whose stages have their own."""
    several = pipeline.schedule in SEVERAL_CHUNKS
    wanted = {"schedule": "circular" if several else "gpipe"}
    if several:
        wanted["interleave"] = str(pipeline.interleave)
    wanted["inside"] = "false"
    return " ".join(f"--set pipeline.{key}={value}" for key, value in wanted.items())


def _does(training: Training, sides: Sides | None, groups: Groups | None) -> str:
    if sides is None and groups is not None:
        return "What one group of devices adds to the loss of a microbatch."
    if sides is None:
        return f"Loss of one {'microbatch' if training.accumulation_steps > 1 else 'batch'}."
    return "What one microbatch leaves the stage with: with a gradient, and without."


def _values(
    training: Training, place: Placement, sides: Sides | None, groups: Groups | None
) -> Mapping[str, str]:
    """What the functions of `jax_sources` leave open."""
    found = {
        "steps": str(training.accumulation_steps), "gradients": JNP_DTYPES[training.gradients],
        "spec": "ACTIVATIONS[where] if where in ACTIVATIONS else PARAMETERS[where][2]",
        "read": "params", "held": "", "update": "update(name, p, grads[name], states[name])",
        "results": "NamedSharding(mesh, P())", "softmax_note": "", "softmax_barrier": "",
        "sums": "PARAMETERS[n][2]" if sides is None else "n",
        "summed": f"microbatches({'batch' if sides is None else 'given'})",
        "sent": "RESULTS[n]", "joined": "",
        "common": "", "common_note": "", "and_common": "", "transposed": "_transposed_product",
        "unplaced": _UNPLACED,
    }  # fmt: skip
    if groups is not None:
        given = "batch" if sides is None else "given"
        found |= {"sums": "SUMS[n][0]", "summed": f"by_groups(microbatches, {given}, mesh)",
                  "sent": "_sent(n)", "joined": JOINED}  # fmt: skip
        if groups.reduced:
            found |= {"common": "common=None, ", "common_note": _COMMON_NOTE,
                      "and_common": ", common", "unplaced": "", "transposed": _TRANSPOSED}
    if place.held:  # microbatches read parameters where these are held
        held = "HELD[where][-1] if where in HELD else None"
        found["spec"] = f"{held}\n    spec = spec or ({found['spec']})"
        found["read"], found["held"] = "read", _READ
    if place.updates:
        found["update"] = "moved_update(name, p, grads, states, mesh)"
    if sides is not None:
        found["results"] = "_map_rows(lambda row: NamedSharding(mesh, row[2]), RESULTS)"
    if place.barrier:  # XLA's TPU compiler copies what is behind a barrier, and needs none
        found["softmax_note"], found["softmax_barrier"] = _SOFTMAX_NOTE, _SOFTMAX_BARRIER
    return found


_READ = """    read = {n: annotate(p, HELD[n], mesh) if n in HELD else p for n, p in params.items()}
"""
_UNPLACED = """
    if mesh is None:
        return jnp.einsum(spec, a, b)"""
_COMMON_NOTE = """Of operand `common`, which all groups read, it is made of all groups at once.
    """
_TRANSPOSED = "_over_groups if k == common else _transposed_product"
_SOFTMAX_NOTE = """ The barrier keeps XLA's
    GPU compiler from making the result again, of logits that it would have to keep, and from
    widening what it reads."""
_SOFTMAX_BARRIER = "\n    found, g = lax.optimization_barrier((found, g))"


def _returned(writer: LossWriter, made: tuple[Sequence[str], Sequence[str]]) -> str:
    rows = ({name: writer.variables[name] for name in names} for names in made)
    return ", ".join(
        f"{{{', '.join(f'{name!r}: {code}' for name, code in row.items())}}}" for row in rows
    )


def _header(model: Model, mesh: LogicalMesh, note: str) -> list[str]:
    steps = model.training.accumulation_steps
    micro = f", {steps} accumulation steps" if steps > 1 else ""
    return [
        f'"""Training step of {model.name} on {mesh.topology.name}: {mesh.describe()}.',
        "",
        f"Batch {model.training.batch}{micro}, {model.training.optimizer}, "
        f"rematerialisation: {remat_text(model.training.remat)}.",
        *textwrap.wrap(f"Not as planned: {note}." if note else "", 100),
        "Written by shardplan as a starting point; it needs only jax and is yours to change.",
        '"""',
        "",
        "from functools import partial",
        "",
        "import jax",
        "import jax.numpy as jnp",
        "import numpy as np",
        "from jax import lax",
        "from jax.ad_checkpoint import checkpoint_name as saved",
        "from jax.sharding import Mesh, NamedSharding",
        "from jax.sharding import PartitionSpec as P",
    ]


def _mesh_source(mesh: LogicalMesh) -> list[str]:
    parts = [p for p in mesh.parts if p.size > 1]
    sizes = tuple(p.size for p in parts)
    order = tuple(i for name in mesh.names for i, p in enumerate(parts) if p.axis == name)
    axes = ", ".join(f'"{name}": {size}' for name, size in mesh.axes)
    return [
        f"MESH = {{{axes}}}",
        "# The physical devices, in order of their coordinates, cut into these parts; the mesh",
        "# axes are made of them in this order (the layout that was priced).",
        f"PARTS, ORDER = {sizes}, {order}",
    ]


class _Tables:
    """Shapes, dtypes and specs of the arguments, and specs of annotated activations."""

    def __init__(
        self, graph: Graph, training: Training, place: Placement, sides: Sides | None
    ) -> None:
        self.graph, self.training, self.specs = graph, training, place.tensors
        self.sides = sides
        self.parameters = {p.name: p for p in graph.parameters()}
        self.states = states_of(graph, training)
        self.activations = self._annotated()

    def _annotated(self) -> dict[str, Spec]:
        """Activations with a spec; unreduced ones have no sharding that JAX can name."""
        found = {}
        for name, tensor in self.graph.all_tensors().items():
            spec = self.specs.get(name)
            own = name not in self.graph.inputs and tensor.role != "parameter"
            if spec is not None and own and not spec.partial and tensor.shape:
                found[name] = spec
        return found

    def source(self) -> list[str]:
        crossing, results = {}, []
        if self.sides is not None:
            crossing = {n: _row(*row) for n, row in self.sides.inputs.items()}
            crossing[ZEROS] = f"(({self.training.accumulation_steps},), jnp.int32, P(None))"
            rows = {n: _row(*row) for n, row in self.sides.results.items()}
            results = ["", "# What it makes for other stages.", *_table("RESULTS", rows)]
        return [
            "# Parameters (stacked over layers): shape, dtype, sharding.",
            *_table("PARAMETERS", {p: self._argument(t) for p, t in self.parameters.items()}),
            "",
            "# Optimizer states of every parameter.",
            *_table("STATES", {p: self._states(p) for p in self.parameters}),
            "",
            "# Inputs of one step.",
            *_table("INPUTS", {n: self._argument(t) for n, t in self.inputs().items()} | crossing),
            *results,
            "",
            "# Shardings of activations, by name; remove a line to leave one to the compiler.",
            *_table("ACTIVATIONS", {n: partition(s) for n, s in self.activations.items()}),
        ]

    def inputs(self) -> dict[str, Tensor]:
        steps, crossing = self.training.accumulation_steps, self.sides.inputs if self.sides else {}
        stacked = steps > 1 or self.sides is not None
        found = {}
        for name in self.graph.inputs:
            t = self.graph.tensors[name]
            if t.role != "parameter" and name not in crossing:
                shape = (steps, *t.shape) if stacked else t.shape
                found[name] = Tensor(name, shape, t.dtype, t.dims, t.role)
        return found

    def _argument(self, t: Tensor) -> str:
        return _row(t, self._spec(t))

    def _spec(self, t: Tensor) -> Spec:
        spec = self.specs.get(t.name) or self.specs.get(f"{t.name}.all")
        if spec is None:
            return replicated(len(t.shape))
        return spec if len(spec.dims) == len(t.shape) else spec.stacked()

    def _states(self, parameter: str) -> str:
        rows = (f'"{k}": {self._state(parameter, t)}' for k, t in self.states[parameter].items())
        return f"{{{', '.join(rows)}}}"

    def _state(self, parameter: str, t: Tensor) -> str:
        """A state without a spec of its own lies like its parameter."""
        spec = self.specs.get(t.name)
        if spec is None:
            p = self.parameters[parameter]
            by_dim = dict(zip(p.dims, self._spec(p).dims, strict=True))
            spec = Spec(tuple(by_dim[d] for d in t.dims))
        return _row(t, spec)


def _row(t: Tensor, spec: Spec) -> str:
    return f"({t.shape}, {JNP_DTYPES[t.dtype]}, {partition(spec)})"


def _table(name: str, rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return [f"{name} = {{}}"]
    lines = [f"{name} = {{"]
    for key, value in rows.items():
        lines += [f"    {line}" for line in wrapped(f'"{key}": {value},')]
    return [*lines, "}"]


def _stacks_source(tables: _Tables, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Where layers are written out: between the model file's parameters and the program's."""
    stacks = {name: members[name] for name in tables.parameters if name in members}
    if not stacks:
        return []
    rows = {name: str(tuple(names)).replace("'", '"') for name, names in stacks.items()}
    return [
        "# Like layers run as one loop over stacks that are called like the first layer's tensors.",
        *_table("STACKS", rows),
        "", "", *filled(STACKING, {}),
    ]


def _saved_source(writer: LossWriter) -> list[str]:
    kept = [("What the backward pass keeps of every layer; all else is computed again.", "SAVED",
             writer.labels if writer.labels else [])]  # fmt: skip
    if writer.entries:
        kept.append(("What it keeps of every tick; parameters are chosen again.", "ROUNDS",
                     [*writer.labels, *writer.entries]))  # fmt: skip
    lines = []
    for comment, name, labels in kept:
        if labels:
            quoted = ", ".join(f'"{label}"' for label in labels)
            lines += [
                f"# {comment}",
                *wrapped(f"{name} = jax.checkpoint_policies.save_only_these_names({quoted})"),
            ]
    return lines


def _moved_source(updates: Mapping[str, Update]) -> Iterator[list[str]]:
    """Where parameters are updated that lie elsewhere, and the function that brings them there."""
    if not updates:
        return
    rows = []
    for name, moved in sorted(updates.items()):
        ways = (moved.parameter, moved.gradient, moved.new)
        rows += [f'    "{name}": (', *(f"        {_way(specs)}," for specs in ways), "    ),"]
    yield [
        "# Parameters that are updated elsewhere -> places that they, their gradients and the new",
        "# parameters pass, one collective after the other.",
        "UPDATES = {", *(line for row in rows for line in wrapped(row)), "}",
    ]  # fmt: skip
    yield filled(MOVED, {})


def _held_source(held: Mapping[str, Sequence[Spec]]) -> Iterator[list[str]]:
    """Where all microbatches read parameters that lie elsewhere."""
    if held:
        rows = {name: _way(specs) for name, specs in sorted(held.items())}
        yield [
            "# Parameters that all microbatches read elsewhere -> places that they pass before.",
            *_table("HELD", rows),
        ]


def _groups_source(groups: Groups | None, tables: _Tables) -> Iterator[list[str]]:
    """Groups of devices that add up gradients by themselves."""
    if groups is None:
        return
    split = {n: d + 1 if n in tables.inputs() else d for n, d in groups.split.items()}
    split = split if tables.sides is None else split_rows(tables.sides, split)
    axes = ", ".join(f'"{axis}"' for axis in groups.axes)
    reduced = str(tuple(sorted(groups.reduced))).replace("'", '"')
    sums = {n: f"({partition(one)}, {partition(all_)})" for n, (one, all_) in groups.sums.items()}
    yield [
        "# Groups of devices along these axes add up gradients by themselves, until the last",
        "# microbatch.",
        f"UNREDUCED, GROUPS = ({axes},), {groups.count}",
        "# What has a part for every group -> its dimension.",
        *_table("SPLIT", {n: str(d) for n, d in split.items()}),
        "# Where a group adds up a gradient, and where the sum of all is wanted.",
        *_table("SUMS", sums),
        "# Parameters whose gradients are summed in every microbatch.",
        *wrapped(f"REDUCED = {reduced}"),
    ]


def _way(specs: Sequence[Spec]) -> str:
    places = [partition(spec) for spec in specs]
    return f"({', '.join(places)}{',' if len(places) == 1 else ''})"


def _step_source(
    graph: Graph, training: Training, sides: Sides | None, values: Mapping[str, str]
) -> Sequence[str]:
    if sides is not None:
        return step_source(sides, graph.outputs[0], values)
    return filled(ONE_STEP if training.accumulation_steps == 1 else ACCUMULATED, values)
