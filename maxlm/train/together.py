"""What the processes of a run tell each other between steps."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from maxlm.config import MaxlmError

Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of their numbers. All processes call it together."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    row = np.zeros(int(lengths.max()), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(row)
    return [json.loads(each[:length].tobytes()) for each, length in zip(rows, lengths, strict=True)]


def lead_says(value: Any) -> Any:
    """Process 0's JSON value, on all."""
    return gather(value if jax.process_index() == 0 else None)[0]


def all_or_none(work: Callable[[], Result]) -> Result:
    """What ``work`` returns, if it went well on all processes; else its error on all of them.

    Raises:
        MaxlmError: this process's own, else another's, of the same kind.
    """
    result, own = None, None
    try:
        result = work()
    except MaxlmError as error:
        own = error
    told = gather(own and [type(own).__name__, own.what, own.where, own.fix])
    if own is not None:
        raise own
    for process, each in enumerate(told):
        if each is not None:
            kind, what, where, fix = each
            kinds = {one.__name__: one for one in MaxlmError.__subclasses__()}
            raise kinds.get(kind, MaxlmError)(f"process {process}: {what}", where=where, fix=fix)
    return result  # type: ignore[return-value]
