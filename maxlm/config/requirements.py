"""Conditions on sizes, written once: checked for one run, or asked of very many candidates."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from maxlm.config.errors import MaxlmError


class Requirement(NamedTuple):
    """A condition on sizes, and what is said where it is not met."""

    is_met: Any
    """A bool; or an array of them, an element for every candidate."""
    error: Callable[[], MaxlmError]


def check_requirements(requirements: Iterable[Requirement]) -> None:
    """Raise the error of the first requirement that is not met."""
    for requirement in requirements:
        if not requirement.is_met:
            raise requirement.error()


def is_divisor(divisor: Any, number: Any) -> Any:
    """Return whether numbers are multiples of others."""
    return np.equal(np.mod(number, divisor), 0)
