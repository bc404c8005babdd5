"""Server-sent events over HTTP: a stream that stops its work within a second of the client's hanging up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

T = TypeVar("T")
POLL_S = 0.5
"""How often a silent client is looked at."""

GRACE_S = 0.5
"""How long a stream's status line waits for the first event, so that a quick refusal has a status of its own."""


class EventStream(StreamingResponse):
    """`text/event-stream` whose source is closed, not left to the garbage collector, however it ends."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # pyright: ignore[reportArgumentType]
            await super().stream_response(send)


async def begun(events: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same events, of which the first was waited for a moment: an error that comes at once is raised here."""
    first: asyncio.Future[T] = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
    try:
        await asyncio.wait({first}, timeout=GRACE_S)
    except asyncio.CancelledError:
        await _stop(first, events)
        raise
    if first.done() and isinstance(error := first.exception(), Exception) and not isinstance(error, StopAsyncIteration):
        await _stop(first, events)
        raise error
    return _rest(first, events)


async def _rest(first: asyncio.Future[T], events: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        try:
            yield await first
        except StopAsyncIteration:
            return
        async for event in events:
            yield event
    finally:
        await _stop(first, events)


async def _stop(first: asyncio.Future[T], events: AsyncIterator[T]) -> None:
    first.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await first
    await events.aclose()  # type: ignore[attr-defined]


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, cancelled within a second once the client has hung up (then None)."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                return None
    finally:
        if not task.done():
            task.cancel()
