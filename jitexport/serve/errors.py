"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jitexport.errors import InputError, JitExportError, NumericalError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """An answer that is no image.

    Attributes:
        status: of HTTP.
        message: what arrived, what was expected, and what to do.
        code: for programs.
        param: the field that it is about; None for none.
        headers: further ones.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:  # between processes; an Exception's own would lose the fields
        return ApiError, (self.status, self.message, self.code, self.param, self.headers)

    def body(self) -> dict[str, Any]:
        """What is answered."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be taken."""
    return ApiError(400, message, code, param)


def overloaded(seconds: float, waiting: int) -> ApiError:
    """The queue is full.

    Args:
        seconds: until there will be room, estimated.
        waiting: images.
    """
    after = max(1, round(seconds))
    return ApiError(
        503, f"the queue is full: {waiting} images wait; try again in about {after} s", "overloaded",
        headers={"Retry-After": str(after)},
    )


def stopping() -> ApiError:
    """The server takes no more work."""
    return ApiError(503, "the server is shutting down; ask another one", "stopping", headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    """A request took too long."""
    return ApiError(504, f"the request was not done within {seconds:g} s", "timeout", headers={"Retry-After": "5"})


def of_failure(error: BaseException) -> ApiError:
    """What is told of an exception in the middle of the work: of those that nobody foresaw, nothing but that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return invalid(None, " ".join(line.strip() for line in str(error).splitlines()))
    if isinstance(error, NumericalError):
        return ApiError(500, f"{error.message}; try usual values of guidance_scale and lora_scale", "not_finite")
    if isinstance(error, JitExportError):
        return ApiError(500, f"the server could not do it: {error.message}", type(error).__name__)
    return ApiError(500, "the server failed; its log says how", "internal_error")
