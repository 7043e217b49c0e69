"""What an error says."""

from typing import Any

import pytest

from maxlm.config import MaxlmError


def message(call: Any, *args: Any, **how: Any) -> str:
    """Return the one line of the error that a call ends with."""
    with pytest.raises(MaxlmError) as error:
        call(*args, **how)
    text = str(error.value)
    assert "\n" not in text
    return text
