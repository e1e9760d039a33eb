"""A self-contained JAX training program: mesh, annotations, loss, optimizer, jitted train step.

The file needs only jax and is meant to be read and kept. It is written from the *unfused* forward
graph (`model.graph`), the training settings and the specs of named tensors; how a loss is written
is in `jax_loss.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from meshes import LogicalMesh
from planner.export.jax_expr import JNP_DTYPES, partition
from planner.export.jax_loss import LossWriter, wrapped
from planner.export.jax_ops import ExportError
from planner.export.jax_optimizers import states_of, update_source
from planner.export.jax_stage import ZEROS, Sides, stage_outputs, step_source
from planner.export.placement import Placement, Update, placement
from planner.graph.core import Graph, Tensor
from planner.graph.saving import saved_values
from planner.model import SEVERAL_CHUNKS, Model, Pipeline, Training, remat_text
from planner.pipelining.stacked import stacked
from planner.result import Result
from planner.sharding.spec import Spec, replicated


def result_program(result: Result) -> str:
    """Source of the program that follows a plan."""
    model, pipeline, axes = result.model, result.model.pipeline, dict(result.mesh.axes)
    if pipeline is not None and not pipeline.inside:
        model = stacked(model, pipeline.axis, axes[pipeline.axis], pipeline.interleave)
    _refuse_others(model)  # there is no placement of what has no program
    return jax_program(model, result.mesh, placement(result))


def jax_program(
    model: Model, mesh: LogicalMesh, place: Placement, sides: Sides | None = None
) -> str:
    """Source of the program. Tensors that `place` leaves out are replicated (arguments) or left
    to the compiler (activations). `sides`: what makes the model a stage of a pipeline."""
    _refuse_others(model)
    graph, training = model.graph, model.training
    tables = _Tables(graph, training, place, sides)
    sums = {name: partition(spec) for name, spec in place.sums.items()}
    annotated = {*tables.activations, *tables.parameters}
    kept = saved_values(model) if sides is None else sides.saved
    writer = LossWriter(
        graph, annotated, kept, place.uses, sums, place.gradients, place.together, place.first,
        place.apart, place.sliced, place.rounds,
    )  # fmt: skip
    made = stage_outputs(graph, sides.boundary) if sides else ([*graph.outputs[:1]], [])
    body, used = writer.lines([*made[0], *made[1]]), writer.helpers
    body.append(f"return {_returned(writer, made) if sides else writer.variables[made[0][0]]}")
    parts = [
        _header(model, mesh),
        _mesh_source(mesh),
        tables.source(),
        _stacks_source(tables, model.members),
        _saved_source(writer),
        *_held_source(place.held),
        (_HELPERS.replace(*_HOLDING) if place.held else _HELPERS).strip("\n").split("\n"),
        *(
            _function(text, place.barrier) for names, text in _FUNCTIONS.items() if used & {*names}
        ),
        ["def loss_fn(params, batch, mesh=None):",
         f'    """{_does(training, sides)}"""',
         "    shard, copy = partial(annotate, mesh=mesh), partial(annotate_value, mesh=mesh)",
         *(("    product = partial(placed_product, mesh=mesh)",) if "product" in used else ()),
         *(f"    {line}" if line else "" for line in body)],
        update_source(graph, training),
        *_moved_source(place.updates),
        _step_source(graph, training, sides, place),
        (_TAIL.replace(*_STAGE_RESULTS) if sides else _TAIL).strip("\n").split("\n"),
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


def _does(training: Training, sides: Sides | None) -> str:
    if sides is None:
        return f"Loss of one {'microbatch' if training.accumulation_steps > 1 else 'batch'}."
    return "What one microbatch leaves the stage with: with a gradient, and without."


def _function(text: str, barrier: bool) -> list[str]:
    for mark, code in _BARRIER.items():
        text = text.replace(mark, code if barrier else "")
    return text.strip("\n").split("\n")


def _returned(writer: LossWriter, made: tuple[Sequence[str], Sequence[str]]) -> str:
    rows = ({name: writer.variables[name] for name in names} for names in made)
    return ", ".join(
        f"{{{', '.join(f'{name!r}: {code}' for name, code in row.items())}}}" for row in rows
    )


def _header(model: Model, mesh: LogicalMesh) -> list[str]:
    steps = model.training.accumulation_steps
    micro = f", {steps} accumulation steps" if steps > 1 else ""
    return [
        f'"""Training step of {model.name} on {mesh.topology.name}: {mesh.describe()}.',
        "",
        f"Batch {model.training.batch}{micro}, {model.training.optimizer}, "
        f"rematerialisation: {remat_text(model.training.remat)}.",
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
            *_table("INPUTS", {n: self._argument(t) for n, t in self._inputs().items()} | crossing),
            *results,
            "",
            "# Shardings of activations, by name; remove a line to leave one to the compiler.",
            *_table("ACTIVATIONS", {n: partition(s) for n, s in self.activations.items()}),
        ]

    def _inputs(self) -> dict[str, Tensor]:
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
        *_STACKING.rstrip("\n").split("\n"),
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
    yield _MOVED.strip("\n").split("\n")


