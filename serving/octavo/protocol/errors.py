"""The closed list of errors and the one table that maps each to HTTP, Triton and `error_code`.

    OctavoError
    ├── InvalidRequest   400   also ContextLengthExceeded (OpenAI code context_length_exceeded)
    ├── Unauthorized     401
    ├── NotFound         404
    ├── RequestTimeout   408
    ├── Conflict         409   the req_id is in flight
    ├── BodyTooLarge     413
    ├── QueueFull        429   Retry-After
    ├── Cancelled        499
    ├── InternalError    500   an id to find it in the log, never a traceback
    └── Unavailable      503   starting, draining or engine down; Retry-After

Raised anywhere, turned into an event or an answer at the edges. A message names the field, the value or its type, and
the limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorKind:
    """How one error looks on every wire."""

    status: int  # HTTP status and native error_code
    openai_type: str  # OpenAI's error.type
    triton: str  # Triton's status name
    retry_after: int | None = None  # seconds


KINDS: dict[int, ErrorKind] = {
    400: ErrorKind(400, "invalid_request_error", "INVALID_ARG"),
    401: ErrorKind(401, "authentication_error", "INVALID_ARG"),
    404: ErrorKind(404, "not_found_error", "NOT_FOUND"),
    408: ErrorKind(408, "timeout_error", "UNAVAILABLE"),
    409: ErrorKind(409, "conflict_error", "ALREADY_EXISTS"),
    413: ErrorKind(413, "invalid_request_error", "INVALID_ARG"),
    429: ErrorKind(429, "rate_limit_error", "UNAVAILABLE", retry_after=1),
    499: ErrorKind(499, "cancelled_error", "CANCELLED"),
    500: ErrorKind(500, "server_error", "INTERNAL"),
    503: ErrorKind(503, "service_unavailable_error", "UNAVAILABLE", retry_after=2),
}


class OctavoError(Exception):
    """An error that a user sees. `status` is a key of KINDS."""

    status = 500

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field  # the request field at fault
        self.code = code  # OpenAI's error.code

    @property
    def kind(self) -> ErrorKind:
        return KINDS[self.status]

    def as_native(self, req_id: str | None = None) -> dict[str, object]:
        """The native error object; `code` and `field` only if known."""
        out: dict[str, object] = {"error_msg": self.message, "error_code": self.status}
        if req_id is not None:
            out["req_id"] = req_id
        if self.field is not None:
            out["error_field"] = self.field
        if self.code is not None:
            out["error_type"] = self.code
        return out

    def as_openai(self) -> dict[str, object]:
        """OpenAI's error body."""
        error = {"message": self.message, "type": self.kind.openai_type, "param": self.field, "code": self.code}
        return {"error": error}


class InvalidRequest(OctavoError):
    status = 400


class ContextLengthExceeded(InvalidRequest):
    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message, field=field, code="context_length_exceeded")


class Unauthorized(OctavoError):
    status = 401


class NotFound(OctavoError):
    status = 404


class RequestTimeout(OctavoError):
    status = 408


class Conflict(OctavoError):
    status = 409


class BodyTooLarge(OctavoError):
    status = 413


class QueueFull(OctavoError):
    status = 429


class Cancelled(OctavoError):
    status = 499


class InternalError(OctavoError):
    status = 500


class Unavailable(OctavoError):
    status = 503


BY_STATUS: dict[int, type[OctavoError]] = {
    kind.status: kind
    for kind in (
        InvalidRequest,
        Unauthorized,
        NotFound,
        RequestTimeout,
        Conflict,
        BodyTooLarge,
        QueueFull,
        Cancelled,
        InternalError,
        Unavailable,
    )
}


def from_native(body: dict[str, object]) -> OctavoError:
    """The error that a native error object stands for; an unknown code counts as 500."""
    code = body.get("error_code")
    kind = BY_STATUS.get(code if isinstance(code, int) else 500, InternalError)
    field, openai_code = body.get("error_field"), body.get("error_type")
    return kind(
        str(body.get("error_msg", "")),
        field=field if isinstance(field, str) else None,
        code=openai_code if isinstance(openai_code, str) else None,
    )
