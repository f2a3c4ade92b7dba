"""Errors as OpenAI's API has them, with the statuses that its clients tell apart.

400  malformed JSON, a field that is unknown, of a wrong type or out of range, a long prompt
401  no key, or a wrong one
404  no such model or path
413  a body that is too large
422  an image that cannot be fetched or read
429  more requests, or bodies, than the server takes; Retry-After says when to come again
431  headers that are too large
500  the engine failed
503  the server is shutting down
"""

from __future__ import annotations

from vlmforge.errors import (
    CancelledError,
    ConfigError,
    ContextLengthError,
    ImageError,
    PipelineError,
    PromptError,
    QueueFullError,
    RequestTimeoutError,
    VlmforgeError,
    as_ours,
)

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is refused, or failed.

    Attributes:
        status: Of HTTP.
        message: For a person: what was found, what was expected, what to do.
        code: Short name of the error.
        param: The field of the body that it is about.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        self.status, self.message = status, message
        self.code, self.param = code, param
        super().__init__(message)

    @property
    def body(self) -> dict[str, object]:
        """The JSON body of the response, or of the `error` event of a stream."""
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def api_error(error: BaseException) -> ApiError:
    """What a client is told about `error`."""
    if isinstance(error, ApiError):
        return error
    ours = as_ours(error)
    return ApiError(_status(ours), str(ours), ours.code)


def refused(
    status: int, summary: str, *, found: str, expected: str, fix: str, param: str | None = None
) -> ApiError:
    """A problem in our words."""
    text = str(VlmforgeError(summary, found=found, expected=expected, fix=fix))
    code = {401: "invalid_api_key", 404: "not_found", 413: "body_too_large", 429: "queue_full"}
    return ApiError(status, text, code.get(status, "invalid_request"), param)


def _status(error: VlmforgeError) -> int:
    if isinstance(error, ImageError):
        return 422
    if isinstance(error, ConfigError | PromptError | ContextLengthError):
        return 400
    if isinstance(error, QueueFullError):
        return 429
    if isinstance(error, CancelledError | PipelineError | RequestTimeoutError):
        return 503
    return 500
