"""Errors of the API, in OpenAI's form."""

import traceback
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from maxlm.config import MaxlmError

_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "service_unavailable"),
}
_TYPE_NAMES = frozenset(("str", "int", "Tool"))


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is refused or fails: the HTTP status and what the client is
    told."""

    status: int
    message: str
    param: str | None = None
    """The field of the request that is at fault."""
    code: str | None = None
    """A word that programs compare; by default the status's own."""
    retry_after: int | None = None
    """Seconds after which to try again."""

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"error": {message, type, param, code}}``."""
        kind, usual_code = _KINDS.get(self.status, ("invalid_request_error", None))
        names = {"type": kind, "param": self.param, "code": self.code or usual_code}
        return {"error": {"message": self.message, **names}}


def convert_error(error: Exception) -> ApiError:
    """Returns what a client is told of an error: a user's mistake is a 400. One of ours
    is printed with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _convert_validation_error(error)
    if isinstance(error, MaxlmError):
        return ApiError(400, " ".join(str(error).split()))
    traceback.print_exception(error)
    return ApiError(500, f"internal error ({type(error).__name__})")


def _convert_validation_error(error: ValidationError) -> ApiError:
    """Names one fault: where several types are allowed, of a value that has one of
    them, or else the deepest, which is that of the type that was meant."""
    faults = error.errors(include_url=False, include_context=False)
    fault = max(
        faults, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"]))
    )
    path = [
        str(part) for part in fault["loc"]
    ]  # with members of unions, such as "list[int]"
    fields = [
        part
        for part in path
        if part.replace("_", "").isalnum() and part not in _TYPE_NAMES
    ]
    name, text = ".".join(fields)[:300], fault["msg"][:300]
    if fault["type"] == "json_invalid":
        text = f"the body is no JSON: {text}"
    return ApiError(400, f"{name}: {text}" if name else text, param=name or None)