def _held_source(held: Mapping[str, Sequence[Spec]]) -> Iterator[list[str]]:
    """Where all microbatches read parameters that lie elsewhere."""
    if held:
        rows = {name: _way(specs) for name, specs in sorted(held.items())}
        yield [
            "# Parameters that all microbatches read elsewhere -> places that they pass before.",
            *_table("HELD", rows),
        ]


def _way(specs: Sequence[Spec]) -> str:
    places = [partition(spec) for spec in specs]
    return f"({', '.join(places)}{',' if len(places) == 1 else ''})"


def _step_source(
    graph: Graph, training: Training, sides: Sides | None, place: Placement
) -> Sequence[str]:
    steps = training.accumulation_steps
    if sides is not None:
        lines = step_source(sides, steps, JNP_DTYPES[training.gradients], graph.outputs[0])
    else:
        text = _ONE_STEP if steps == 1 else _ACCUMULATED.replace("STEPS", str(steps))
        lines = text.strip("\n").split("\n")
    lines = [x for line in lines for x in _holding(line)] if place.held else lines
    return [line.replace(*_MOVING) for line in lines] if place.updates else lines


def _holding(line: str) -> list[str]:
    """Microbatches read parameters where these are held."""
    for given in ("(loss_fn)(params, ", "{**own, **given, **r}, mesh), params, "):
        line = line.replace(given, given.replace("params", "read"))
    return [*_HELD, "", line] if line.startswith("    def microbatch(") else [line]


_STACKING = '''

def stack(params):
    """Parameters by the names of the model file -> as train_step takes them."""
    return {
        name: jnp.stack([params[n] for n in STACKS[name]]) if name in STACKS else params[name]
        for name in PARAMETERS
    }


def unstack(params):
    """The way back."""
    found = {name: p for name, p in params.items() if name not in STACKS}
    return found | {n: p for name, names in STACKS.items() for n, p in zip(names, params[name])}
'''

_HELPERS = '''
def make_mesh(devices=None):
    """The mesh over `devices` (default: all), with the axes laid on the links as planned."""
    devices = sorted(jax.devices() if devices is None else devices, key=_position)
    if len(devices) != np.prod(list(MESH.values())):
        raise ValueError(f"the plan is for a mesh {MESH}, there are {len(devices)} devices")
    grid = np.array(devices).reshape(PARTS).transpose(ORDER)
    return Mesh(grid.reshape(tuple(MESH.values())), tuple(MESH))


def _position(device):
    """Physical place of a device: torus coordinates and core, or host and number."""
    core = getattr(device, "core_on_chip", None)
    if core is None:
        return (device.process_index, device.id)
    return (*device.coords, core)


def annotate(x, where, mesh=None):
    """x, and its gradient, sharded like tensor `where` (a name) or as `where` says (a P)."""
    return x if mesh is None else lax.with_sharding_constraint(x, _sharding(x, where, mesh))


def annotate_value(x, where, gradient=None, mesh=None):
    """x sharded as in `annotate`; its gradient as `gradient` says, None is left to the compiler."""
    if mesh is None:
        return x
    gradient = None if gradient is None else NamedSharding(mesh, gradient)
    return _copy(x, _sharding(x, where, mesh), gradient)


def _sharding(x, where, mesh):
    """One layer's slice lies like the whole stack."""
    if isinstance(where, P):
        return NamedSharding(mesh, where)
    spec = ACTIVATIONS[where] if where in ACTIVATIONS else PARAMETERS[where][2]
    return NamedSharding(mesh, P(*spec[len(spec) - x.ndim :]))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy(x, sharding, gradient):
    return lax.with_sharding_constraint(x, sharding)


def _copy_gradient(sharding, gradient, _, g):
    return (g if gradient is None else lax.with_sharding_constraint(g, gradient),)


_copy.defvjp(lambda x, *where: (_copy(x, *where), None), _copy_gradient)
'''

