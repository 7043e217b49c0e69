"""The cost of serving a model on a machine: how many sequences fit, how long tokens
take, and the search over splits.

Each token of a request waits for a step (``plan/served_model.py``), and for its share
of all rows' prompts, which are computed between steps. Not counted: queues, uneven
lengths, shared prefixes, speculation, and the time of a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from maxlm.config import MaxlmError
from maxlm.models.caches.config import CacheConfig
from maxlm.plan.machine import Machine
from maxlm.plan.search import list_divisors
from maxlm.plan.served_model import (
    ServedModel,
    ServingOptions,
    read_workload,
    resolve_replica_mesh,
)
from maxlm.plan.serving_cache import (
    CacheFormat,
    count_sequence_bytes,
    count_token_bytes,
)
from maxlm.plan.timing import DECODE_EFFICIENCY
from maxlm.run.config import RunConfig
from maxlm.runtime.json_types import JsonObject

# Most rows of a replica that a plan looks at.
_MAX_ROWS = 8192


@dataclass(frozen=True)
class ServingPoint:
    """Serving at one number of sequences."""

    batch: int
    """Sequences on all devices together."""
    tpot_seconds: float
    """Seconds between a sequence's tokens, with the prompts computed in between."""
    tokens_per_second: float
    """New tokens of all sequences."""
    time: dict[str, float]
    """Seconds of a step's parts, and in all
    (:meth:`ServedModel.estimate_decode_seconds`)."""


@dataclass(frozen=True)
class ServingPlan:
    """A model served on one split; plain data but for classes like this one."""

    name: str
    machine: JsonObject
    devices: int
    mesh: dict[str, int]
    cache: CacheFormat
    options: ServingOptions
    memory: dict[str, float]
    """Bytes of a device: by part, their ``total``, and the ``limit``."""
    token_cache_bytes: float
    """Bytes that one more token takes before a window is full, each head once."""
    sequence_cache_bytes: float
    """Bytes of a finished request's caches, each head once."""
    max_batch: int
    """Sequences that fit, on all devices together."""
    fits: bool
    meets_targets: bool
    ttft_seconds: float
    """Seconds to the first token of a prompt that is alone on its replica."""
    point: ServingPoint
    curve: tuple[ServingPoint, ...]

    @property
    def is_feasible(self) -> bool:
        return self.fits and self.meets_targets


def plan_served_model(served: ServedModel) -> ServingPlan:
    """Plans one split; too little memory is no error."""
    options = served.options
    machine = served.machine
    assert machine is not None
    cache = served.cache
    assert not isinstance(cache, CacheConfig)
    chip = machine.chip
    replicas = served.replicas
    max_rows = served.count_max_rows()
    max_tpot = (options.tpot_ms or np.inf) / 1e3
    curve_rows = min(max(max_rows, 1), _MAX_ROWS)
    point = _choose_point(served, curve_rows, max_tpot)
    # The fullest replica's.
    rows = -(-point.batch // replicas)
    memory = served.count_memory_bytes(rows)
    memory |= {"total": sum(memory.values()), "limit": chip.memory_bytes}
    ttft_seconds = float(served.estimate_prefill_seconds())
    meets_tpot = point.tpot_seconds <= max_tpot
    meets_ttft = 1e3 * ttft_seconds <= (options.ttft_ms or np.inf)
    # Rates at 1, 2, 4, ... rows of a replica, at the most that fit, and at the plan's.
    doubled = [replicas * 2**i for i in range(curve_rows.bit_length())]
    curve_batches = sorted({*doubled, replicas * curve_rows, point.batch})
    decode_efficiency = DECODE_EFFICIENCY[chip.family]._asdict()
    return ServingPlan(
        name=served.work.config.name,
        machine={**machine.to_json(), "decode": decode_efficiency},
        devices=machine.topology.devices,
        mesh=dict(served.sizes),
        cache=cache,
        options=options,
        memory=memory,
        token_cache_bytes=count_token_bytes(served.unsplit_caches),
        sequence_cache_bytes=count_sequence_bytes(
            served.unsplit_caches, options.length
        ),
        max_batch=max_rows * replicas,
        fits=point.batch <= max_rows * replicas,
        meets_targets=meets_tpot and meets_ttft,
        ttft_seconds=ttft_seconds,
        point=point,
        curve=list_serving_points(served, curve_batches),
    )


def _choose_point(served: ServedModel, max_rows: int, max_tpot: float) -> ServingPoint:
    """Chooses the number of sequences that is asked for, or that gives most tokens a
    second with at most ``max_tpot`` seconds between them; if none does, the least."""
    if served.options.batch is not None:
        return list_serving_points(served, [served.options.batch])[0]
    replicas = served.replicas
    batches = [replicas * rows for rows in range(1, max_rows + 1)]
    points = list_serving_points(served, batches)
    in_time = [point for point in points if point.tpot_seconds <= max_tpot]
    if not in_time:
        return points[0]
    return max(in_time, key=lambda point: point.tokens_per_second)


def list_serving_points(
    served: ServedModel, batches: Sequence[int]
) -> tuple[ServingPoint, ...]:
    """Lists serving at each number of sequences; replicas with unequal shares are as
    slow as the one with most."""
    rows = np.ceil(np.asarray(batches, float) / served.replicas)
    time = served.estimate_decode_seconds(rows)
    # With a token's share of the passes that compute all rows' prompts.
    prompts_seconds = served.estimate_prompts_seconds(rows, rows)
    tpot = time["total"] + prompts_seconds / served.options.new
    # A figure that is the same at every number of sequences is a single number.
    columns = np.broadcast_arrays(tpot, *time.values())
    points: list[ServingPoint] = []
    for batch, *figures in zip(batches, *columns, strict=True):
        tpot_seconds, *part_seconds = (float(figure) for figure in figures)
        point = ServingPoint(
            batch=batch,
            tpot_seconds=tpot_seconds,
            tokens_per_second=batch / tpot_seconds,
            time=dict(zip(time, part_seconds, strict=True)),
        )
        points.append(point)
    return tuple(points)


def _get_rank(plan: ServingPlan) -> tuple[int, float]:
    """Returns the key that sorts plans, best first."""
    if plan.is_feasible:
        return 0, -plan.point.tokens_per_second
    if plan.fits:
        return 1, plan.point.tpot_seconds
    return 2, plan.memory["total"]


def search_serving(
    config: RunConfig,
    machine: Machine,
    options: ServingOptions = ServingOptions(),
    *,
    tensor: int | None = None,
    caches: Sequence[CacheFormat] = ("auto",),
) -> tuple[list[ServingPlan], str | None]:
    """Plans splits of all devices into replicas, with every cache. Raises MaxlmError:
    the model cannot be served, or cannot be split so at all; but not for too little
    memory.

    Args:
        tensor: devices of a replica; None: each number that divides the machine's.

    Returns:
        Plans that fit and are in time first, by tokens a second; then others that fit,
        by time per token; then those that need the fewest bytes. And why the last split
        that the model cannot have was refused.
    """
    work = read_workload(config, machine, options)
    plans: list[ServingPlan] = []
    refusal: MaxlmError | None = None
    replica_sizes = [tensor] if tensor else list_divisors(machine.topology.devices)
    for replica_size, cache in product(replica_sizes, caches):
        try:
            sizes = resolve_replica_mesh(work, machine, replica_size)
            served = ServedModel(work, machine, options, sizes, cache)
            plans.append(plan_served_model(served))
        except MaxlmError as error:
            refusal = error
    if refusal is not None and not plans:
        raise refusal
    message = None if refusal is None else str(refusal)
    return sorted(plans, key=_get_rank), message
