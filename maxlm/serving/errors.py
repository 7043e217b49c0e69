"""Errors of the API, in OpenAI's form."""

import traceback
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from maxlm.config import MaxlmError
from maxlm.runtime.json_types import JsonObject

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

    def to_json(self) -> JsonObject:
        """Returns ``{"error": {message, type, param, code}}``."""
        kind, usual_code = _KINDS.get(self.status, ("invalid_request_error", None))
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code or usual_code,
            }
        }


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

    def rank(fault: ErrorDetails) -> tuple[bool, int]:
        is_value_fault = not fault["type"].endswith("_type")
        return is_value_fault, len(fault["loc"])

    fault = max(faults, key=rank)
    # The path names members of unions too, such as "list[int]".
    path = [str(part) for part in fault["loc"]]
    fields = [
        part
        for part in path
        if part.replace("_", "").isalnum() and part not in _TYPE_NAMES
    ]
    name = ".".join(fields)[:300]
    message = fault["msg"][:300]
    if fault["type"] == "json_invalid":
        message = f"the body is no JSON: {message}"
    if name:
        return ApiError(400, f"{name}: {message}", param=name)
    return ApiError(400, message)
