"""The code part of every annotations.py. Never imported: `jax_annotations` copies what follows
the marker below behind the data of a plan, so it may use nothing but jax and those names.
"""

# ruff: noqa: F821
# mypy: ignore-errors
# >>> code
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(devices=None, check_kind=True):
    """The mesh that was priced: axes in order, each on the links it was planned for.

    `devices`: jax.devices() by default. Raises ValueError for another number or kind of
    devices; `check_kind=False` lets other kinds pass, for dry runs on virtual devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = int(np.prod([size for _, size in AXES]))
    if len(devices) != wanted:
        raise ValueError(f"the plan is for {wanted} devices ({_mesh_text()}), got {len(devices)}")
    kinds = sorted({d.device_kind for d in devices})
    if check_kind and kinds != [DEVICE_KIND]:
        raise ValueError(f"the plan is for {DEVICE_KIND!r} devices, these are {', '.join(kinds)}")
    grid = np.empty(len(devices), dtype=object)
    grid[:] = _physical_order(devices)
    grid = grid.reshape([size for _, size in LAYOUT])
    order = [i for name, _ in AXES for i, (axis, _) in enumerate(LAYOUT) if axis == name]
    return Mesh(grid.transpose(order).reshape([s for _, s in AXES]), [n for n, _ in AXES])


def shardings(params, mesh, rename=None, default=None):
    """A tree of NamedSharding like `params` (arrays or ShapeDtypeStructs), leaf by leaf.

    A leaf is called by its path, joined by dots; layer numbers (`layers.3.w`, `layers_3.w`)
    and a leading `params` are left out, unless the plan has a name with them. `rename` (mapping
    or function) turns such names into the plan's. Layers may be stacked, with their number as
    leading dimensions, or not.
    Raises ValueError with the unmatched names of both sides, because an unmatched leaf would
    silently lie whole on every device; with `default` (a PartitionSpec) it gets that instead.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    found, seen, unknown = [], set(), []
    for path, leaf in leaves:
        name = _name(path, rename)
        if name in PARAMETERS:
            seen.add(name)
            found.append(NamedSharding(mesh, _parameter_spec(name, np.shape(leaf))))
        else:
            unknown.append(name)
            found.append(None if default is None else NamedSharding(mesh, default))
    missing = [name for name in PARAMETERS if name not in seen]
    if default is None and (unknown or missing):
        raise ValueError(
            "parameters and plan do not match (rename= translates names, default= covers the rest)"
            f"\n  without a plan: {', '.join(sorted(set(unknown))) or 'none'}"
            f"\n  without a parameter: {', '.join(missing) or 'none'}"
        )
    return jax.tree_util.tree_unflatten(tree, found)


def constrain(name, x, mesh):
    """`x` with the sharding that the plan has for the tensor `name` of its model."""
    if name not in SPECS:
        raise ValueError(f"the plan has no tensor {name!r}; it has {', '.join(SPECS)}")
    if x.ndim != len(SPECS[name]):
        raise ValueError(f"{name} has {len(SPECS[name])} dimensions in the plan, here {x.ndim}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(SPECS[name])))


def _spec(dims, stacked=0):
    axes = [None if not d else d[0] if len(d) == 1 else tuple(d) for d in dims]
    return PartitionSpec(*[None] * stacked, *axes)


def _parameter_spec(name, shape):
    dims, (stacked, inner) = SPECS[name], PARAMETERS[name]
    if tuple(shape) == tuple(inner):
        return _spec(dims)
    if tuple(shape) == (*stacked, *inner):
        return _spec(dims, len(stacked))
    either = f"{(*stacked, *inner)} or {tuple(inner)}" if stacked else f"{tuple(inner)}"
    raise ValueError(f"{name} has shape {tuple(shape)}, the plan is for {either}")


def _name(path, rename):
    words = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    name = ".".join(word for word in words if not word.isdigit())
    plain = re.sub(r"_\d+(?=\.|$)", "", name).removeprefix("params.")
    for called in (name, plain, ".".join(words)):
        renamed = rename(called) if callable(rename) else (rename or {}).get(called, called)
        if renamed in PARAMETERS:
            return renamed
    return name


def _physical_order(devices):
    """Devices row-major over the physical dimensions, as the plan counts them."""
    if any(getattr(d, "coords", None) is None for d in devices):
        return sorted(devices, key=lambda d: d.id)
    places = {}
    for d in devices:
        where = {"x": d.coords[0], "y": d.coords[1], "z": d.coords[2], "core": d.core_on_chip}
        places[tuple(where[name] for name, _ in PHYSICAL)] = d
    for i, (name, size) in enumerate(PHYSICAL):
        present = len({place[i] for place in places})
        if present != size:
            raise ValueError(f"the plan is for {size} along {name}, these devices have {present}")
    return [places[place] for place in sorted(places)]


def _mesh_text():
    return " × ".join(f"{name}={size}" for name, size in AXES)
