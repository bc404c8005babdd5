"""The Responses API as the official OpenAI client meets it, its objects checked against the client's own types."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from agent.llm import ChatReply, ChatRequest, ScriptedModel
from memory.errors import ContextLengthError, ModelUnavailableError
from memory.records import Purpose, StopReason
from memory.responses import add_response, get_response
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


def pupil(request: ChatRequest) -> str | Exception:
    last = request.messages[-1]["content"]
    if "too long" in last:
        return ContextLengthError("the prompt does not fit the model's context: 9000 > 2048")
    if "engine is away" in last:
        return ModelUnavailableError("the model cannot be reached: connection refused")
    if "weather" in last:
        return 'Action: get_weather({"city": "Paris"})'
    if last == "Observation: sunny":
        return "Action: finish(sunny)"
    if not request.regex:
        return f"I was told {len(request.messages)} things."
    return "Action: finish(3)" if last.startswith("Observation: ") else "Action: calc(1 + 2)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("responses")), pupil) as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(service: tuple[str, Services], **body: Any) -> httpx.Response:
    return httpx.post(f"{service[0]}/v1/responses", json={"model": "champion", "input": "Hello"} | body, timeout=30)


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """Every event, checked to be named and numbered as the spec says."""
    events = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS.validate_python(event, strict=True)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_the_agent_answers_and_the_reply_is_the_sdks_response(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    raw = post(service, model="nightschool", input="What is 1 + 2?", metadata={"a": "b"}, instructions="Be short.")
    reply = Response.model_validate(raw.json(), strict=True)
    assert reply.output_text == "3"
    assert reply.status == "completed"
    assert reply.metadata == {"a": "b"}
    assert reply.instructions == "Be short."
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens > 0
    assert client.responses.create(model="nightschool", input="What is 1 + 2?").output_text == "3"
    run = service[1].ledger.get_trajectory("traj_" + reply.id.removeprefix("resp_"))
    assert run.answer == "3"
    assert run.messages[0]["role"] == "system"


def test_a_stored_reply_is_in_the_ledger_and_is_retrieved_as_it_was_sent(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    raw = post(service).json()
    assert get_response(service[1].ledger.database, raw["id"], tenant="default").reply == raw
    assert httpx.get(f"{service[0]}/v1/responses/{raw['id']}").json() == raw
    assert client.responses.retrieve(raw["id"]).output_text == "I was told 1 things."
    client.responses.delete(raw["id"])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(raw["id"])
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(raw["id"])


def test_a_chain_shows_the_model_what_was_said_before_but_not_the_old_instructions(client: openai.OpenAI) -> None:
    first = client.responses.create(model="champion", input="One", instructions="You are a poet.")
    second = client.responses.create(model="champion", input="Two", previous_response_id=first.id)
    third = client.responses.create(model="champion", input="Three", previous_response_id=second.id)
    assert first.output_text == "I was told 2 things."
    assert second.output_text == "I was told 3 things."
    assert third.output_text == "I was told 5 things."
    assert third.previous_response_id == second.id
    assert third.instructions is None


def test_a_chain_goes_on_when_an_earlier_reply_was_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model="champion", input="One")
    second = client.responses.create(model="champion", input="Two", previous_response_id=first.id)
    client.responses.delete(first.id)
    third = client.responses.create(model="champion", input="Three", previous_response_id=second.id)
    assert third.output_text == "I was told 5 things."


def test_the_runs_of_a_chain_are_one_conversation(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    first = client.responses.create(model="champion", input="One")
    second = client.responses.create(model="champion", input="Two", previous_response_id=first.id)
    third = client.responses.create(model="champion", input="Three", previous_response_id=second.id)
    runs = service[1].ledger.conversation(first.id, tenant="default")
    assert ["resp_" + run.id.removeprefix("traj_") for run in runs] == [first.id, second.id, third.id]


def test_input_items_are_listed_in_pages(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    first = client.responses.create(model="champion", input="One")
    reply = client.responses.create(
        model="champion",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Two"}]},
        ],
        previous_response_id=first.id,
    )
    raw = httpx.get(f"{service[0]}/v1/responses/{reply.id}/input_items", params={"order": "asc"}).json()
    listed = ResponseItemList.model_validate(raw, strict=True)
    assert [getattr(item, "role", None) for item in listed.data] == ["user", "assistant", "developer", "user"]
    ids = [item["id"] for item in raw["data"]]
    paged = client.responses.input_items.list(reply.id, limit=1)
    assert [item.id for item in paged] == ids[::-1]
    with pytest.raises(openai.BadRequestError, match="msg_nope"):
        client.responses.input_items.list(reply.id, after="msg_nope")


def test_what_is_not_stored_is_not_retrieved_nor_learned_from(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    reply = client.responses.create(model="champion", input="Forget me", store=False)
    assert reply.output_text == "I was told 1 things."
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="champion", input="And now?", previous_response_id=reply.id)
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"
    run = service[1].ledger.get_trajectory("traj_" + reply.id.removeprefix("resp_"))
    assert run.purpose is Purpose.UNTAUGHT


def test_a_stream_has_the_specs_events_in_order_and_ends_with_the_stored_reply(service: tuple[str, Services]) -> None:
    events = events_of(post(service, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [kind for kind in kinds if kind == "output_text.delta"]
    assert deltas
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    final = events[-1]["response"]
    assert text == final["output"][0]["content"][0]["text"] == "I was told 1 things."
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
    assert get_response(service[1].ledger.database, final["id"], tenant="default").reply == final


def test_the_sdks_stream_helper_gathers_the_reply(client: openai.OpenAI) -> None:
    with client.responses.stream(model="nightschool", input="What is 1 + 2?") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.output_text == "3"


def test_the_reply_is_in_the_ledger_when_the_stream_says_completed(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    stream = client.responses.create(model="champion", input="Hello", stream=True)
    for event in stream:
        if event.type == "response.completed":
            assert get_response(service[1].ledger.database, event.response.id, tenant="default")
            return
    pytest.fail("the stream never completed")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ModelUnavailableError("cannot be reached"), "server_error"), (ContextLengthError("too long"), "invalid_prompt")],
)
def test_a_late_error_in_a_stream_is_a_failed_response(
    service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    async def late(*_: object) -> AsyncIterator[str]:
        yield "Well"
        raise error

    monkeypatch.setattr(ScriptedModel, "stream", late)
    events = events_of(post(service, stream=True))
    assert [e["delta"] for e in events if e["type"] == "response.output_text.delta"] == ["Well"]
    assert events[-1]["type"] == "response.failed"
    failed = Response.model_validate(events[-1]["response"], strict=True)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == (code, str(error))
    assert httpx.get(f"{service[0]}/v1/responses/{failed.id}").status_code == 404


def test_an_error_that_comes_at_once_has_its_own_status_in_a_stream_too(service: tuple[str, Services]) -> None:
    assert post(service, input="the engine is away", stream=True).status_code == 503
    assert post(service, input="this is too long", stream=True).status_code == 400


def test_a_run_that_was_cut_is_incomplete(service: tuple[str, Services]) -> None:
    def endless(request: ChatRequest) -> str:
        return "Action: calc(1 + 2)"

    model: Any = service[1].llm
    script, model.script = model.script, endless
    try:
        raw = post(service, model="nightschool", input="What is 1 + 2?").json()
        events = events_of(post(service, model="nightschool", input="What is 1 + 2?", stream=True))
    finally:
        model.script = script
    reply = Response.model_validate(raw, strict=True)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert events[-1]["type"] == "response.incomplete"
    run = service[1].ledger.get_trajectory("traj_" + reply.id.removeprefix("resp_"))
    assert run.stop_reason in (StopReason.MAX_TURNS, StopReason.LENGTH)


def test_a_tool_is_called_by_the_client_and_the_chain_goes_on_with_its_result(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    raw = post(service, model="nightschool", input="How is the weather?", tools=[WEATHER]).json()
    first = Response.model_validate(raw, strict=True)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    assert first.status == "completed"
    second = client.responses.create(
        model="nightschool",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
        tools=[WEATHER],
        previous_response_id=first.id,
    )
    assert second.output_text == "sunny"
    before, after = service[1].ledger.conversation(first.id, tenant="default")
    assert after.continues == before.id


def test_a_client_may_keep_the_conversation_itself(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": "How is the weather?"}]
    first = client.responses.create(model="nightschool", input=items, tools=[WEATHER], store=False)
    items += first.output
    items.append({"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"})  # type: ignore[union-attr]
    second = client.responses.create(model="nightschool", input=items, tools=[WEATHER], store=False)
    assert second.output_text == "sunny"


def test_a_streamed_tool_call_has_its_arguments_in_pieces_and_whole(service: tuple[str, Services]) -> None:
    events = events_of(post(service, model="nightschool", input="How is the weather?", tools=[WEATHER], stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "function_call_arguments.delta"] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    pieces = "".join(e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta")
    done = next(e for e in events if e["type"] == "response.function_call_arguments.done")
    assert pieces == done["arguments"] == events[-1]["response"]["output"][0]["arguments"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_the_run_within_a_second(
    service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def silent(*_: object) -> ChatReply:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError("nobody hung up")

    async def silent_stream(*_: object) -> AsyncIterator[str]:
        await silent()
        yield ""

    monkeypatch.setattr(ScriptedModel, "complete", silent)
    monkeypatch.setattr(ScriptedModel, "stream", silent_stream)
    body = {"model": "champion", "input": "Hello", "stream": stream}
    with socket.create_connection(("127.0.0.1", httpx.URL(service[0]).port or 0)) as line:
        content = json.dumps(body)
        head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        line.sendall(f"{head}Content-Type: application/json\r\n\r\n{content}".encode())
        assert begun.wait(10)
    assert ended.wait(30)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CALL = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "blue"}


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-4"}, 404, "does not exist"),
        ({"model": "embedder"}, 404, "does not exist"),
        ({"input": []}, 400, "at least one item"),
        ({"input": 3}, 400, "input"),
        ({"input": ["x"]}, 400, "input[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, 400, "input[0].role"),
        ({"input": user(7)}, 400, "input[0].content"),
        ({"input": user([{"type": "input_image", "image_url": "x"}])}, 400, "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "summary": []}]}, 400, "input[0].type"),
        ({"input": [{"type": "message", "role": "user", "content": "x", "mood": 1}]}, 400, "input[0].mood"),
        ({"input": [{"role": "assistant", "content": "x"}]}, 400, "user"),
        ({"input": [*user("x"), RESULT]}, 400, "call_1"),
        ({"input": [*user("x"), CALL]}, 400, "call_1"),
        ({"input": [*user("x"), {**CALL, "arguments": "{"}, RESULT]}, 400, "input[1].arguments"),
        ({"input": [*user("x"), {**CALL, "arguments": "[]"}, RESULT]}, 400, "input[1].arguments"),
        ({"input": [*user("x"), CALL, *user("y"), RESULT]}, 400, "call_1"),
        ({"input": [*user("x"), CALL, CALL, RESULT]}, 400, "call_1"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools"),
        ({"tool_choice": "sometimes"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, 400, "tool_choice"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
        ({"text": {"verbosity": "low"}}, 400, "text.verbosity"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"background": True}, 400, "background"),
        ({"reasoning": {"effort": "low"}}, 400, "reasoning"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, 400, "include"),
        ({"stream_options": {"include_obfuscation": True}}, 400, "stream_options"),
        ({"service_tier": "flex"}, 400, "service_tier"),
        ({"nightschool": {"watch": True}, "stream": True}, 400, "watch"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, 400, "other"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [3]}}, 400, "allowed"),
        ({"tools": [WEATHER, WEATHER]}, 400, "tools"),
        ({"prompt": {"id": "x"}}, 400, "prompt"),
        ({"previous_response_id": "resp_nope"}, 400, "resp_nope"),
        ({"nightschool": {"tools": ["rm"]}, "model": "nightschool"}, 400, "rm"),
        ({"input": "this is too long"}, 400, "context"),
        ({"input": "the engine is away"}, 503, "reached"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    service: tuple[str, Services], change: dict[str, Any], status: int, said: str
) -> None:
    reply = post(service, **change)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


def test_a_stored_stream_is_not_streamed_again(service: tuple[str, Services]) -> None:
    made = post(service).json()
    reply = httpx.get(f"{service[0]}/v1/responses/{made['id']}", params={"stream": "true"})
    assert reply.status_code == 400
    assert "stream" in reply.json()["error"]["message"]


def test_a_retry_with_the_same_key_is_the_same_reply(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": "r-1"}
    first = client.responses.create(model="champion", input="Hello", extra_headers=headers)
    again = client.responses.create(model="champion", input="Hello", extra_headers=headers)
    assert again.id == first.id
    assert again.created_at == first.created_at
    with pytest.raises(openai.ConflictError):
        client.responses.create(model="champion", input="Another question", extra_headers=headers)


def test_a_streamed_retry_with_the_same_key_says_the_stored_reply_again(service: tuple[str, Services]) -> None:
    body = {"model": "nightschool", "input": "What is 1 + 2?", "stream": True}
    first, again = (
        events_of(httpx.post(f"{service[0]}/v1/responses", json=body, headers={"Idempotency-Key": "r-2"}))
        for _ in range(2)
    )
    assert again[-1]["response"] == first[-1]["response"]
    assert "".join(e["delta"] for e in again if e["type"] == "response.output_text.delta") == "3"


def test_another_tenants_reply_is_not_there(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    mine = client.responses.create(model="champion", input="Hello")
    database = service[1].ledger.database
    theirs = get_response(database, mine.id, tenant="default").model_copy(
        update={"id": "resp_rival", "tenant": "rival"}
    )
    add_response(database, theirs)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_rival")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete("resp_rival")
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_rival")
    with pytest.raises(openai.BadRequestError, match="resp_rival"):
        client.responses.create(model="champion", input="And?", previous_response_id="resp_rival")