_SOFTMAX = '''
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def softmax(x, axis, dtype, label=None):
    """jax.nn.softmax(x, axis) as `dtype`, which layers save as `label`.

    The gradient is made of the result alone: JAX's own keeps logits in f32.#NOTE
    """
    return _softmax_forward(x, axis, dtype, label)[0]


def _softmax_forward(x, axis, dtype, label):
    found = jax.nn.softmax(x, axis).astype(dtype)
    found = found if label is None else saved(found, label)
    return found, found


def _softmax_gradient(axis, dtype, label, found, g):#BARRIER
    found, g = found.astype(jnp.float32), g.astype(jnp.float32)
    return (found * (g - jnp.sum(found * g, axis, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_gradient)
'''

# XLA's TPU compiler copies what is behind a barrier, and needs none.
_BARRIER = {
    "#NOTE": """ The barrier keeps XLA's
    GPU compiler from making the result again, of logits that it would have to keep, and from
    widening what it reads.""",
    "#BARRIER": "\n    found, g = lax.optimization_barrier((found, g))",
}

_PRODUCT = '''
def placed_product(
    spec, a, b, gradients=(None, None), reads=(None, None), together=False, first=None, mesh=None
):
    """jnp.einsum(spec, a, b), with gradients that are made as `gradients` says.

    For either operand None, or: where the result's gradient and the other operand are read (it may
    pass several places), and where the product of the two lies, one place after the other. What is
    None is the compiler's.
    `reads`: where the product itself reads its operands. With `together` nothing of the backward
    pass comes between the two gradients; that of operand `first` is made before the other.
    """
    if mesh is None:
        return jnp.einsum(spec, a, b)
    return _placed_product(spec, gradients, reads, (together, first), mesh, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _placed_product(spec, gradients, reads, order, mesh, a, b):
    return jnp.einsum(spec, _placed(a, reads[0], mesh), _placed(b, reads[1], mesh))


def _placed(x, where, mesh):
    places = where if type(where) is tuple else (where,)
    for place in places:
        x = x if place is None else annotate(x, place, mesh)
    return x


def _product_gradients(spec, gradients, reads, order, mesh, operands, g):
    (together, first), found = order, [None, None]
    for k in (1, 0) if first == 1 else (0, 1):
        cotangent, other, *places = gradients[k] or (None, None)
        other = _placed(operands[1 - k], other or reads[1 - k], mesh)
        both = (lambda x: (x, other)) if k == 0 else (lambda x: (other, x))
        product = lambda x: jnp.einsum(spec, *both(x))
        (made,) = jax.linear_transpose(product, operands[k])(_placed(g, cotangent, mesh))
        for place in places:
            made = annotate(made, place, mesh)
        if k == first:
            made, g = lax.optimization_barrier((made, g))
        found[k] = made
    return lax.optimization_barrier(tuple(found)) if together else tuple(found)


_placed_product.defvjp(
    lambda *where: (_placed_product(*where), where[-2:]), _product_gradients
)
'''

