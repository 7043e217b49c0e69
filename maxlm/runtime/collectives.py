"""Collectives of small host values: what the processes of a run tell each other."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.runtime.signals import StopRequest

Result = TypeVar("Result")


def all_gather_json(value: Any) -> list[Any]:
    """Gathers every process's JSON value, in process order. All processes call it
    together."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = process_allgather(np.int32(len(text)))
    row = np.zeros(int(lengths.max()), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = process_allgather(row)
    return [
        json.loads(each[:length].tobytes())
        for each, length in zip(rows, lengths, strict=True)
    ]


def broadcast_from_process_0(value: Any) -> Any:
    """Returns process 0's JSON value on every process."""
    return all_gather_json(value if jax.process_index() == 0 else None)[0]


def raise_on_all_hosts(function: Callable[[], Result]) -> Result:
    """Calls ``function`` on every process; if it raises a MaxlmError on one, all raise:
    their own, else another's, of the same class."""
    result, own = None, None
    try:
        result = function()
    except MaxlmError as error:
        own = error
    errors = all_gather_json(
        own and [type(own).__name__, own.message, own.where, own.fix]
    )
    if own is not None:
        raise own
    for process, each in enumerate(errors):
        if each is not None:
            name, message, where, fix = each
            classes = {one.__name__: one for one in MaxlmError.__subclasses__()}
            raise classes.get(name, MaxlmError)(
                f"process {process}: {message}", where=where, fix=fix
            )
    return result  # type: ignore[return-value]


def run_on_process_0(function: Callable[[], Any]) -> Any:
    """Calls ``function`` on process 0; returns its JSON value, or raises its
    MaxlmError, on all."""
    result = raise_on_all_hosts(
        lambda: function() if jax.process_index() == 0 else None
    )
    return broadcast_from_process_0(result)


class FlagAllReduce:
    """Combines every process's :class:`StopRequest` at a step, without waiting for it.

    A signal may reach one process before a step and another after it. So each process
    reports its request with every step, and all act on the union of the requests
    reported at that step: a maximum over the mesh, queued behind the step itself.
    """

    def __init__(self, mesh: Mesh):
        self._is_local = jax.process_count() == 1
        self._mesh = mesh
        self._shape = mesh.size, len(StopRequest)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(lambda rows: jnp.max(rows, axis=0))

    def start(self, request: StopRequest) -> Any:
        """Starts the reduction of this process's request; returns what :meth:`finish`
        takes."""
        if self._is_local:
            return request
        row = np.array([[flag in request for flag in StopRequest]], np.int32)
        with jax.set_mesh(self._mesh):
            rows = jax.make_array_from_callback(
                self._shape, self._sharding, lambda _: row
            )
            return self._maximum(rows)

    def finish(self, started: Any) -> StopRequest:
        """Waits for the step and returns the union of all processes' requests."""
        if self._is_local:
            return started
        flags = zip(StopRequest, np.asarray(started.addressable_data(0)), strict=True)
        return StopRequest(sum(flag for flag, is_set in flags if is_set))
