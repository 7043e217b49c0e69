"""Plans of serving: a split at many numbers of sequences, and the search over splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.plan.predict import Machine
from maxlm.plan.serving import (
    DECODE_EFFICIENCY,
    ServedModel,
    ServingOptions,
    place_served_model,
    read_workload,
)
from maxlm.plan.serving_cache import CacheFormat, count_sequence_bytes, count_token_bytes
from maxlm.run import RunConfig
from maxlm.sharding import MeshConfig, mesh_sizes

# Rows of a replica beyond which no plan looks.
_MOST_ROWS = 8192


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
    """Seconds of a step's parts, and in all (:meth:`ServedModel.estimate_decode_seconds`)."""


@dataclass(frozen=True)
class ServingPlan:
    """A model served on one split; plain data but for classes like this one."""

    name: str
    machine: dict[str, Any]
    devices: int
    mesh: dict[str, int]
    cache: CacheFormat
    options: ServingOptions
    memory: dict[str, float]
    """Bytes of a device: parts, in all, and what there is."""
    token_cache_bytes: float
    """Bytes that one more token takes on a replica's devices together, before a window is full."""
    sequence_cache_bytes: float
    """Bytes of a finished request's caches there, one copy."""
    max_batch: int
    """Sequences that fit, on all devices together."""
    fits: bool
    meets_targets: bool
    ttft_seconds: float
    """Seconds to the first token of a prompt that is alone on its replica."""
    point: ServingPoint
    curve: tuple[ServingPoint, ...]

    @property
    def is_good(self) -> bool:
        return self.fits and self.meets_targets


def plan_served_model(served: ServedModel) -> ServingPlan:
    """Plans one split; too little memory is no error."""
    options, machine, replicas = served.options, served.machine, served.sizes["data"]
    most, longest = served.count_max_rows(), (options.tpot_ms or np.inf) / 1e3
    rows = min(max(most, 1), _MOST_ROWS)
    if options.batch is None:
        points = list_serving_points(served, [replicas * n for n in range(1, rows + 1)])
        in_time = (point for point in points if point.tpot_seconds <= longest)
        point = max(in_time, key=lambda point: point.tokens_per_second, default=points[0])
    else:
        (point,) = list_serving_points(served, [options.batch])
    doubled = (replicas * 2**i for i in range(rows.bit_length()))
    memory = served.count_memory_bytes(-(-point.batch // replicas))
    memory |= {"total": sum(memory.values()), "limit": machine.chip.memory_bytes}
    first = float(served.estimate_prefill_seconds())
    return ServingPlan(
        name=served.work.config.name,
        machine=machine.to_json() | {"decode": DECODE_EFFICIENCY[machine.chip.family]._asdict()},
        devices=machine.topology.devices,
        mesh=dict(served.sizes),
        cache=served.cache,
        options=options,
        memory=memory,
        token_cache_bytes=count_token_bytes(served.layer_caches),
        sequence_cache_bytes=count_sequence_bytes(served.layer_caches, options.length),
        max_batch=most * replicas,
        fits=point.batch <= most * replicas,
        meets_targets=point.tpot_seconds <= longest and 1e3 * first <= (options.ttft_ms or np.inf),
        ttft_seconds=first,
        point=point,
        curve=list_serving_points(served, sorted({*doubled, replicas * rows, point.batch})),
    )


def list_serving_points(served: ServedModel, batches: Sequence[int]) -> tuple[ServingPoint, ...]:
    """Lists serving at each number of sequences; replicas with unequal shares are as slow as the
    one with most."""
    rows = np.ceil(np.asarray(batches, float) / served.sizes["data"])
    time = served.estimate_decode_seconds(rows)
    tpot = time["total"] + served.estimate_prefill_share_seconds(rows)
    columns = (column.tolist() for column in np.broadcast_arrays(tpot, *time.values()))
    return tuple(
        ServingPoint(batch, seconds, batch / seconds, dict(zip(time, parts, strict=True)))
        for batch, seconds, *parts in zip(batches, *columns, strict=True)
    )


def _rank(plan: ServingPlan) -> tuple[int, float]:
    if plan.is_good:
        return 0, -plan.point.tokens_per_second
    return (1, plan.point.tpot_seconds) if plan.fits else (2, plan.memory["total"])


def search_serving(
    config: RunConfig,
    machine: Machine,
    options: ServingOptions = ServingOptions(),
    *,
    tensor: int | None = None,
    caches: Sequence[CacheFormat] = ("auto",),
) -> tuple[list[ServingPlan], str | None]:
    """Plans splits of all devices into replicas, with every cache.

    Args:
        tensor: devices of a replica; None: each number that divides the machine's.

    Returns:
        Plans that fit and are in time first, by tokens a second; then others that fit, by time per
        token; then those that need the fewest bytes. And why the last split that the model cannot
        have was refused.

    Raises:
        MaxlmError: the model cannot be served, or cannot be split so at all; but not for too little
            memory.
    """
    work, devices = read_workload(config, machine, options), machine.topology.devices
    plans: list[ServingPlan] = []
    refusal: MaxlmError | None = None
    splits = [tensor] if tensor else [n for n in range(1, devices + 1) if devices % n == 0]
    for split, cache in product(splits, caches):
        try:
            served = place_served_model(work, machine, options, split, cache)
        except MaxlmError as error:
            refusal = error
        else:
            plans.append(plan_served_model(served))
    if refusal and not plans:
        raise refusal
    return sorted(plans, key=_rank), refusal and str(refusal)


def count_replica_devices(mesh: MeshConfig, machine: Machine) -> int:
    """Counts the devices of each replica (``tensor``); ``data`` and ``fsdp`` count replicas.

    Raises:
        MaxlmError: another axis of the mesh splits something.
    """
    sizes = mesh_sizes(mesh, machine.topology.devices)
    others = [axis for axis in ("stage", "expert", "context") if sizes[axis] > 1]
    if others:
        what, fix = f"{others[0]} does not split what is served", "use data and tensor"
        raise MaxlmError(what, where="--mesh", fix=fix)
    return sizes["tensor"]