_SLICEWISE = '''
@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def slicewise(x, w, strides, padding, dilation):
    """Convolution of x [batch, spatial..., channels] and w [taps..., channels, features], with the
    slices along the first spatial dimension as a batch.

    Written where a device has one sample: XLA's TPU compiler would cut it into eight blocks, and
    copy what they share before and after every convolution.
    """
    return _slicewise(x, w, strides, padding, dilation)


def _slicewise(x, w, strides, padding, dilation):
    taps, (low, high), step = w.shape[0], padding[0], dilation[0]
    count = (x.shape[1] + low + high - (taps - 1) * step - 1) // strides[0] + 1
    moved = _slices(x, [k * step - low for k in range(taps)], count, strides[0])
    joined = jnp.moveaxis(w, 0, -3).reshape(*w.shape[1:-2], -1, w.shape[-1])
    made = _over_slices(moved, joined, strides, padding, dilation)
    return made.reshape(x.shape[0], count, *made.shape[1:])


def _slices(x, starts, count, stride=1):
    """`count` slices of axis 1 from each of `starts`, zeros outside, beside each other as channels;
    all one batch."""
    reach = (count - 1) * stride + 1
    low = max(0, -min(starts))
    high = max(0, max(starts) + reach - x.shape[1])
    x = jnp.pad(x, [(0, 0), (low, high)] + [(0, 0)] * (x.ndim - 2))
    parts = [lax.slice_in_dim(x, low + s, low + s + reach, stride, axis=1) for s in starts]
    return jnp.concatenate(parts, -1).reshape(-1, *x.shape[2:-1], len(starts) * x.shape[-1])


def _over_slices(x, w, strides, padding, dilation, spread=None):
    space = "HWZUV"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x, w, strides[1:], padding[1:], spread, dilation[1:],
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )


def _slicewise_gradients(strides, padding, dilation, operands, g):
    """Both from the moved slices of the result's gradient, so that only x itself is saved."""
    (x, w), (low, _), step = operands, padding[0], dilation[0]
    if strides[0] > 1:  # moved like that, the gradient would be mostly zeros
        again = lambda x, w: _slicewise(x, w, strides, padding, dilation)
        return jax.vjp(again, x, w)[1](g)
    moved = _slices(g, [low - k * step for k in range(w.shape[0])], x.shape[1])
    joined = jnp.moveaxis(w, 0, -2).reshape(*w.shape[1:-1], -1)
    forward = lambda x, w: _over_slices(x, w, strides, padding, dilation)
    dx, dw = jax.vjp(forward, x.reshape(-1, *x.shape[2:]), joined)[1](moved)
    dw = dw.reshape(*w.shape[1:-1], w.shape[0], w.shape[-1])
    return dx.reshape(x.shape), jnp.moveaxis(dw, -2, 0)


slicewise.defvjp(lambda x, w, *window: (slicewise(x, w, *window), (x, w)), _slicewise_gradients)


def spread_slicewise(x, w, strides, padding, dilation):
    """Transposed convolution whose first stride is its number of taps, slice by slice."""
    space, taps = range(1, w.ndim - 2), w.shape[0]
    joined = jnp.moveaxis(jnp.flip(w, space), 0, -2).reshape(*w.shape[1:-1], -1)
    ones = (1,) * len(strides)
    made = _over_slices(
        x.reshape(-1, *x.shape[2:]), joined, ones, padding, dilation, strides[1:]
    )
    made = made.reshape(*x.shape[:2], *made.shape[1:-1], taps, w.shape[-1])
    made = jnp.moveaxis(made, -2, 2)
    return made.reshape(x.shape[0], -1, *made.shape[3:])


def max_pool_slicewise(x, window, strides, padding):
    """Maxima over windows that do not overlap in the first spatial dimension, slice by slice."""
    found = lax.reduce_window(
        x.reshape(-1, *x.shape[2:]), -jnp.inf, lax.max, (1, *window[1:], 1), (1, *strides[1:], 1),
        [(0, 0), *padding[1:], (0, 0)],
    )
    found = found.reshape(x.shape[0], -1, window[0], *found.shape[1:])
    best = found[:, :, 0]
    for k in range(1, window[0]):
        best = jnp.where(found[:, :, k] > best, found[:, :, k], best)
    return best
'''

