"""What every request passes before its route, as plain ASGI so that streams are not held up.

From the outside in: `Envelope` (request id, timing, errors of everything inside it, draining), `Admission` (the key,
its rate and its concurrency), `BodyLimit`, then `serve.api.idempotency`.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory.database import Database
from memory.records import new_id
from serve import metrics
from serve.api.auth import Keyring
from serve.api.errors import BusyError, DrainingError, reply_to
from serve.api.idempotency import Idempotency
from serve.settings import ServerConfig

FREE = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json", "/", "/dashboard"})
"""Paths that need no key and are answered while the service drains."""

UPLOAD = ("POST", "/v1/files")
SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
MB = 1024 * 1024
DISCARD_S = 10.0


@dataclass
class Gate:
    """The requests that are inside, and whether further ones are let in."""

    inside: int = 0
    draining: bool = False


def install(app: FastAPI, gate: Gate, keyring: Keyring, database: Database, config: ServerConfig) -> None:
    """Put the layers around the app; the last one added is the outermost."""
    app.add_middleware(Idempotency, database=database, keep_s=config.idempotency_s)
    app.add_middleware(BodyLimit, body_mb=config.max_body_mb, upload_mb=config.max_upload_mb)
    app.add_middleware(Admission, keyring=keyring, open_metrics=config.open_metrics)
    app.add_middleware(Envelope, gate=gate)
    app.add_middleware(metrics.Metered)


class Envelope:
    """`x-request-id` and `openai-processing-ms` on every reply; whatever is raised inside becomes OpenAI's error."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else new_id("req")
        ours = {"x-request-id": request_id}
        scope.setdefault("state", {}).update(request_id=request_id, reply_headers=ours)
        begun = False

        async def stamped(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                ours["openai-processing-ms"] = str(round((time.perf_counter() - started) * 1000))
                MutableHeaders(scope=message).update(ours)
            await send(message)

        try:
            await self._counted(scope, receive, stamped)
        except ClientDisconnect:
            return
        except Exception as exc:
            if begun:
                raise
            await reply_to(exc, f"{scope['method']} {scope['path']} ({request_id})")(scope, receive, stamped)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in FREE:
            await self._app(scope, receive, send)
            return
        if self._gate.draining:
            raise DrainingError("the service is shutting down; try again in a few seconds")
        self._gate.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.inside -= 1


@dataclass
class _Usage:
    """What a key has used: the rest of its bucket of requests as of `at`, and its requests inside."""

    left: float
    at: float = field(default_factory=time.monotonic)
    inside: int = 0


class Admission:
    """Knows the caller, and holds each key to its requests per minute and its requests at once."""

    def __init__(self, app: ASGIApp, keyring: Keyring, open_metrics: bool = False) -> None:
        self._app = app
        self._keyring = keyring
        self._open_metrics = open_metrics
        self._usage: dict[str, _Usage] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE or metrics.is_open(scope, self._open_metrics):
            await self._app(scope, receive, send)
            return
        caller = await self._keyring.caller(Headers(scope=scope).get("authorization"))
        scope["state"]["caller"] = caller
        if caller.requests_per_minute is None and caller.max_concurrent is None:
            await self._app(scope, receive, send)
            return
        usage = self._usage.setdefault(caller.key_id, _Usage(left=caller.requests_per_minute or 0))
        if caller.requests_per_minute is not None:
            # Not by a `send` of its own: refusals further in must carry them too.
            scope["state"]["reply_headers"].update(_spend(usage, caller.requests_per_minute))
            if usage.left < 0:
                usage.left += 1
                said = f"the key {caller.name!r} has used its {caller.requests_per_minute} requests per minute"
                seconds = math.ceil((1 - usage.left) * 60 / caller.requests_per_minute)
                raise BusyError(said, seconds, code="rate_limit_exceeded")
        if caller.max_concurrent is not None and usage.inside >= caller.max_concurrent:
            said = f"the key {caller.name!r} has {usage.inside} requests running, its limit; wait for one to end"
            raise BusyError(said, 1, code="concurrency_limit_exceeded")
        usage.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            usage.inside -= 1


def _spend(usage: _Usage, limit: int) -> dict[str, str]:
    """Take one request from the key's bucket, which holds less than nothing if there was none; what to say of it."""
    now = time.monotonic()
    usage.left = min(limit, usage.left + (now - usage.at) * limit / 60) - 1
    usage.at = now
    left = max(usage.left, 0)
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(int(left)),
        "x-ratelimit-reset-requests": _duration((limit - left) * 60 / limit),
    }


def _duration(seconds: float) -> str:
    """As OpenAI writes them: `120ms`, `7s`, `1m30s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class BodyLimit:
    """Refuses bodies above the limit with 413, before a route sees them where their length is announced."""

    def __init__(self, app: ASGIApp, body_mb: int, upload_mb: int) -> None:
        self._app = app
        self._body_mb = body_mb
        self._upload_mb = upload_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_mb = self._upload_mb if (scope["method"], scope["path"]) == UPLOAD else self._body_mb
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit_mb * MB:
            if "expect" not in headers:
                await _discard(receive)
            raise _too_large(limit_mb)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit_mb * MB:
                if message.get("more_body"):
                    await _discard(receive)
                raise _too_large(limit_mb)
            return message

        await self._app(scope, counted, send)


async def _discard(receive: Receive) -> None:
    """Read on for a while: a connection closed in the middle of a body would take the reply with it."""
    try:
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        return


def _too_large(limit_mb: int) -> HTTPException:
    # An HTTPException because FastAPI turns anything else that reading a body raises into a 400. Some of the
    # body may be unread still, so the connection cannot be used again.
    return HTTPException(413, f"the request body is larger than {limit_mb} MB", {"Connection": "close"})
