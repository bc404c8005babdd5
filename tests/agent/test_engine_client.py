"""Why our own engine is not called through LiteLLM, and that our client does what LiteLLM's stream does not.

What both must do is in `test_llm`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from agent.engine_client import EngineClient
from agent.llm import ChatReply, ChatRequest, LLMConfig
from memory.errors import ModelError, ModelUnavailableError
from tests.agent.fake_engine import FakeEngine, Refuses, Says

REQUEST = ChatRequest(model="m", messages=[{"role": "user", "content": "hi"}], sampling={"max_tokens": 9})
PATIENCE = LLMConfig(timeout_s=20, attempts=3, backoff_s=0)


async def litellm_stream(engine: FakeEngine) -> list[Any]:
    """The chunks of LiteLLM's own wrapper, without our seam around it."""
    from agent.llm import _litellm

    chunks = await _litellm().acompletion(
        model="hosted_vllm/m",
        messages=REQUEST.messages,
        stream=True,
        stream_options={"include_usage": True},
        api_base=engine.base_url,
        api_key="k",
        num_retries=0,
        max_retries=0,
        extra_body={"return_token_ids": True},
    )
    return [chunk async for chunk in chunks]


async def our_stream(engine: FakeEngine, request: ChatRequest = REQUEST) -> list[str | ChatReply]:
    client = EngineClient(engine, PATIENCE)
    try:
        return [item async for item in client.stream(request)]
    finally:
        await client.close()


def test_litellms_stream_drops_the_token_ids() -> None:
    with FakeEngine([Says(prompt_token_ids=(1, 2, 3), token_ids=(4, 5))]) as engine:
        chunks = asyncio.run(litellm_stream(engine))
    assert engine.requests[0]["return_token_ids"] is True
    said = json.dumps([chunk.model_dump() for chunk in chunks])
    assert "prompt_token_ids" not in said or "[1, 2, 3]" not in said


@pytest.mark.parametrize("done", [True, False])
def test_litellms_stream_makes_up_a_finish_reason_where_the_engine_broke_off(done: bool) -> None:
    with FakeEngine([Says(["hel"], finish=None, done=done)]) as engine:
        chunks = asyncio.run(litellm_stream(engine))
    assert "stop" in [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]


def test_our_stream_keeps_token_ids_and_log_probabilities() -> None:
    says = Says(["a", "b", "c"], prompt_token_ids=(1, 2, 3), token_ids=(4, 5, 6), logprobs=(-0.5, -0.25, -1))
    asked = replace(REQUEST, sampling={"logprobs": True})
    with FakeEngine([says]) as engine:
        *pieces, last = asyncio.run(our_stream(engine, asked))
    assert pieces == ["a", "b", "c"]
    assert isinstance(last, ChatReply)
    assert (last.prompt_token_ids, last.token_ids, last.completion_tokens) == ([1, 2, 3], [4, 5, 6], 3)
    assert last.logprob == pytest.approx(-1.75)
    assert [entry["logprob"] for entry in last.logprobs or []] == [-0.5, -0.25, -1]


def test_the_token_ids_of_a_long_prompt_fit_into_one_event() -> None:
    with FakeEngine([Says(prompt_token_ids=range(100_000))]) as engine:
        last = asyncio.run(our_stream(engine))[-1]
    assert isinstance(last, ChatReply)
    assert len(last.prompt_token_ids or []) == 100_000


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (Says(["hel"], in_band_error="EngineCore died"), ModelUnavailableError),
        (Says(["hel"], finish=None), ModelError),
        (Says(["hel"], finish=None, done=False), ModelError),
        (Says(["hel"], hang_up=True), ModelUnavailableError),
    ],
)
def test_our_stream_raises_what_breaks_it(broken: Says, kind: type[ModelError]) -> None:
    with FakeEngine([broken]) as engine, pytest.raises(kind) as caught:
        asyncio.run(our_stream(engine))
    assert broken.in_band_error is None or broken.in_band_error in str(caught.value)
    assert len(engine.requests) == 1, "a stream that began is not tried again"


def test_what_is_no_json_is_an_error() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        await writer.drain()

    async def story() -> None:
        async with engine_that(answer) as engine:
            await EngineClient(engine, PATIENCE).complete(REQUEST)

    with pytest.raises(ModelError, match="cannot be read"):
        asyncio.run(story())


def test_a_connection_serves_many_calls() -> None:
    async def story(engine: FakeEngine) -> set[str]:
        client = EngineClient(engine, PATIENCE)
        await asyncio.gather(*(client.complete(REQUEST) for _ in range(3)))
        for _ in range(3):
            await client.complete(REQUEST)
        await client.close()
        return set(engine.peers)

    with FakeEngine() as engine:
        assert len(asyncio.run(story(engine))) <= 3


def test_a_refusal_leaves_the_client_usable() -> None:
    async def story(engine: FakeEngine) -> str:
        client = EngineClient(engine, PATIENCE)
        with pytest.raises(ModelError):
            await client.complete(REQUEST)
        reply = await client.complete(REQUEST)
        await client.close()
        return reply.text

    with FakeEngine([Refuses(400), Says(["fine"])]) as engine:
        assert asyncio.run(story(engine)) == "fine"


@dataclass
class Place:
    """An `Endpoint`."""

    base_url: str
    api_key: str = "k"
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_ready(self, timeout: float) -> None:
        return None


@asynccontextmanager
async def engine_that(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[Place]:
    """An engine that answers so, and notices when its client hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-len"))
        await reader.readexactly(length)
        place.asked.set()
        await answer(reader, writer)
        if await reader.read() == b"":
            place.hung_up.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    place = Place(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    async with server:
        yield place


async def silent(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Thinks for ever."""


async def begins(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = b'data: {"choices": [{"index": 0, "delta": {"content": "one "}}]}\n\n'
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()


def test_a_closed_stream_hangs_up_on_the_engine() -> None:
    async def story() -> None:
        async with engine_that(begins) as engine:
            stream = EngineClient(engine, PATIENCE).stream(REQUEST)
            assert await anext(stream) == "one "
            await stream.aclose()  # type: ignore[attr-defined]
            await asyncio.wait_for(engine.hung_up.wait(), 30)

    asyncio.run(story())


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cancelled_call_hangs_up_on_the_engine(streaming: bool) -> None:
    async def call(engine: Place) -> None:
        client = EngineClient(engine, PATIENCE)
        if streaming:
            async for _ in client.stream(REQUEST):
                pass
        await client.complete(REQUEST)

    async def story() -> None:
        async with engine_that(begins if streaming else silent) as engine:
            running = asyncio.create_task(call(engine))
            await asyncio.wait_for(engine.asked.wait(), 30)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await asyncio.wait_for(engine.hung_up.wait(), 30)

    asyncio.run(story())


def test_a_call_that_takes_too_long_is_given_up() -> None:
    async def story() -> None:
        async with engine_that(silent) as engine:
            await EngineClient(engine, LLMConfig(timeout_s=0.2, attempts=1)).complete(REQUEST)

    with pytest.raises(ModelUnavailableError):
        asyncio.run(story())