_SLOTS = '''
@jax.custom_vjp
def put(buffer, row, slot):
    """`buffer` [slots, ...] with `row` in `slot`."""
    return lax.dynamic_update_index_in_dim(buffer, row, slot, 0)


@jax.custom_vjp
def pop(buffer, slot):
    """What `slot` of `buffer` holds, and the buffer with zeros there.

    Either function is the other's derivative, so neither makes a gradient of the buffer's size.
    """
    row = lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)
    return row, put(buffer, jnp.zeros_like(row), slot)


put.defvjp(
    lambda b, row, slot: (put(b, row, slot), slot), lambda slot, g: (*pop(g, slot)[::-1], None)
)
pop.defvjp(lambda b, slot: (pop(b, slot), slot), lambda slot, g: (put(*g[::-1], slot), None))
'''

_ROTATED = '''
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rotated(x, by, axis):
    """jnp.roll, whose gradient is rotated back: a sum of padded parts would move twice as much."""
    return jnp.roll(x, by, axis)


rotated.defvjp(
    lambda x, by, axis: (rotated(x, by, axis), None),
    lambda by, axis, _, g: (rotated(g, -by, axis),),
)
'''

_ROUNDS = '''
def chosen_round(stacks, tick, turns):
    """Every stage's layers in a tick: [rounds, layers, stages, ...] -> [layers, stages, ...].

    A stage begins a round one tick after the stage before it and stays `turns` ticks, so no more
    than two rounds are at work: slices and a choice, whose gradients are added in place.
    """
    stages, last = stacks.shape[2], stacks.shape[0] - 1
    newest, oldest = (jnp.clip(t // turns, 0, last) for t in (tick, tick - stages + 1))
    new, old = (lax.dynamic_index_in_dim(stacks, r, 0, keepdims=False) for r in (newest, oldest))
    begun = jnp.arange(stages) <= tick - newest * turns
    return _either(begun.reshape(1, -1, *(1,) * (new.ndim - 2)), new, old)


@jax.custom_vjp
def _either(first, a, b):
    """jnp.where, which saves `first` as it is; JAX would as wide as the parameters."""
    return jnp.where(first, a, b)


_either.defvjp(
    lambda first, a, b: (_either(first, a, b), first),
    lambda first, g: (None, jnp.where(first, g, 0), jnp.where(first, 0, g)),
)


@jax.custom_vjp
def lent(value, owner):
    """`value`, whose gradient is `owner`'s. That is not looked at and so not saved, and what adds
    up its gradients is outside of what is computed again, where it changes in place."""
    return value


lent.defvjp(lambda value, owner: (value, None), lambda _, g: (None, g))
'''

_FUNCTIONS = {  # written if one of them is called
    ("softmax",): _SOFTMAX, ("product",): _PRODUCT,
    ("slicewise", "spread_slicewise", "max_pool_slicewise"): _SLICEWISE, ("put", "pop"): _SLOTS,
    ("chosen_round",): _ROUNDS, ("rotated",): _ROTATED,
}  # fmt: skip

_HOLDING = (
    "    spec = ACTIVATIONS[where] if where in ACTIVATIONS else PARAMETERS[where][2]",
    "    held = HELD[where][-1] if where in HELD else None\n"
    "    spec = held or (ACTIVATIONS[where] if where in ACTIVATIONS else PARAMETERS[where][2])",
)
_HELD = (
    "    read = dict(params)",
    "    for name, places in HELD.items():",
    "        for place in places:",
    "            read[name] = annotate(read[name], place, mesh)",
)

_MOVING = (
    "update(name, p, grads[name], states[name])",
    "moved_update(name, p, grads[name], states[name], mesh)",
)

_MOVED = '''
def moved_update(name, p, g, state, mesh=None):
    """update(name, p, g, state), where the plan makes it."""
    if mesh is None or name not in UPDATES:
        return update(name, p, g, state)
    there, given, back = UPDATES[name]
    for place in there:
        p = annotate(p, place, mesh)
    for place in given:
        g = annotate(g, place, mesh)
    new, state = update(name, p, g, state)
    for place in back:
        new = annotate(new, place, mesh)
    return new, state
'''

