"""Streams of chat completions: pieces as they are generated, errors, what may be watched, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from agent.llm import ChatReply, ChatRequest, ScriptedModel
from memory.errors import ContextLengthError, ModelUnavailableError
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

ANSWER = "It is three, as (nearly) everyone knows."


@dataclass
class Teller(ScriptedModel):
    """A model that streams in words, breaks off or waits where the question says so, and notices cancellation."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)

    async def complete(self, request: ChatRequest) -> ChatReply:
        if "after a word" not in request.messages[-1]["content"]:
            await self._wait_if_asked_to(request)
        return await super().complete(request)

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        question = next(m["content"] for m in reversed(request.messages) if "Observation" not in m["content"])
        if "after a word" not in question:
            await self._wait_if_asked_to(request)
        told = 0
        async for piece in super().stream(request):
            yield piece
            told += 1
            if "break off" in question and told == 4:
                raise ModelUnavailableError("the model cannot be reached: it broke off")
            if "after a word" in question and told == 4:
                await self._wait_if_asked_to(request)

    async def _wait_if_asked_to(self, request: ChatRequest) -> None:
        if "wait" in request.messages[-1]["content"]:
            self.asked.set()
            try:
                await asyncio.sleep(60)
            except BaseException:
                self.cancelled.set()
                raise


def script(request: ChatRequest) -> str | Exception:
    last = request.messages[-1]["content"]
    if "too long" in last:
        return ContextLengthError("the prompt does not fit the model's context: 9000 > 2048")
    if not request.regex:
        return ANSWER
    if last.startswith("Observation: ") or "wait" in last or "break off" in last:
        return f"Action: finish({ANSWER})"
    return "Action: calc(1 + 2)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("stream")), script) as started:
        yield started


@pytest.fixture
def teller(service: tuple[str, Services]) -> Iterator[Teller]:
    services, model = service[1], Teller(script)
    before = services.deps
    object.__setattr__(services, "deps", replace(before, llm=model))
    yield model
    object.__setattr__(services, "deps", before)


