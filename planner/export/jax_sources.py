"""Functions of generated JAX programs, as they are written into them; what a program fills in is
`$name` (`filled`). Nothing here runs: names belong to the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Template


def filled(text: str, values: Mapping[str, str]) -> list[str]:
    """Lines of a text. KeyError if it needs more than `values`."""
    return Template(text).substitute(values).strip("\n").split("\n")


STACKING = '''

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

HELPERS = '''
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
    """x, and its gradient, sharded like tensor `where` (a name) or as `where` says (a P); with
    several places, one after the other."""
    if mesh is None:
        return x
    for place in where if type(where) is tuple else (where,):
        x = lax.with_sharding_constraint(x, _sharding(x, place, mesh))
    return x


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
    spec = $spec
    return NamedSharding(mesh, P(*spec[len(spec) - x.ndim :]))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy(x, sharding, gradient):
    return lax.with_sharding_constraint(x, sharding)


def _copy_gradient(sharding, gradient, _, g):
    return (g if gradient is None else lax.with_sharding_constraint(g, gradient),)


_copy.defvjp(lambda x, *where: (_copy(x, *where), None), _copy_gradient)
'''

SOFTMAX = '''
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def softmax(x, axis, dtype, label=None):
    """jax.nn.softmax(x, axis) as `dtype`, which layers save as `label`.

    The gradient is made of the result alone: JAX's own keeps logits in f32.$softmax_note
    """
    return _softmax_forward(x, axis, dtype, label)[0]


def _softmax_forward(x, axis, dtype, label):
    found = jax.nn.softmax(x, axis).astype(dtype)
    found = found if label is None else saved(found, label)
    return found, found


def _softmax_gradient(axis, dtype, label, found, g):$softmax_barrier
    found, g = found.astype(jnp.float32), g.astype(jnp.float32)
    return (found * (g - jnp.sum(found * g, axis, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_gradient)
'''

PRODUCT = '''
def placed_product(
    spec, a, b, gradients=(None, None), reads=(None, None), together=False, first=None,
    ${common}mesh=None
):
    """jnp.einsum(spec, a, b), with gradients that are made as `gradients` says.

    For either operand None, or: where the result's gradient and the other operand are read (it may
    pass several places), and where the product of the two lies, one place after the other. What is
    None is the compiler's.
    `reads`: where the product itself reads its operands. With `together` nothing of the backward
    pass comes between the two gradients; that of operand `first` is made before the other.
    $common_note"""$unplaced
    return _placed_product(spec, gradients, reads, (together, first$and_common), mesh, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _placed_product(spec, gradients, reads, order, mesh, a, b):
    return jnp.einsum(spec, _placed(a, reads[0], mesh), _placed(b, reads[1], mesh))


def _placed(x, where, mesh):
    return x if where is None else annotate(x, where, mesh)


def _transposed_product(spec, k, x, other, g):
    """The gradient of operand k, which is like x."""
    both = (lambda x: (x, other)) if k == 0 else (lambda x: (other, x))
    return jax.linear_transpose(lambda x: jnp.einsum(spec, *both(x)), x)(g)[0]


def _product_gradients(spec, gradients, reads, order, mesh, operands, g):
    (together, first$and_common), found = order, [None, None]
    for k in (1, 0) if first == 1 else (0, 1):
        cotangent, other, *places = gradients[k] or (None, None)
        other = _placed(operands[1 - k], other or reads[1 - k], mesh)
        transposed = $transposed
        made = transposed(spec, k, operands[k], other, _placed(g, cotangent, mesh))
        made = annotate(made, tuple(places), mesh)
        if k == first:
            made, g = lax.optimization_barrier((made, g))
        found[k] = made
    return lax.optimization_barrier(tuple(found)) if together else tuple(found)


_placed_product.defvjp(
    lambda *where: (_placed_product(*where), where[-2:]), _product_gradients
)
'''

REREAD = '''
@partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3, 4))
def reread(function, x, where, gradient, mesh=None):
    """function(x), of x as `where` says. Its gradient is made of x as `gradient` says, and lies so;
    JAX would make it of the copy that the function has read, and that would have to move."""
    return function(annotate(x, where, mesh))


def _reread_gradient(function, where, gradient, mesh, x, g):
    (made,) = jax.vjp(function, annotate(x, gradient, mesh))[1](g)
    return (annotate(made, gradient, mesh),)


reread.defvjp(lambda f, x, *where: (reread(f, x, *where), x), _reread_gradient)
'''

LOOKUP = '''
@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(table, indices, where, made, mesh=None):
    """Rows of a table. Its gradient is made of indices that lie as `where` says, and lies as `made`
    says; JAX would make it of the indices as they were looked up."""
    return jnp.take(table, indices, axis=0, mode="clip")


def _lookup_gradient(where, made, mesh, operands, g):
    table, indices = operands[0], annotate(operands[1], where, mesh)
    rows = lambda table: jnp.take(table, indices, axis=0, mode="clip")
    return annotate(jax.linear_transpose(rows, table)(g)[0], made, mesh), None


lookup.defvjp(
    lambda table, indices, *where: (lookup(table, indices, *where), (table, indices)),
    _lookup_gradient,
)
'''

COMMON = '''
@jax.custom_vjp
def common(x):
    """x, a parameter or made of some, whose gradient is summed over all groups at once."""
    return x


common.defvjp(lambda x: (x, None), lambda _, g: (lax.psum(g, "groups"),))
'''

OVER_GROUPS = '''
def _over_groups(spec, k, x, other, g):
    """The gradient of an operand that all groups have in common, of all groups at once."""

    @jax.custom_batching.custom_vmap
    def gradient(other, g):
        return _transposed_product(spec, k, x, other, g)

    @gradient.def_vmap
    def of_all(count, mapped, *given):
        given = (v if m else jnp.broadcast_to(v, (count, *v.shape)) for v, m in zip(given, mapped))
        sides, result = spec.split("->")
        sides = sides.split(",")
        sides[1 - k] = f"_{sides[1 - k]}"
        whole = f"{','.join(sides)}->_{result}".replace("_", _letter(spec))
        return _transposed_product(whole, k, x, *given), False

    return gradient(other, g)


def _letter(spec):
    return next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in spec)
'''

SLICEWISE = '''
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

SLOTS = '''
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

ROTATED = '''
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rotated(x, by, axis):
    """jnp.roll, whose gradient is rotated back: a sum of padded parts would move twice as much."""
    return jnp.roll(x, by, axis)


rotated.defvjp(
    lambda x, by, axis: (rotated(x, by, axis), None),
    lambda by, axis, _, g: (rotated(g, -by, axis),),
)
'''

ROUNDS = '''
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

FUNCTIONS = {  # written if one of them is called
    ("softmax",): SOFTMAX, ("product",): PRODUCT, ("over_groups",): OVER_GROUPS,
    ("reread",): REREAD, ("lookup",): LOOKUP,
    ("slicewise", "spread_slicewise", "max_pool_slicewise"): SLICEWISE, ("put", "pop"): SLOTS,
    ("chosen_round",): ROUNDS, ("rotated",): ROTATED, ("common",): COMMON,
}  # fmt: skip

MOVED = '''
def moved_update(name, p, grads, states, mesh=None):
    """update(name, p, grads[name], states[name]), where the plan makes it."""
    g, state = grads[name], states[name]
    if mesh is None or name not in UPDATES:
        return update(name, p, g, state)
    there, given, back = UPDATES[name]
    p, g = annotate(p, there, mesh), annotate(g, given, mesh)
    new, state = update(name, p, g, state)
    return annotate(new, back, mesh), state
'''

ONE_STEP = '''
def train_step(params, states, batch, mesh=None):
    """One optimizer step: (params, states, batch) -> (loss, new params, new states)."""
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, mesh)
    new = {name: $update for name, p in params.items()}
    return loss, {n: p for n, (p, _) in new.items()}, {n: s for n, (_, s) in new.items()}
'''

ACCUMULATED = '''
def train_step(params, states, batch, mesh=None):
    """One optimizer step over $steps microbatches: -> (loss, new params, new states)."""
$held
    def microbatches(batch):
        def microbatch(total, part):
            result = jax.value_and_grad(loss_fn)($read, part, mesh)
            return jax.tree.map(lambda t, r: t + r.astype(t.dtype) / $steps, total, result), None

        zeros = {
            n: annotate(jnp.zeros(p.shape, $gradients), $sums, mesh)
            for n, p in params.items()
        }
        return lax.scan(microbatch, (jnp.zeros((), jnp.float32), zeros), batch)[0]

    loss, grads = $summed
    new = {name: $update for name, p in params.items()}
    return loss, {n: p for n, (p, _) in new.items()}, {n: s for n, (_, s) in new.items()}
'''

GROUPED = '''
def by_groups(function, batch, mesh=None):
    """function(batch) -> (losses, gradients, ...) of every group of devices along UNREDUCED, for
    its part of the batch. Losses and gradients are then added up; whatever else there is has a
    dimension of groups in front.

    XLA would reduce what a loop carries in every microbatch.
    """
    axes = {n: 0 if n in SPLIT else None for n in batch}
    parts = {n: x if axes[n] is None else _parted(x, n, mesh) for n, x in batch.items()}

    def of_group(batch):
        losses, grads, *rest = function(batch)
        return (losses, {n: g for n, g in grads.items() if n not in REDUCED}, rest), {
            n: grads[n] for n in REDUCED
        }

    (losses, grads, rest), reduced = jax.vmap(
        of_group, (axes,), (0, None), axis_name="groups", spmd_axis_name=UNREDUCED
    )(parts)
    losses, grads = jax.tree.map(lambda x: jnp.sum(x, 0), (losses, grads))
    grads = {n: annotate(g, SUMS[n][1], mesh) for n, g in grads.items()}
    return losses, grads | reduced, *rest


def _parted(x, name, mesh):
    """[..., n, ...] -> [groups, ..., n / groups, ...]"""
    dim = SPLIT[name]
    x = jnp.moveaxis(x.reshape(*x.shape[:dim], GROUPS, -1, *x.shape[dim + 1 :]), dim, 0)
    return annotate(x, P(UNREDUCED, *_within(INPUTS[name][2])), mesh)


def _within(where):
    """A sharding as one group has it."""
    dims = (a if isinstance(a, tuple) else (a,) for a in where)
    return P(*(tuple(a for a in dim if a and a not in UNREDUCED) or None for dim in dims))
'''

TAIL = '''
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
        out_shardings=($results, params, states),
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
