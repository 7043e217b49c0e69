"""Search for the best layout of a run: every mesh, micro-batch and remat policy, by the plan.

Candidates are evaluated all at once: the plan's formulas hold for arrays of mesh sizes. Every way
to write the machine's devices as a product of mesh axes is one; batch, sequence and model stay as
they are, so that every candidate trains the same run.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import numpy as np
import yaml

from maxlm.config import MaxlmError, load_config
from maxlm.config.requirements import filter_candidates, is_divisor
from maxlm.models.dtypes import compute_dtype
from maxlm.models.remat import RematPolicy
from maxlm.plan.fit import require_run_fits
from maxlm.plan.predict import FILL, Machine, estimate_costs, plan_run
from maxlm.plan.shape import StepShape
from maxlm.plan.workload import MeshSplit, RunWorkload
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
    """The result of a search."""

    best: tuple[Candidate, ...]
    """Quickest first; every one fits and passes all of a run's own checks."""
    tried: int
    possible: int
    """Of those, that divide as they must."""
    fitting: int
    least: float
    """Bytes at the peak of whichever needs least; infinite where none is possible."""
    taken: float
    """Seconds."""
    refusal: str | None
    """Why the last one that fits and is not among the best was refused."""


def search_layouts(config: RunConfig, machine: Machine, *, top: int = 10) -> SearchResult:
    """Ranks all layouts of a run on a machine; where none fits there is no best."""
    began = time.perf_counter()
    fitted: list[tuple[_Batch, np.ndarray, np.ndarray]] = []
    tried = possible = fitting = 0
    least = np.inf
    for batch in _batches(config, machine):
        tried += batch.count
        possible += int(batch.divides.sum())
        if batch.divides.any():
            own = batch.kept(batch.divides)
            need, taken = own.evaluate(machine)
            least = min(least, float(need.min()))
            fits = need <= FILL * machine.chip.memory
            fitting += int(fits.sum())
            if fits.any():
                fitted.append((own.kept(fits), need[fits], taken[fits]))
    ranked = _quickest_first(fitted)
    spent = time.perf_counter() - began
    best, refusal = _accepted(config, machine, ranked, top)
    return SearchResult(best, tried, possible, fitting, float(least), spent, refusal)


def _quickest_first(
    fitted: list[tuple["_Batch", np.ndarray, np.ndarray]],
) -> Iterator[Candidate]:
    """Candidates of all batches, one by one: few of very many are ever looked at."""
    if not fitted:
        return iter(())
    batches, needs, times = zip(*fitted, strict=True)
    owner = np.concatenate([np.full(len(taken), i) for i, taken in enumerate(times)])
    place = np.concatenate([np.arange(len(taken)) for taken in times])
    need, taken = np.concatenate(needs), np.concatenate(times)
    order = np.lexsort((need, taken)).tolist()
    return (
        batches[owner[i]].candidate(int(place[i]), float(need[i]), float(taken[i])) for i in order
    )


def _accepted(
    config: RunConfig, machine: Machine, ranked: Iterator[Candidate], top: int
) -> tuple[tuple[Candidate, ...], str | None]:
    """The first that pass every check of a run; and the last refusal in words."""
    best: list[Candidate] = []
    refusal, refused = None, 0
    for candidate in ranked:
        try:
            plan_run(candidate.apply(config), machine)
            best.append(candidate)
        except MaxlmError as error:
            refusal, refused = str(error), refused + 1
        if len(best) == top or refused == _REFUSALS:
            break
    return tuple(best), refusal


def format_run_yaml(run: RunConfig, source: str) -> str:
    """Formats a run as YAML for ``maxlm train``: a source, and the settings that differ from it.

    Args:
        source: a config file or the name of a shipped config.
    """
    wanted = run.model_dump(mode="json")
    try:
        known = load_config(RunConfig, source).value.model_dump(mode="json")
        data = {"include": source, **_differing(known, wanted)}
    except MaxlmError:  # it is no run without the settings that were given beside it
        data = wanted
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None)


