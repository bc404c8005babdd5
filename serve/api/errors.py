"""Our errors as HTTP: OpenAI's body `{"error": {message, type, param, code}}` and its status codes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memory.errors import (
    ConfigError,
    ConflictError,
    ContextLengthError,
    EngineError,
    ModelError,
    ModelUnavailableError,
    NightschoolError,
    NotEnoughExperienceError,
    NotFoundError,
    UnknownModelError,
    VerifierError,
)

log = logging.getLogger(__name__)


class BusyError(NightschoolError):
    """More is waiting than the service takes on; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FieldError(ConfigError):
    """A request's field is unusable; `param` names it, `code` is OpenAI's where there is one."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class TooLargeError(NightschoolError):
    """The request's body is larger than the service takes."""


_STATUS: dict[type[NightschoolError], tuple[int, str, str | None]] = {
    BusyError: (429, "rate_limit_error", "server_busy"),
    ConfigError: (400, "invalid_request_error", None),
    VerifierError: (400, "invalid_request_error", "invalid_verifier"),
    TooLargeError: (413, "invalid_request_error", "request_too_large"),
    NotFoundError: (404, "invalid_request_error", "not_found"),
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    ConflictError: (409, "invalid_request_error", "conflict"),
    NotEnoughExperienceError: (400, "invalid_request_error", "not_enough_experience"),
    ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    ModelUnavailableError: (503, "server_error", "engine_unavailable"),
    EngineError: (503, "server_error", "engine_unavailable"),
    ModelError: (400, "invalid_request_error", "model_refused"),
}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: NightschoolError) -> tuple[int, dict[str, Any]]:
    """Status and body of an expected error; anything without a row is 500."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            status, name, code = _STATUS[kind]
            param, own_code = getattr(error, "param", None), getattr(error, "code", None)
            return status, error_body(str(error), name, param, own_code or code)
    return 500, error_body(str(error), "server_error")


def invalid_body(errors: Sequence[Any]) -> dict[str, Any]:
    """The first of Pydantic's errors as OpenAI's body, naming the field."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "this field is not supported"
    return error_body(f"{param}: {said}" if param else said, "invalid_request_error", param)


def install(app: FastAPI) -> None:
    """Every error of the app leaves in OpenAI's shape; none shows a stack trace."""

    @app.exception_handler(NightschoolError)
    async def _expected(_request: Request, exc: NightschoolError) -> JSONResponse:
        status, body = describe(exc)
        seconds = exc.retry_after if isinstance(exc, BusyError) else 10 if status == 503 else None
        return JSONResponse(body, status, headers={"Retry-After": str(seconds)} if seconds else None)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, exc: RequestValidationError) -> JSONResponse:
        return JSONResponse(invalid_body(exc.errors()), 400)

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, exc: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(exc.detail), "invalid_request_error"), exc.status_code, headers=exc.headers)

    @app.exception_handler(Exception)
    async def _bug(request: Request, exc: Exception) -> JSONResponse:
        log.exception("unexpected error in %s %s", request.method, request.url.path, exc_info=exc)
        return JSONResponse(error_body("internal error; the service's log has the details", "server_error"), 500)
