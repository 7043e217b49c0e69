"""Search for the best layout of a run: every mesh, micro-batch and remat policy, by the plan.

Candidates are evaluated all at once: the plan's formulas hold for arrays of mesh sizes. Every way
to write the machine's devices as a product of mesh axes is one; batch, sequence and model stay as
they are, so that every candidate trains the same run.
"""

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import numpy as np
import yaml

from maxlm.config import MaxlmError, load_config
from maxlm.config.requirements import is_divisor
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.remat import RematPolicy
from maxlm.plan.layout import require_run_trainable
from maxlm.plan.predict import FILL, Machine, estimate_costs, make_step_shape, plan_run
from maxlm.plan.workload import MeshPartitioning, RunWorkload
from maxlm.run import RunConfig
from maxlm.sharding import MESH_AXES
from maxlm.sharding.links import BETWEEN_SLICES

# Candidates that fit but fail a check which only the plan itself makes, before a search gives up.
_REFUSALS = 500
# Rules for the residual stream's sequence: whole on devices of `tensor`, or split (Megatron's
# sequence parallelism).
_RESIDUAL = (("context",), ("context", "tensor"))


@dataclass(frozen=True)
class Candidate:
    """One layout of a run."""

    sizes: dict[str, int]
    micro_batches: int
    remat: RematPolicy
    residual: tuple[str, ...]
    seconds: float
    """A step, predicted."""
    memory: float
    """Bytes at the peak, predicted."""

    def apply(self, config: RunConfig) -> RunConfig:
        """Returns the run with this layout."""
        run = config.model_dump()
        run["mesh"] |= self.sizes
        run["model"]["remat"] = self.remat
        run["train"] |= {"micro_batches": self.micro_batches, "max_device_rows": None}
        run["sharding"]["compute"]["residual"] = self.residual
        return RunConfig.model_validate(run)


@dataclass(frozen=True)
class SearchResult:
    """The quickest candidates, quickest first: all fit and pass all of a run's own checks."""

    best: tuple[Candidate, ...]
    num_tried: int
    num_divisible: int
    """Candidates that divide as they must."""
    num_fitting: int
    min_peak_bytes: float
    """Bytes at the peak of whichever needs least; infinite where none is possible."""
    search_seconds: float
    """Seconds."""
    last_refusal: str | None
    """Why the last one that fits and is not among the best was refused."""


def search_layouts(config: RunConfig, machine: Machine, *, top: int = 10) -> SearchResult:
    """Ranks all layouts of a run on a machine; where none fits there is no best."""
    began = time.perf_counter()
    fitted: list[_Batch] = []
    tried = possible = fitting = 0
    least = np.inf
    for count, batch in _list_batches(config, machine):
        tried, possible = tried + count, possible + len(batch.micro)
        if len(batch.micro):
            batch = batch.evaluate(machine)
            least = min(least, float(batch.memory.min()))
            batch = batch.select(batch.memory <= FILL * machine.chip.memory_bytes)
            fitting += len(batch.micro)
            fitted.append(batch)
    ranked = heapq.merge(*map(_Batch.rank, fitted), key=lambda own: (own.seconds, own.memory))
    spent = time.perf_counter() - began
    best: list[Candidate] = []
    refusal = None
    for place, candidate in enumerate(ranked, 1):
        try:
            plan_run(candidate.apply(config), machine)
            best.append(candidate)
        except MaxlmError as error:
            refusal = str(error)
        if len(best) == top or place - len(best) == _REFUSALS:
            break
    return SearchResult(tuple(best), tried, possible, fitting, float(least), spent, refusal)


