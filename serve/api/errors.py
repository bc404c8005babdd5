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
    IndexUnavailableError,
    LedgerError,
    ModelError,
    ModelUnavailableError,
    NightschoolError,
    NotEnoughExperienceError,
    NotFoundError,
    UnknownModelError,
    VerifierError,
)
from serve.api.auth import InsufficientScopeError, InvalidKeyError

log = logging.getLogger(__name__)


class BusyError(NightschoolError):
    """More is asked than the service or the key takes on; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 5, *, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code


class DrainingError(NightschoolError):
    """The service is about to stop and takes nothing new on."""


class IdempotencyKeyReusedError(ConflictError):
    """The key stands for another request."""


class IdempotencyInProgressError(ConflictError):
    """The key's request has not been answered yet."""


class FieldError(ConfigError):
    """A request's field is unusable; `param` names it, `code` is OpenAI's where there is one."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


_STATUS: dict[type[NightschoolError], tuple[int, str, str | None]] = {
    InvalidKeyError: (401, "invalid_request_error", "invalid_api_key"),
    InsufficientScopeError: (403, "permission_error", "insufficient_scope"),
    BusyError: (429, "rate_limit_error", "server_busy"),
    DrainingError: (503, "server_error", "shutting_down"),
    LedgerError: (503, "server_error", "ledger_unavailable"),
    IndexUnavailableError: (503, "server_error", "index_unavailable"),
    ConfigError: (400, "invalid_request_error", None),
    VerifierError: (400, "invalid_request_error", "invalid_verifier"),
    NotFoundError: (404, "invalid_request_error", "not_found"),
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    ConflictError: (409, "invalid_request_error", "conflict"),
    IdempotencyKeyReusedError: (409, "invalid_request_error", "idempotency_key_reused"),
    IdempotencyInProgressError: (409, "invalid_request_error", "idempotency_in_progress"),
    NotEnoughExperienceError: (400, "invalid_request_error", "not_enough_experience"),
    ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    ModelUnavailableError: (503, "server_error", "engine_unavailable"),
    EngineError: (503, "server_error", "engine_unavailable"),
    ModelError: (400, "invalid_request_error", "model_refused"),
}


_HTTP_CODES = {405: "method_not_allowed", 413: "request_too_large"}


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


def reply_to(error: Exception, where: str = "") -> JSONResponse:
    """Any error as a reply. One that nobody expected is logged, with `where` it came up, and says nothing of itself."""
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code)
        body = error_body(str(error.detail), "invalid_request_error", None, code)
        return JSONResponse(body, error.status_code, headers=error.headers)
    if not isinstance(error, NightschoolError):
        log.error("unexpected error in %s", where, exc_info=error)
        return JSONResponse(error_body("internal error; the service's log has the details", "server_error"), 500)
    status, body = describe(error)
    headers: dict[str, str] = {}
    match error:
        case InvalidKeyError():
            headers = {"WWW-Authenticate": "Bearer"}
        case BusyError():
            headers = {"Retry-After": str(error.retry_after)}
        case IdempotencyInProgressError():
            headers = {"Retry-After": "5"}
        case DrainingError():
            headers = {"Retry-After": "10", "Connection": "close"}
        case _ if status == 503:
            headers = {"Retry-After": "10"}
    return JSONResponse(body, status, headers=headers)


def install(app: FastAPI) -> None:
    """Every error of the app leaves in OpenAI's shape; none shows a stack trace."""

    @app.exception_handler(NightschoolError)
    async def _expected(_request: Request, exc: NightschoolError) -> JSONResponse:
        return reply_to(exc)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, exc: RequestValidationError) -> JSONResponse:
        return JSONResponse(invalid_body(exc.errors()), 400)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, exc: HTTPException) -> JSONResponse:
        if exc.status_code == 404:
            said = f"unknown request URL: {request.method} {request.url.path}"
            return JSONResponse(error_body(said, "invalid_request_error", None, "unknown_url"), 404)
        return reply_to(exc)
