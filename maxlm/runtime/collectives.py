"""Collectives of small host values: what the processes of a run tell each other."""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.runtime.signals import StopRequest

Result = TypeVar("Result")


def all_gather_json(value: object) -> list[Any]:
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
        json.loads(text_row[:length].tobytes())
        for text_row, length in zip(rows, lengths, strict=True)
    ]


def broadcast_from_process_0(value: object) -> Any:
    """Returns process 0's JSON value on every process."""
    return all_gather_json(value if jax.process_index() == 0 else None)[0]


def raise_on_all_hosts(function: Callable[[], Result]) -> Result:
    """Calls ``function`` on every process; if it raises a MaxlmError on one, all raise:
    their own, else another's, of the same class."""
    result: Result | None = None
    local_error = None
    local_fields = None
    try:
        result = function()
    except MaxlmError as error:
        local_error = error
        local_fields = [type(error).__name__, error.message, error.where, error.fix]
    # All processes meet here, those whose call failed too: else the others would wait.
    fields_by_process = all_gather_json(local_fields)
    if local_error is not None:
        raise local_error
    for process, fields in enumerate(fields_by_process):
        if fields is not None:
            name, message, where, fix = fields
            subclasses = {kind.__name__: kind for kind in MaxlmError.__subclasses__()}
            error_class = subclasses.get(name, MaxlmError)
            message = f"process {process}: {message}"
            raise error_class(message, where=where, fix=fix)
    return cast(Result, result)


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
        # A row for each device, an entry for each flag.
        self._shape = (mesh.size, len(StopRequest))
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(lambda rows: jnp.max(rows, axis=0))

    def start(self, request: StopRequest) -> StopRequest | jax.Array:
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

    def finish(self, started: StopRequest | jax.Array) -> StopRequest:
        """Waits for the step and returns the union of all processes' requests."""
        if isinstance(started, StopRequest):  # of the only process
            return started
        are_set = np.asarray(started.addressable_data(0))
        union = StopRequest.NONE
        for flag, is_set in zip(StopRequest, are_set, strict=True):
            if is_set:
                union |= flag
        return union
