"""Search for the best layout of a run: every mesh, micro-batch and remat policy, by the
plan.

Candidates are evaluated all at once: the plan's formulas hold for arrays of mesh sizes.
Every way to write the machine's devices as a product of mesh axes is one; batch,
sequence and model stay as they are, so that every candidate trains the same run.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import NamedTuple, get_args

import numpy as np
import yaml

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.remat import RematPolicy
from maxlm.plan.generation import ExpectedLengths, GenerationPlanner
from maxlm.plan.known_errors import KnownTimeError, find_known_time_errors
from maxlm.plan.machine import SAFE_FILL_RATIO, Machine
from maxlm.plan.predict import estimate_costs, plan_run
from maxlm.plan.topology import Topology
from maxlm.plan.workload import MeshPartitioning, RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.run.placement import require_run_trainable
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import MESH_AXES
from maxlm.sharding.links import BETWEEN_SLICES

# Candidates that fit but fail a check which only the plan itself makes, before a search
# gives up.
_MAX_REFUSALS = 500
# Rules for the residual stream's sequence: whole on devices of `tensor`, or split
# (Megatron's sequence parallelism, Korthikanti et al. 2022, arXiv 2205.05198).
_RESIDUAL_RULES = (("context",), ("context", "tensor"))


@dataclass(frozen=True)
class Candidate:
    """One layout of a run."""

    sizes: dict[str, int]
    micro_batches: int
    remat: RematPolicy
    residual: tuple[str, ...]
    seconds: float
    """Predicted seconds from a step to the next on average, a rollout's share
    included."""
    memory: float
    """Predicted bytes of a device at the peak."""

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


class _FittingCandidates(NamedTuple):
    """Candidates with one remat policy and one rule for the residual stream, of which
    all fit: arrays with an element for each."""

    remat: RematPolicy
    residual: tuple[str, ...]
    seconds: np.ndarray
    memory: np.ndarray
    micro_batches: np.ndarray
    sizes: dict[str, np.ndarray]

    def get(self, i: int) -> Candidate:
        return Candidate(
            sizes={axis: int(sizes[i]) for axis, sizes in self.sizes.items()},
            micro_batches=int(self.micro_batches[i]),
            remat=self.remat,
            residual=self.residual,
            seconds=float(self.seconds[i]),
            memory=float(self.memory[i]),
        )


def search_layouts(
    config: RunConfig,
    machine: Machine,
    *,
    top: int = 10,
    lengths: ExpectedLengths = ExpectedLengths(),
) -> SearchResult:
    """Ranks all layouts of a run on a machine; where none fits there is no best.

    Args:
        top: layouts to return.
        lengths: that are expected of the sequences that a task generates.
    """
    began = time.perf_counter()
    groups: list[_FittingCandidates] = []
    num_tried = 0
    num_divisible = 0
    min_peak_bytes = np.inf
    planner = GenerationPlanner(config, machine, lengths)
    for num_candidates, shape in _list_shapes(config, machine):
        num_tried += num_candidates
        if not len(shape.micro_batches):
            continue
        num_divisible += len(shape.micro_batches)
        costs = estimate_costs(shape, machine, planner)
        # A figure that is the same for all candidates is a single number until here.
        seconds, peak_bytes, micro_batches, *mesh_columns = np.broadcast_arrays(
            costs.mean_step_seconds,
            costs.peak_bytes,
            shape.micro_batches,
            *(shape.split.sizes[axis] for axis in MESH_AXES),
        )
        min_peak_bytes = min(min_peak_bytes, float(peak_bytes.min()))
        fits = peak_bytes <= SAFE_FILL_RATIO * machine.chip.memory_bytes
        sizes = dict(zip(MESH_AXES, mesh_columns, strict=True))
        group = _FittingCandidates(
            remat=shape.remat,
            residual=shape.work.config.sharding.compute.residual,
            seconds=seconds[fits],
            memory=peak_bytes[fits],
            micro_batches=micro_batches[fits],
            sizes={axis: column[fits] for axis, column in sizes.items()},
        )
        groups.append(group)

    candidates = _rank_candidates(groups)
    search_seconds = time.perf_counter() - began
    num_fitting = sum(len(group.seconds) for group in groups)

    # The plan of each candidate makes the checks that formulas do not.
    best: list[Candidate] = []
    num_refused = 0
    refusal = None
    for candidate in candidates:
        try:
            plan_run(candidate.apply(config), machine, lengths=lengths)
            best.append(candidate)
        except MaxlmError as error:
            refusal = str(error)
            num_refused += 1
        if len(best) == top or num_refused == _MAX_REFUSALS:
            break
    return SearchResult(
        best=tuple(best),
        num_tried=num_tried,
        num_divisible=num_divisible,
        num_fitting=num_fitting,
        min_peak_bytes=min_peak_bytes,
        search_seconds=search_seconds,
        last_refusal=refusal,
    )


def _rank_candidates(groups: Sequence[_FittingCandidates]) -> Iterator[Candidate]:
    """Yields the candidates of all groups, the quickest first, of equally quick ones
    that with the least memory."""
    if not groups:
        return
    seconds = np.concatenate([group.seconds for group in groups])
    memory = np.concatenate([group.memory for group in groups])
    places = [(group, i) for group in groups for i in range(len(group.seconds))]
    # The last key of a lexsort is the first to sort by.
    for place in np.lexsort((memory, seconds)).tolist():
        group, i = places[place]
        yield group.get(i)


def _list_shapes(
    config: RunConfig, machine: Machine
) -> Iterator[tuple[int, StepShape]]:
    """Yields the number of candidates with one remat policy and one set of rules, and
    the steps of those that divide as they must."""
    dtype = resolve_compute_dtype(config.compute_dtype, machine.topology.platform)

    # Every mesh with every number of micro-batches.
    has_experts = config.model.moe is not None
    axes = [axis for axis in MESH_AXES if axis != "expert" or has_experts]
    meshes = list(_list_factorisations(machine.topology.devices, len(axes)))
    micro_batch_counts = list_divisors(config.data.batch_size)
    pairs = list(product(meshes, micro_batch_counts))
    mesh_columns = np.array([mesh for mesh, _ in pairs], float).T  # [axes, pairs]
    micro_batches = np.array([count for _, count in pairs], float)
    sizes = {axis: np.ones(len(pairs)) for axis in MESH_AXES}
    sizes |= dict(zip(axes, mesh_columns, strict=True))

    configured = config.sharding.compute.residual
    for residual in dict.fromkeys((configured, *_RESIDUAL_RULES)):
        compute = config.sharding.compute.model_copy(update={"residual": residual})
        rules = config.sharding.model_copy(update={"compute": compute})
        work = RunWorkload(config.model_copy(update={"sharding": rules}), dtype)
        divides = _find_divisible(work, sizes, micro_batches, machine)
        if residual != configured:
            # Rules that differ over axes of one device are the same candidate.
            differing = set(residual) ^ set(configured)
            divides &= np.any([sizes[axis] > 1 for axis in differing], axis=0)
        divisible_sizes = {axis: column[divides] for axis, column in sizes.items()}
        for remat in get_args(RematPolicy):
            shape = StepShape(
                work, divisible_sizes, micro_batches[divides], remat, machine.topology
            )
            yield len(pairs), shape


def list_divisors(n: int) -> list[int]:
    """Lists the divisors of a positive number in ascending order."""
    # Divisors come in pairs, of which one is at most the root.
    small = [divisor for divisor in range(1, isqrt(n) + 1) if n % divisor == 0]
    large = [n // divisor for divisor in small]
    return sorted({*small, *large})


def _list_factorisations(n: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to write n as an ordered product."""
    if num_factors == 1:
        yield (n,)
        return
    for first in list_divisors(n):
        for rest in _list_factorisations(n // first, num_factors - 1):
            yield (first, *rest)


def _find_divisible(
    work: RunWorkload,
    sizes: dict[str, np.ndarray],
    micro_batches: np.ndarray,
    machine: Machine,
) -> np.ndarray:
    """Marks candidates that meet every check of a run, and divide its parameters."""
    # The checks of a run: [requirements, candidates] -> [candidates].
    requirements = require_run_trainable(work.config, sizes, micro_batches)
    met = np.broadcast_arrays(*(requirement.is_met for requirement in requirements))
    divides = np.all(np.stack(met), axis=0)

    # Every dimension of every parameter, wherever it is split.
    split = MeshPartitioning(work.config, sizes)
    all_rules = (split.storage, split.gradients, split.optimizer, split.compute)
    for spec in work.specs.values():
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            for rules in all_rules:
                num_shards = split.num_devices(rules.mesh_axes(axis))
                divides &= size % num_shards == 0

    topology = machine.topology
    if topology.platform == "gpu":
        # Tensor parallelism stays within a host.
        gpus_per_host = topology.shape[-1]
        divides &= gpus_per_host % sizes["tensor"] == 0
    if topology.platform == "tpu" and topology.slices > 1:
        # One of the axes that may cross slices crosses all of them.
        crosses = [sizes[axis] % topology.slices == 0 for axis in BETWEEN_SLICES]
        divides &= np.any(crosses, axis=0)
    return divides


def format_run_yaml(run: RunConfig, source: str) -> str:
    """Formats a run as YAML for ``maxlm train``: a source (a config file or the name of
    a shipped config), and the settings that differ from it."""
    settings = run.model_dump(mode="json")
    try:
        defaults = load_config(RunConfig, source).value.model_dump(mode="json")
    except MaxlmError:
        # The source is no run without the settings that were given beside it.
        data = settings
    else:
        data = {"include": source, **_select_differing(defaults, settings)}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None)


def _select_differing(defaults: JsonObject, settings: JsonObject) -> JsonObject:
    """Returns the part of ``settings`` that differs from ``defaults``."""
    differing: JsonObject = {}
    for key, value in settings.items():
        if key in defaults and defaults[key] == value:
            continue
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            value = _select_differing(defaults[key], value)
        differing[key] = value
    return differing
