"""The load generator and the fake upstream, each as the other's partner; the upstream also as our engine client's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from agent.engine_client import EngineClient
from agent.llm import ChatReply, ChatRequest
from evals import upstream
from evals.load import Load, LoadResult, percentile, run

ASKED = {"model": "base", "messages": [{"role": "user", "content": "Question {i}"}]}


@dataclass
class At:
    """An endpoint that is up."""

    base_url: str
    api_key: str = "key"

    async def wait_ready(self, timeout: float) -> None:
        return None


async def loaded(latency_s: float, **load: Any) -> LoadResult:
    server = await upstream.serve(0, latency_s, key="key")
    async with server:
        port = server.sockets[0].getsockname()[1]
        given = {"headers": {"Authorization": "Bearer key"}, "body": ASKED, "concurrency": 4, "requests": 10} | load
        return await run(Load(port=port, **given))


def test_every_request_is_sent_once_and_timed() -> None:
    done = asyncio.run(loaded(0.02))
    assert len(done.latencies_s) == 10
    assert done.bad == 0
    assert min(done.latencies_s) >= 0.019
    assert done.seconds >= 3 * 0.019


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"headers": {}}, "401"), ({"path": "/v1/nothing"}, "404"), ({"body": {**ASKED, "model": "gpt"}}, "404")],
)
def test_replies_that_are_no_success_are_counted_and_shown(wrong: dict[str, Any], said: str) -> None:
    done = asyncio.run(loaded(0.0, **wrong))
    assert done.bad == 10
    assert done.first_bad.startswith(said)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7


def test_our_engine_client_can_speak_with_the_upstream() -> None:
    async def both() -> tuple[ChatReply, list[str | ChatReply]]:
        server = await upstream.serve(0, 0.0, key="key")
        async with server:
            client = EngineClient(At(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
            try:
                acting = ChatRequest("base", [{"role": "user", "content": "Act"}], regex="Action: .*")
                streamed = ChatRequest("base", [{"role": "user", "content": "Speak"}])
                return await client.complete(acting), [piece async for piece in client.stream(streamed)]
            finally:
                await client.close()

    whole, pieces = asyncio.run(both())
    assert whole.text == upstream.ACTION
    assert whole.token_ids is not None
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == upstream.REPLY
    last = pieces[-1]
    assert isinstance(last, ChatReply)
    assert last.completion_tokens == len(upstream.REPLY.split())
