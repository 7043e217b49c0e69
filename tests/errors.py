"""What an error says."""

from collections.abc import Callable
from typing import ParamSpec

import pytest

from maxlm.config import MaxlmError

P = ParamSpec("P")


def message(function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> str:
    """Return the one line of the error that a call ends with."""
    with pytest.raises(MaxlmError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text