def _differing(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of ``high`` that differs from ``low``."""
    found = {}
    for key, value in high.items():
        known = low.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            if inner := _differing(known, value):
                found[key] = inner
        elif key not in low or known != value:
            found[key] = value
    return found


def _factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write n as an ordered product."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in _factorisations(n // first, parts - 1):
                yield (first, *rest)


@dataclass(frozen=True)
class _Batch:
    """Candidates with one remat policy and one set of rules."""

    work: RunWorkload
    sizes: dict[str, np.ndarray]
    micro: np.ndarray
    remat: RematPolicy
    residual: tuple[str, ...]
    divides: np.ndarray

    @property
    def count(self) -> int:
        return len(self.micro)

    def kept(self, which: np.ndarray) -> "_Batch":
        sizes = {axis: n[which] for axis, n in self.sizes.items()}
        return replace(self, sizes=sizes, micro=self.micro[which], divides=self.divides[which])

    def evaluate(self, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
        """Bytes at the peak and seconds a step."""
        split = MeshSplit(self.work.config, self.sizes)
        shape = StepShape(
            *(self.work, split, self.micro, self.remat),
            ragged=machine.ragged,
            fused_attention=machine.fused_attention,
        )
        held, _, time = estimate_costs(shape, machine)
        assert time is not None
        ones = np.ones(self.count)
        return np.asarray(held.total) * ones, np.asarray(time.total) * ones

    def candidate(self, i: int, need: float, taken: float) -> Candidate:
        return Candidate(
            {axis: int(n[i]) for axis, n in self.sizes.items()},
            int(self.micro[i]),
            self.remat,
            self.residual,
            taken,
            need,
        )


def _batches(config: RunConfig, machine: Machine) -> Iterator[_Batch]:
    dtype = compute_dtype(config.compute_dtype, machine.topology.platform)
    batch = config.data.batch_size
    micro = [n for n in range(1, batch + 1) if batch % n == 0]
    axes = [a for a in MESH_AXES if a != "expert" or config.model.moe is not None]
    meshes = [
        dict(zip(axes, m, strict=True))
        for m in _factorisations(machine.topology.devices, len(axes))
    ]
    pairs = list(product(meshes, micro))
    sizes = {a: np.array([m.get(a, 1) for m, _ in pairs], float) for a in MESH_AXES}
    counts = np.array([n for _, n in pairs], float)
    given = config.sharding.compute.residual
    for residual in dict.fromkeys((given, *_RESIDUAL)):
        compute = config.sharding.compute.model_copy(update={"residual": residual})
        rules = config.sharding.model_copy(update={"compute": compute})
        own = config.model_copy(update={"sharding": rules})
        work = RunWorkload.of(own, dtype)
        divides = _divides(work, sizes, counts, machine)
        if residual != given:
            # Rules that differ over axes of one device are the same candidate.
            differing = set(residual) ^ set(given)
            divides &= np.any([sizes[axis] > 1 for axis in differing], axis=0)
        for remat in get_args(RematPolicy):
            yield _Batch(work, sizes, counts, remat, residual, divides)


def _divides(
    work: RunWorkload, sizes: dict[str, np.ndarray], micro: np.ndarray, machine: Machine
) -> np.ndarray:
    """Which candidates meet every check of a run, and divide its parameters."""
    config, split = work.config, MeshSplit(work.config, sizes)
    good = filter_candidates(require_run_fits(config, sizes, micro))
    for spec in work.specs.values():
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            for own in (split.storage, split.gradients, split.optimizer, split.compute):
                good &= is_divisor(split.ways(own.mesh_axes(axis)), size)
    topology = machine.topology
    if topology.platform == "gpu":
        good &= np.equal(np.mod(topology.shape[-1], sizes["tensor"]), 0)
    if topology.platform == "tpu" and topology.slices > 1:
        good &= np.any(
            [np.equal(np.mod(sizes[a], topology.slices), 0) for a in BETWEEN_SLICES], axis=0
        )
    return good
