"""Names of formats that mean none."""

from collections.abc import Sequence
from difflib import get_close_matches

from maxlm.config.errors import MaxlmError


def build_name_error(name: str, known: Sequence[str]) -> MaxlmError:
    """Returns the error that there is no format of that name, which suggests one of the
    known."""
    near = get_close_matches(name, known, n=1)
    if near:
        fix = f"did you mean {near[0]}?"
    else:
        fix = f"use one of {', '.join(known)}"
    return MaxlmError(f"no weight format of format={name}", fix=fix)
