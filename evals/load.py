"""A closed-loop load generator: so many connections, each with one request under way at a time.

Own HTTP over asyncio, because a client library takes more of a small machine than the gateways that it measures.
`python -m evals.load` reads a `Load` as JSON on stdin and prints a `LoadResult`: a process of its own,
so that the measured service and the clock do not share an interpreter.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

COUNTER = "{i}"
"""In the body's text: replaced by the request's number, so that no two requests are the same."""

PATIENCE_S = 60.0


class Load(BaseModel):
    """What to send, and how much of it at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = Field(default_factory=dict)
    body: dict[str, Any]
    concurrency: int = Field(ge=1)
    requests: int = Field(ge=1)


class LoadResult(BaseModel):
    """How long each request took, first byte sent to last byte read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latencies_s: list[float]
    seconds: float
    bad: int
    """Replies other than 200, among the latencies too."""
    first_bad: str = ""


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; `share` in 0..1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._received = bytearray()
        self._done: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def send(self, message: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """(status, body) of the reply to come."""
        assert self._transport is not None
        self._received.clear()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._done is None or self._done.done():
            return
        head = bytes(self._received[:end]).lower()
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            length = int(head[at + 17 :].split(b"\r\n", 1)[0])
            finished = len(self._received) >= end + 4 + length
        else:
            finished = self._received.endswith(b"0\r\n\r\n")
        if finished:
            self._done.set_result((int(head.split(b" ", 2)[1]), bytes(self._received[end + 4 :])))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the connection was closed before the reply"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def run(load: Load) -> LoadResult:
    """Send it all; OSError when a connection breaks or nothing listens."""
    numbers = iter(range(load.requests))
    latencies: list[float] = []
    bad: list[str] = []
    text = json.dumps(load.body)
    named = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())

    def message(i: int) -> bytes:
        body = text.replace(COUNTER, str(i)).encode()
        head = f"POST {load.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{named}"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def worker() -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", load.port)
        try:
            for i in numbers:
                sent = message(i)
                began = time.perf_counter()
                status, body = await asyncio.wait_for(connection.send(sent), PATIENCE_S)
                latencies.append(time.perf_counter() - began)
                if status != 200:
                    bad.append(f"{status}: {body[:300].decode(errors='replace')}")
        finally:
            connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(load.concurrency)))
    seconds = time.perf_counter() - began
    return LoadResult(latencies_s=latencies, seconds=seconds, bad=len(bad), first_bad=bad[0] if bad else "")


if __name__ == "__main__":
    given = Load.model_validate_json(sys.stdin.read())
    try:
        import uvloop

        print(uvloop.run(run(given)).model_dump_json())
    except ImportError:
        print(asyncio.run(run(given)).model_dump_json())