@dataclass(frozen=True)
class _Batch:
    """Candidates with one remat policy and one set of rules."""

    work: RunWorkload
    remat: RematPolicy
    sizes: dict[str, np.ndarray]
    micro: np.ndarray
    memory: np.ndarray
    """Bytes at the peak and seconds a step, once they are evaluated."""
    seconds: np.ndarray

    def select(self, which: np.ndarray) -> "_Batch":
        sizes = {axis: n[which] for axis, n in self.sizes.items()}
        arrays = self.micro[which], self.memory[which], self.seconds[which]
        return _Batch(self.work, self.remat, sizes, *arrays)

    def evaluate(self, machine: Machine) -> "_Batch":
        shape = make_step_shape(self.work, self.sizes, self.micro, self.remat, machine)
        held, _, taken = estimate_costs(shape, machine)
        assert taken is not None
        memory, seconds, _ = np.broadcast_arrays(held.total, taken.total, self.micro)
        return replace(self, memory=memory, seconds=seconds)

    def rank(self) -> Iterator[Candidate]:
        """Quickest first, one by one: few of very many are ever looked at."""
        residual = self.work.config.sharding.compute.residual
        for i in np.lexsort((self.memory, self.seconds)).tolist():
            sizes = {axis: int(n[i]) for axis, n in self.sizes.items()}
            costs = float(self.seconds[i]), float(self.memory[i])
            yield Candidate(sizes, int(self.micro[i]), self.remat, residual, *costs)


def _list_batches(config: RunConfig, machine: Machine) -> Iterator[tuple[int, _Batch]]:
    """Yields the number of candidates in each batch, and those that divide as they must."""
    dtype = resolve_compute_dtype(config.compute_dtype, machine.topology.platform)
    batch = config.data.batch_size
    axes = [a for a in MESH_AXES if a != "expert" or config.model.moe is not None]
    meshes = list(_list_factorisations(machine.topology.devices, len(axes)))
    pairs = list(product(meshes, (n for n in range(1, batch + 1) if batch % n == 0)))
    micro = np.array([n for _, n in pairs], float)
    sizes = {a: np.ones(len(pairs)) for a in MESH_AXES}
    sizes |= dict(zip(axes, np.array([mesh for mesh, _ in pairs], float).T, strict=True))
    given, unknown = config.sharding.compute.residual, np.full(len(pairs), np.nan)
    for residual in dict.fromkeys((given, *_RESIDUAL)):
        compute = config.sharding.compute.model_copy(update={"residual": residual})
        rules = config.sharding.model_copy(update={"compute": compute})
        work = RunWorkload.from_config(config.model_copy(update={"sharding": rules}), dtype)
        divides = _find_divisible(work, sizes, micro, machine)
        if residual != given:
            # Rules that differ over axes of one device are the same candidate.
            differing = set(residual) ^ set(given)
            divides &= np.any([sizes[axis] > 1 for axis in differing], axis=0)
        for remat in get_args(RematPolicy):
            batch = _Batch(work, remat, sizes, micro, unknown, unknown)
            yield len(pairs), batch.select(divides)


def _list_factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write n as an ordered product."""
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for rest in _list_factorisations(n // first, parts - 1):
            yield (first, *rest)


def _find_divisible(
    work: RunWorkload, sizes: dict[str, np.ndarray], micro: np.ndarray, machine: Machine
) -> np.ndarray:
    """Marks candidates that meet every check of a run, and divide its parameters."""
    config, split = work.config, MeshPartitioning(work.config, sizes)
    requirements = require_run_trainable(config, sizes, micro)
    masks = np.broadcast_arrays(*(each.is_met for each in requirements))
    good = np.all(np.stack(masks), axis=0)
    for spec in work.specs.values():
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            for own in (split.storage, split.gradients, split.optimizer, split.compute):
                good &= is_divisor(split.num_devices(own.mesh_axes(axis)), size)
    topology = machine.topology
    if topology.platform == "gpu":
        good &= topology.shape[-1] % sizes["tensor"] == 0
    if topology.platform == "tpu" and topology.slices > 1:
        good &= np.any([sizes[a] % topology.slices == 0 for a in BETWEEN_SLICES], axis=0)
    return good


def format_run_yaml(run: RunConfig, source: str) -> str:
    """Formats a run as YAML for ``maxlm train``: a source (a config file or the name of a shipped
    config), and the settings that differ from it."""
    wanted = run.model_dump(mode="json")
    try:
        known = load_config(RunConfig, source).value.model_dump(mode="json")
        data = {"include": source, **_differing(known, wanted)}
    except MaxlmError:  # it is no run without the settings that were given beside it
        data = wanted
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None)


def _differing(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of ``high`` that differs from ``low``."""
    found = {key: v for key, v in high.items() if key not in low or low[key] != v}
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(low.get(key), dict):
            found[key] = _differing(low[key], value)
    return found