@pytest.fixture
def client(service: tuple[str, Services], teller: Teller) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def body(text: str = "What is 1 + 2?", model: str = "nightschool", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": True, **more}


def stream(client: openai.OpenAI, text: str = "What is 1 + 2?", model: str = "nightschool", **more: Any) -> list[Any]:
    return list(opened(client, body(text, model, **more)))


def opened(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    create: Any = client.chat.completions.create
    return create(**asked)


def said(chunks: list[Any]) -> list[str]:
    return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]


def raw_events(service: tuple[str, Services], asked: dict[str, Any], **headers: str) -> list[Any]:
    reply = httpx.post(f"{service[0]}/v1/chat/completions", json=asked, headers=headers)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("model", ["nightschool", "champion"])
def test_a_stream_has_the_role_then_the_answer_in_pieces_then_the_finish(client: openai.OpenAI, model: str) -> None:
    chunks = stream(client, model=model)
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert len(said(chunks)) > 3
    assert "".join(said(chunks)) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_the_run_is_in_the_ledger_when_the_finish_is_said(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    for chunk in opened(client, body()):
        if chunk.choices[0].finish_reason:
            run = service[1].ledger.get_trajectory(chunk.id.removeprefix("chatcmpl-"))
            assert run.answer == ANSWER
            return
    pytest.fail("there was no finish")


def test_usage_comes_once_at_the_end_and_only_when_it_is_asked_for(service: tuple[str, Services], client: Any) -> None:
    *chunks, done = raw_events(service, body(stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in raw_events(service, body())[:-1])


def test_a_standard_client_sees_only_standard_chunks(service: tuple[str, Services], client: Any) -> None:
    for event in raw_events(service, body())[:-1]:
        assert set(event) == {"id", "object", "created", "model", "choices"}
        assert "calc" not in json.dumps(event)
        assert len(event["choices"]) == 1


@pytest.mark.parametrize("how", ["header", "field"])
def test_a_client_that_asks_to_watches_the_agents_tools(service: tuple[str, Services], client: Any, how: str) -> None:
    asked = body() | ({"nightschool": {"watch": True}} if how == "field" else {})
    events = raw_events(service, asked, **({"X-Nightschool-Watch": "1"} if how == "header" else {}))
    watched = [event for event in events[:-1] if "nightschool" in event]
    assert [event["nightschool"]["event"] for event in watched] == ["recall", "tool_call", "observation"]
    assert all(event["choices"] == [] for event in watched)
    assert json.loads(watched[1]["nightschool"]["arguments"]) == {"expression": "1 + 2"}
    assert watched[2]["nightschool"]["content"] == "3"
    standard = [e for e in events[:-1] if e["choices"]]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in standard) == ANSWER


def test_a_stream_that_breaks_off_is_an_error_for_the_client(client: openai.OpenAI, service: Any) -> None:
    heard: list[str] = []
    runs = len(service[1].ledger.trajectories())

    def listen() -> None:
        for chunk in opened(client, body("break off, please")):
            heard.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="broke off"):
        listen()
    assert ANSWER.startswith("".join(heard))
    assert len("".join(heard)) > 0
    assert len(service[1].ledger.trajectories()) == runs


def test_an_error_in_a_stream_is_an_event_and_then_the_end(service: tuple[str, Services], client: Any) -> None:
    *_, error, done = raw_events(service, body("break off, please"))
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert done == "[DONE]"


def test_what_is_refused_at_once_has_a_status_of_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        stream(client, "this is too long", model="champion")
    assert caught.value.code == "context_length_exceeded"


def test_a_streamed_retry_with_the_same_key_is_the_same_reply(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": "stream-1"}
    first = stream(client, extra_headers=headers)
    again = stream(client, extra_headers=headers)
    assert "".join(said(first)) == "".join(said(again)) == ANSWER
    assert first[0].id == again[0].id


def hang_up(url: str, asked: dict[str, Any], teller: Teller) -> bool:
    """Ask over a bare socket, hang up once the model is at work; whether that stopped it."""
    place = urlsplit(url)
    payload = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(f"{head}{len(payload)}\r\n\r\n".encode() + payload)
        assert teller.asked.wait(60)
        if "after a word" in asked["messages"][0]["content"]:
            got = b""
            while not re.search(rb'"content": "\w', got):
                got += connection.recv(65536)
    return teller.cancelled.wait(30)


@pytest.mark.parametrize("model", ["nightschool", "champion"])
@pytest.mark.parametrize(("text", "streamed"), [("wait", True), ("wait after a word", True), ("wait", False)])
def test_hanging_up_cancels_the_work(
    service: tuple[str, Services], teller: Teller, text: str, streamed: bool, model: str
) -> None:
    assert hang_up(service[0], body(text, model) | {"stream": streamed}, teller), "it went on without its client"


def test_logprobs_of_a_plain_reply_come_whole_and_streamed(client: openai.OpenAI, service: Any, teller: Teller) -> None:
    entries = [{"token": "It", "logprob": -0.5, "bytes": None, "top_logprobs": []}]

    class Sure(ScriptedModel):
        async def complete(self, request: ChatRequest) -> ChatReply:
            assert request.sampling["logprobs"] is True
            assert request.sampling["top_logprobs"] == 0
            return ChatReply(text="It", finish_reason="stop", logprobs=entries)

    object.__setattr__(service[1], "deps", replace(service[1].deps, llm=Sure([])))
    asked = body(model="champion", logprobs=True, top_logprobs=0)
    whole = opened(client, asked | {"stream": False})
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert whole.choices[0].logprobs.content[0].logprob == -0.5
    chunks = list(opened(client, asked))
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [entry.token for entries in told for entry in entries or []] == ["It"]
