"""What is predicted for a run: its model, mesh and layout through lowering and simulation.

Nothing is chosen here: the layout says where every tensor lies, and what it leaves open is
completed at least cost, as `plan simulate` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from os import cpu_count

import yaml

import meshes
from costmodels.compute import efficiency
from costmodels.program import ITEM_BYTES
from meshes import LogicalMesh, Topology
from planner import zoo
from planner.errors import InputError
from planner.model import Model, Training
from planner.modelfile import ModelErrors, load_model, render
from planner.planning import Infeasible, Options, plan_model, price_annotations
from planner.result import Result
from planner.validation.layouts import Layout, lay
from planner.validation.runs import Run, Suite

SEVERAL = 12  # runs from which on starting other processes pays


@dataclass(frozen=True)
class Prediction:
    """Figures of `Measured`, predicted. `fits`: without any headroom."""

    step_time_s: float
    mfu: float
    hfu: float
    peak_bytes: int
    fits: bool
    step_time_range_s: tuple[float, float] | None = None


def simulate_run(run: Run) -> Result:
    """The run, lowered and simulated as it was made; InputError if it cannot be."""
    model = load(run)
    if model.mesh is None or not isinstance(model.shape, dict):
        raise InputError(f"{run.id}: its model needs a mesh with a shape")
    topology = _topology(model.mesh, run.eager, run.overlap, run.network_bytes_per_s)
    mesh = meshes.logical(topology, dict(model.shape), model.layout)
    if run.layout is None:
        return _planned(model, mesh)
    if isinstance(run.layout, str):
        return price_annotations(model, mesh, zoo.published(model.name))
    unknown = run.layout.axes - set(dict(mesh.axes))
    if unknown:
        raise InputError(f"{run.id}: the mesh has no axis {sorted(unknown)[0]!r}")
    model = _as_written(model)
    laid = lay(model, run.layout, dict(mesh.axes))
    return price_annotations(model, mesh, laid.annotation, as_laid=laid.as_laid)


def _as_written(model: Model) -> Model:
    """The model of a program whose layout was written by hand: unless its run says otherwise,
    gradients are reduced after the last part of the batch."""
    work = model.workload
    if not isinstance(work, Training) or work.reduce_once is not None:
        return model
    return replace(model, workload=replace(work, reduce_once=True))


def _planned(model: Model, mesh: LogicalMesh) -> Result:
    """The fastest plan that fits without headroom; else the one of least memory."""
    try:
        return plan_model(model, mesh, Options(headroom=0.0))
    except Infeasible as infeasible:
        return infeasible.result


def predict(run: Run) -> Prediction:
    result = simulate_run(run)
    peak = result.memory.peak_bytes
    if run.combined_sums and isinstance(run.layout, Layout):
        peak += _unsummed_bytes(result, run.layout.activations.get("B", ()))
    return Prediction(
        result.timing.step_time_s, result.mfu, result.hfu, peak, peak <= result.limit_bytes,
        result.step_time_range_s,
    )  # fmt: skip


def _unsummed_bytes(result: Result, batch: Sequence[str]) -> int:
    """What gradients take more on one device until they are summed over the axes that split the
    `batch`, than scattered over those axes as they are here."""
    tensors, sizes = result.graph.all_tensors(), dict(result.mesh.axes)
    more = 0
    for parameter in result.graph.parameters():
        gradient = tensors.get(result.graph.cotangents.get(parameter.name, ""))
        if gradient is None or gradient.name not in result.specs:
            continue
        spec = result.specs[gradient.name]
        shards = prod(sizes[a] for a in spec.axes if a in batch)
        local = prod(spec.local_shape(gradient.shape, sizes)) * ITEM_BYTES[gradient.dtype]
        more += local * (shards - 1)
    return more


def predictions(suite: Suite) -> Iterator[Prediction]:
    """One per run, in their order; on all cores if there are many."""
    workers = cpu_count() or 1
    if len(suite.runs) < SEVERAL or workers == 1:
        yield from map(predict, suite.runs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(predict, suite.runs, chunksize=_chunk(suite.runs, workers))


def _chunk(runs: Sequence[Run], workers: int) -> int:
    """Few enough that workers end together, many enough that handing out costs nothing."""
    return max(1, min(8, len(runs) // (4 * workers)))


def load(run: Run) -> Model:
    if isinstance(run.model, str):
        if run.model not in zoo.names():
            raise InputError(f"{run.id}: no model {run.model!r} in the zoo")
        return load_model(zoo.text(run.model), run.model)
    text = yaml.safe_dump(dict(run.model), sort_keys=False)
    try:
        return load_model(text, run.id)
    except ModelErrors as errors:
        raise InputError(f"{run.id}: {render(errors.diagnostics)}") from None


@lru_cache(maxsize=64)
def _topology(
    name: str, eager: bool, overlap: frozenset[str] | None, network_bytes_per_s: float | None
) -> Topology:
    """The machine, as the software of the run used it."""
    topology = meshes.resolve(name)
    if network_bytes_per_s is not None:
        links = tuple(
            replace(link, bytes_per_s=network_bytes_per_s) if link.kind == "network" else link
            for link in topology.links
        )
        topology = replace(topology, links=links)
    chip = topology.chip
    if eager:
        chip = replace(chip, dispatch_s=efficiency(chip.efficiency).eager_dispatch_s)
    if overlap is not None:
        chip = replace(chip, overlap=overlap)
    return replace(topology, chip=chip)
