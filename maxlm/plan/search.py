"""Search for the best layout of a run: every mesh, micro-batch and remat policy, by the
plan.

Candidates are evaluated all at once: the plan's formulas hold for arrays of mesh sizes.
Every way to write the machine's devices as a product of mesh axes is one; batch,
sequence and model stay as they are, so that every candidate trains the same run.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import Any, get_args

import numpy as np
import yaml

from maxlm.config import MaxlmError, load_config
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.remat import RematPolicy
from maxlm.plan.known_errors import KnownTimeError, find_known_time_errors
from maxlm.plan.predict import FILL, Machine, estimate_costs, plan_run
from maxlm.plan.topology import Topology
from maxlm.plan.workload import MeshPartitioning, RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.run.placement import require_run_trainable
from maxlm.sharding import MESH_AXES
from maxlm.sharding.links import BETWEEN_SLICES

# Candidates that fit but fail a check which only the plan itself makes, before a search
# gives up.
_REFUSALS = 500
# Rules for the residual stream's sequence: whole on devices of `tensor`, or split
# (Megatron's sequence parallelism).
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

    def find_known_time_errors(
        self, config: RunConfig, topology: Topology
    ) -> tuple[KnownTimeError, ...]:
        """Returns the known errors of ``seconds``, for a run with this layout."""
        has_experts = config.model.moe is not None
        return find_known_time_errors(
            topology, self.sizes, config.data.seq_len, has_experts
        )

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
    """The quickest candidates, quickest first: all fit and pass all of a run's own
    checks."""

    best: tuple[Candidate, ...]
    num_tried: int
    num_divisible: int
    """Candidates that divide as they must."""
    num_fitting: int
    min_peak_bytes: float
    """Bytes at the peak of whichever needs least; infinite where none is possible."""
    search_seconds: float
    last_refusal: str | None
    """Why the last one that fits and is not among the best was refused."""


def search_layouts(
    config: RunConfig, machine: Machine, *, top: int = 10
) -> SearchResult:
    """Ranks all layouts of a run on a machine; where none fits there is no best."""
    began = time.perf_counter()
    # Seconds, memory, micro-batches and mesh of candidates that fit; and what their
    # batch shares.
    fitting, shared = [np.empty((3 + len(MESH_AXES), 0))], []
    num_tried = num_divisible = 0
    least = np.inf
    for count, shape in _list_shapes(config, machine):
        num_tried += count
        divisible = len(shape.micro_batches)
        if not divisible:
            continue
        num_divisible += divisible
        held, _, taken = estimate_costs(shape, machine)
        assert taken is not None
        sizes = (shape.split.sizes[axis] for axis in MESH_AXES)
        figures = taken.total, held.total, shape.micro_batches, *sizes
        columns = np.stack(np.broadcast_arrays(*figures))
        least = min(least, float(columns[1].min()))
        columns = columns[:, columns[1] <= FILL * machine.chip.memory_bytes]
        fitting.append(columns)
        shared += [
            (shape.remat, shape.work.config.sharding.compute.residual)
        ] * columns.shape[1]
    rows = np.concatenate(fitting, axis=1).T
    order = np.lexsort((rows[:, 1], rows[:, 0])).tolist()
    spent = time.perf_counter() - began
    best: list[Candidate] = []
    refusal = None
    for place, i in enumerate(order, 1):
        *costs, micro_batches = rows[i, :3].tolist()
        mesh = dict(zip(MESH_AXES, map(int, rows[i, 3:]), strict=True))
        candidate = Candidate(mesh, int(micro_batches), *shared[i], *costs)
        try:
            plan_run(candidate.apply(config), machine)
            best.append(candidate)
        except MaxlmError as error:
            refusal = str(error)
        if len(best) == top or place - len(best) == _REFUSALS:
            break
    return SearchResult(
        tuple(best), num_tried, num_divisible, len(order), least, spent, refusal
    )


def _list_shapes(
    config: RunConfig, machine: Machine
) -> Iterator[tuple[int, StepShape]]:
    """Yields the number of candidates with one remat policy and one set of rules, and
    the steps of those that divide as they must."""
    dtype = resolve_compute_dtype(config.compute_dtype, machine.topology.platform)
    batch = config.data.batch_size
    axes = [a for a in MESH_AXES if a != "expert" or config.model.moe is not None]
    meshes = list(_list_factorisations(machine.topology.devices, len(axes)))
    pairs = list(product(meshes, list_divisors(batch)))
    micro = np.array([n for _, n in pairs], float)
    sizes = {a: np.ones(len(pairs)) for a in MESH_AXES}
    sizes |= dict(
        zip(axes, np.array([mesh for mesh, _ in pairs], float).T, strict=True)
    )
    given = config.sharding.compute.residual
    for residual in dict.fromkeys((given, *_RESIDUAL)):
        compute = config.sharding.compute.model_copy(update={"residual": residual})
        rules = config.sharding.model_copy(update={"compute": compute})
        work = RunWorkload(config.model_copy(update={"sharding": rules}), dtype)
        divides = _find_divisible(work, sizes, micro, machine)
        if residual != given:
            # Rules that differ over axes of one device are the same candidate.
            divides &= np.any(
                [sizes[axis] > 1 for axis in set(residual) ^ set(given)], axis=0
            )
        own = {axis: n[divides] for axis, n in sizes.items()}
        for remat in get_args(RematPolicy):
            yield (
                len(pairs),
                StepShape(work, own, micro[divides], remat, machine.topology),
            )


def list_divisors(n: int) -> list[int]:
    """Lists the divisors of a positive number in ascending order."""
    small = [divisor for divisor in range(1, isqrt(n) + 1) if n % divisor == 0]
    return sorted({*small, *(n // divisor for divisor in small)})


def _list_factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write n as an ordered product."""
    if parts == 1:
        yield (n,)
        return
    for first in list_divisors(n):
        for rest in _list_factorisations(n // first, parts - 1):
            yield (first, *rest)


def _find_divisible(
    work: RunWorkload, sizes: dict[str, np.ndarray], micro: np.ndarray, machine: Machine
) -> np.ndarray:
    """Marks candidates that meet every check of a run, and divide its parameters."""
    config = work.config
    split = MeshPartitioning(work.config, sizes)
    requirements = require_run_trainable(config, sizes, micro)
    good = np.all(
        np.stack(np.broadcast_arrays(*(each.is_met for each in requirements))), axis=0
    )
    for spec in work.specs.values():
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            for own in (split.storage, split.gradients, split.optimizer, split.compute):
                good &= size % split.num_devices(own.mesh_axes(axis)) == 0
    topology = machine.topology
    if topology.platform == "gpu":
        good &= topology.shape[-1] % sizes["tensor"] == 0
    if topology.platform == "tpu" and topology.slices > 1:
        good &= np.any(
            [sizes[a] % topology.slices == 0 for a in BETWEEN_SLICES], axis=0
        )
    return good


def format_run_yaml(run: RunConfig, source: str) -> str:
    """Formats a run as YAML for ``maxlm train``: a source (a config file or the name of
    a shipped config), and the settings that differ from it."""
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