_ONE_STEP = '''
def train_step(params, states, batch, mesh=None):
    """One optimizer step: (params, states, batch) -> (loss, new params, new states)."""
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, mesh)
    new = {name: update(name, p, grads[name], states[name]) for name, p in params.items()}
    return loss, {n: p for n, (p, _) in new.items()}, {n: s for n, (_, s) in new.items()}
'''

_ACCUMULATED = '''
def train_step(params, states, batch, mesh=None):
    """One optimizer step over STEPS microbatches: -> (loss, new params, new states)."""

    def microbatch(total, part):
        result = jax.value_and_grad(loss_fn)(params, part, mesh)
        return jax.tree.map(lambda t, r: t + r.astype(t.dtype) / STEPS, total, result), None

    zeros = {
        n: annotate(jnp.zeros(p.shape, jnp.float32), PARAMETERS[n][2], mesh)
        for n, p in params.items()
    }
    (loss, grads), _ = lax.scan(microbatch, (jnp.zeros((), jnp.float32), zeros), batch)
    new = {name: update(name, p, grads[name], states[name]) for name, p in params.items()}
    return loss, {n: p for n, (p, _) in new.items()}, {n: s for n, (_, s) in new.items()}
'''

_STAGE_RESULTS = (  # in place of the loss
    "(NamedSharding(mesh, P()), params",
    "(_map_rows(lambda row: NamedSharding(mesh, row[2]), RESULTS), params",
)

_TAIL = '''
def _is_row(value):
    return isinstance(value, tuple) and not isinstance(value, P)


def _map_rows(function, table):
    return jax.tree.map(function, table, is_leaf=_is_row)


def shardings(mesh):
    """Shardings of (params, states, batch)."""
    tables = (PARAMETERS, STATES, INPUTS)
    return tuple(_map_rows(lambda row: NamedSharding(mesh, row[2]), t) for t in tables)


def compiled_step(mesh):
    """The jitted train step; parameters and states are donated."""
    params, states, batch = shardings(mesh)
    return jax.jit(
        partial(train_step, mesh=mesh),
        in_shardings=(params, states, batch),
        out_shardings=(NamedSharding(mesh, P()), params, states),
        donate_argnums=(0, 1),
    )


def shapes():
    """Shapes and dtypes of (params, states, batch), for compiling ahead of time."""
    tables = (PARAMETERS, STATES, INPUTS)
    return tuple(_map_rows(lambda row: jax.ShapeDtypeStruct(*row[:2]), t) for t in tables)


def initialise(key, mesh):
    """Sharded parameters (normal, scaled by the root of the fan-in) and zero states."""

    def parameters(key):
        keys = jax.random.split(key, len(PARAMETERS))
        scale = {n: max(row[0][-2] if len(row[0]) > 1 else 1, 1) ** -0.5
                 for n, row in PARAMETERS.items()}
        return {
            name: (jax.random.normal(k, shape) * scale[name]).astype(dtype)
            for k, (name, (shape, dtype, _)) in zip(keys, PARAMETERS.items())
        }

    def states():
        return _map_rows(lambda row: jnp.zeros(*row[:2]), STATES)

    where = shardings(mesh)
    return (
        jax.jit(parameters, out_shardings=where[0])(key),
        jax.jit(states, out_shardings=where[1])(),
    )


def random_batch(key, mesh):
    """Stand-in for your data: random ids and noise of the right shapes."""
    where = shardings(mesh)[2]

    def one(row):
        shape, dtype, _ = row
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, 0, 2, dtype)
        return jax.random.normal(key, shape).astype(dtype)

    return jax.jit(lambda: _map_rows(one, INPUTS), out_shardings=where)()


if __name__ == "__main__":
    mesh = make_mesh()
    params, states = initialise(jax.random.key(0), mesh)
    step = compiled_step(mesh)
    for i in range(3):
        loss, params, states = step(params, states, random_batch(jax.random.key(i), mesh))
        print(f"step {i}: loss {loss:.4f}")
'''
