"""Errors as clients of OpenAI's API expect them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi.responses import JSONResponse

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Of an error, by its status; others are the request's (400 to 499) or the server's (500 and above)."""


@dataclass
class APIError(Exception):
    """A request that gets no answer. message: one line. param: the field at fault. code: a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def queue_full() -> APIError:
    message = "the server has too many requests; try again soon"
    return APIError(429, message, code="queue_full", headers={"Retry-After": "1"})


def closing() -> APIError:
    return APIError(503, "the server is shutting down", code="shutting_down")


def failed() -> APIError:
    return APIError(500, "the decoder failed on this request; the server's log says why", code="decoder_failed")
