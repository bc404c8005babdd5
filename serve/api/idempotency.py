"""`Idempotency-Key` on every POST: the same key and request give the stored status and body, another request 409.

The key is claimed for its request before the route runs, and the answer is stored before it is sent. Answers that
another try may change (401, 403, 408, 409, 429, 5xx, a hung-up client) are not stored. A stream is not either: its
route runs again and replays what it stored. A duplicate waits for the first one, `WAIT_S` at most, then gets 409.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import IO

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory import replies
from memory.database import Database
from memory.errors import ConfigError, LedgerError
from memory.replies import Reply
from serve.api.auth import ANYBODY
from serve.api.errors import IdempotencyInProgressError, IdempotencyKeyReusedError, reply_to

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
MAX_KEY = 255
WAIT_S = 60.0
IN_MEMORY = 1024 * 1024
"""Bytes of a body that are kept in memory while it is read; the rest goes to a temporary file."""

CHUNK = 64 * 1024
NOT_KEPT = frozenset({401, 403, 408, 409, 429, 499})


@dataclass
class _Open:
    """A key whose request is being answered."""

    fingerprint: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Idempotency:
    """The layer around the routes. One process answers for a ledger, so running requests are known to it alone."""

    def __init__(self, app: ASGIApp, database: Database, keep_s: int) -> None:
        self._app = app
        self._database = database
        self._keep_s = keep_s
        self._open: dict[tuple[str, str], _Open] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self._app(scope, receive, send)
            return
        if not 1 <= len(key) <= MAX_KEY:
            raise ConfigError(f"Idempotency-Key: expected 1 to {MAX_KEY} characters, got {len(key)}")
        tenant = scope["state"].get("caller", ANYBODY).tenant
        with SpooledTemporaryFile(max_size=IN_MEMORY) as body:
            fingerprint = await _read(scope, receive, body)
            async with self._turn((tenant, key), fingerprint):
                standing = await asyncio.to_thread(
                    replies.claim, self._database, tenant, key, fingerprint, self._keep_s
                )
                if standing.fingerprint != fingerprint:
                    raise IdempotencyKeyReusedError("this Idempotency-Key was used with another request")
                if standing.status is not None:
                    await _replay(standing)(scope, receive, send)
                    return
                body.seek(0)
                await self._app(scope, _from_file(body, receive), self._keeping(scope, receive, send, standing, key))

    @asynccontextmanager
    async def _turn(self, name: tuple[str, str], fingerprint: str) -> AsyncIterator[None]:
        """One request of a key at a time."""
        standing = self._open.setdefault(name, _Open(fingerprint))
        if standing.fingerprint != fingerprint:
            raise IdempotencyKeyReusedError("this Idempotency-Key is being used with another request")
        standing.users += 1
        try:
            try:
                async with asyncio.timeout(WAIT_S):
                    await standing.lock.acquire()
            except TimeoutError:
                said = "a request with this Idempotency-Key is still being answered; try again later"
                raise IdempotencyInProgressError(said) from None
            try:
                yield
            finally:
                standing.lock.release()
        finally:
            standing.users -= 1
            if not standing.users:
                del self._open[name]

    def _keeping(self, scope: Scope, receive: Receive, send: Send, claimed: Reply, key: str) -> Send:
        """A `send` that stores the whole answer before the first byte of it leaves."""
        begin: Message = {}
        parts: list[bytes] = []
        passing = False

        async def kept(message: Message) -> None:
            nonlocal begin, passing
            if message["type"] == "http.response.start":
                begin, passing = message, not _is_kept(message)
            elif not passing and message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                whole = b"".join(parts)
                answer = claimed.model_copy(
                    update={
                        "status": begin["status"],
                        "content_type": Headers(raw=begin["headers"]).get("content-type", ""),
                        "body": whole.decode(),
                    }
                )
                tenant = scope["state"].get("caller", ANYBODY).tenant
                try:
                    await asyncio.to_thread(replies.keep, self._database, tenant, key, answer)
                except LedgerError as exc:
                    await reply_to(exc)(scope, receive, send)
                    return
                await send(begin)
                await send({"type": "http.response.body", "body": whole})
            if passing:
                await send(message)

        return kept


def _is_kept(begin: Message) -> bool:
    status, headers = begin["status"], Headers(raw=begin["headers"])
    if status >= 500 or status in NOT_KEPT or "no-store" in headers.get("cache-control", ""):
        return False
    return headers.get("content-type", "").startswith("application/json")


def _replay(stored: Reply) -> Response:
    headers = {"content-type": stored.content_type, REPLAYED: "true"}
    return Response(stored.body, stored.status or 200, headers=headers)


async def _read(scope: Scope, receive: Receive, into: IO[bytes]) -> str:
    """Read the body into the file; the fingerprint of path and body."""
    digest = hashlib.sha256(f"{scope['path']}?{scope['query_string'].decode('latin-1')}\n".encode())
    boundary = _boundary(Headers(scope=scope).get("content-type", ""))
    rest = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        into.write(chunk)
        if boundary:
            # A client draws a new boundary for every try; it may lie across two chunks.
            chunk = (rest + chunk).replace(boundary, b"")
            rest = chunk[-len(boundary) :]
            chunk = chunk[: -len(boundary)]
        digest.update(chunk)
        if not message.get("more_body"):
            digest.update(rest)
            return digest.hexdigest()


def _boundary(content_type: str) -> bytes:
    kind, _, parameters = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        return b""
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "boundary":
            return value.strip('"').encode("latin-1")
    return b""


def _from_file(body: IO[bytes], receive: Receive) -> Receive:
    """The body once more, then whatever else the connection says (that the client has gone)."""
    ended = False

    async def reread() -> Message:
        nonlocal ended
        if ended:
            return await receive()
        chunk = body.read(CHUNK)
        ended = len(chunk) < CHUNK
        return {"type": "http.request", "body": chunk, "more_body": not ended}

    return reread
