"""Tools that the client runs, by the official client; and what of a request's fields is honoured or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest
from memory.records import PastRun, Purpose, StopReason
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
CALL = 'Action: get_weather({"city": "Paris", "days": 2})'
REQUESTS: list[ChatRequest] = []


def script(request: ChatRequest) -> str:
    REQUESTS.append(request)
    last = request.messages[-1]["content"]
    if not request.regex:
        return '{"x": 1}'
    if any("badly" in message["content"] for message in request.messages):
        return 'Action: get_weather({"town": 3})'
    if last.startswith("Observation: "):
        return "Action: finish(It is sunny.)" if "rain" not in last else CALL
    return CALL if "get_weather" in request.regex else "Action: finish(I cannot know.)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("tools")), script) as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    REQUESTS.clear()
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, messages: list[Any] = ASKED, model: str = "nightschool", **more: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(**{"model": model, "messages": messages, "tools": [WEATHER]} | more)


def answered(first: Any, result: str = "sunny") -> list[Any]:
    """The conversation as a client sends it back with its tool's result."""
    message = first.choices[0].message
    return [
        *ASKED,
        message.model_dump(),
        *({"role": "tool", "tool_call_id": call.id, "content": result} for call in message.tool_calls),
    ]


def run_of(service: tuple[str, Services], reply: Any) -> Any:
    return service[1].ledger.get_trajectory(reply.id.removeprefix("chatcmpl-"))


@pytest.mark.parametrize("model", ["nightschool", "champion"])
def test_a_client_gets_a_call_runs_it_and_gets_the_answer(client: openai.OpenAI, service: Any, model: str) -> None:
    first = ask(client, model=model)
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    second = ask(client, answered(first), model=model)
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", "It is sunny.")


def test_the_turns_of_a_conversation_are_one_trajectory(client: openai.OpenAI, service: Any) -> None:
    first = ask(client)
    second = ask(client, answered(first, "rain"))
    third = ask(client, [*answered(first, "rain"), *answered(second)[1:]])
    one, two, three = (run_of(service, reply) for reply in (first, second, third))
    assert [run.stop_reason for run in (one, two, three)] == [*[StopReason.TOOL_CALLS] * 2, StopReason.ANSWER]
    assert (one.continues, two.continues, three.continues) == (None, one.id, two.id)
    assert {run.conversation_id for run in (one, two, three)} == {one.id}
    assert three.messages[: len(two.messages)] == two.messages
    assert two.messages[: len(one.messages)] == one.messages
    assert [m["role"] for m in three.own_messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert len(three.steps) == 3
    assert third.usage.completion_tokens == three.steps[-1].completion_tokens
    assert REQUESTS[2].messages[: len(REQUESTS[1].messages)] == REQUESTS[1].messages


def test_recall_still_helps_and_is_kept_over_the_turns(client: openai.OpenAI, service: Any) -> None:
    from memory.index import sync

    function = {"name": "get_weather", "arguments": '{"city": "Lyon"}'}
    past: list[Any] = [
        {"role": "user", "content": "How is the weather in Lyon?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "cold"},
        {"role": "assistant", "content": "It is cold."},
    ]
    services: Services = service[1]
    services.ledger.add_past_run(PastRun(task_id="task_past", workload="weather", messages=past))
    sync(services.ledger, services.index)
    workload = {"nightschool": {"workload": "weather"}}
    first = ask(client, extra_body=workload)
    assert 'Action: get_weather({"city": "Lyon"})' in [m["content"] for m in REQUESTS[0].messages]
    services.ledger.add_past_run(PastRun(task_id="task_new", workload="weather", messages=past))
    sync(services.ledger, services.index)
    ask(client, answered(first), extra_body=workload)
    assert REQUESTS[1].messages[: len(REQUESTS[0].messages)] == REQUESTS[0].messages


@pytest.mark.parametrize(
    "change",
    [
        {"messages": lambda first: [{"role": "user", "content": "Another question?"}, *answered(first)[1:]]},
        {"tools": [WEATHER, TIME]},
        {"extra_body": {"nightschool": {"workload": "another"}}},
    ],
)
def test_a_conversation_that_is_not_as_it_was_served_begins_anew(
    client: openai.OpenAI, service: Any, change: dict[str, Any]
) -> None:
    first = ask(client)
    messages = change.pop("messages", answered)(first)
    second = ask(client, messages, **change)
    assert second.choices[0].message.content == "It is sunny."
    assert run_of(service, second).continues is None


def test_a_foreign_call_id_begins_anew(client: openai.OpenAI, service: Any) -> None:
    call = {"id": "call_x", "type": "function", "function": {"name": "get_weather", "arguments": '{\n"city": "P"}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_x", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert ask(client, messages).choices[0].message.content == "It is sunny."
    assert REQUESTS[0].messages[-2]["content"] == 'Let me see.\nAction: get_weather({"city": "P"})'


def test_another_tenant_does_not_find_the_run(service: tuple[str, Services], client: openai.OpenAI) -> None:
    from memory.records import Task
    from serve.api.conversations import predecessor

    first = ask(client)
    messages = [{k: v for k, v in m.items() if v is not None} for m in answered(first)]
    messages[1] = run_of(service, first).messages[-1]
    mine = Task(messages=messages, client_tools=run_of(service, first).client_tools)
    assert predecessor(service[1].ledger, mine, []) is not None
    theirs = mine.model_copy(update={"tenant": "acme"})
    assert predecessor(service[1].ledger, theirs, []) is None


def test_a_streamed_call_has_its_id_and_name_then_its_arguments(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert (deltas[0].index, deltas[0].function.name, deltas[0].function.arguments) == (0, "get_weather", "")
    assert deltas[0].id
    assert json.loads("".join(d.function.arguments or "" for d in deltas)) == {"city": "Paris", "days": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(c.choices[0].delta.content for c in chunks)


def test_the_sdks_stream_helper_gathers_the_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="nightschool", messages=ASKED, tools=[WEATHER]) as events:  # type: ignore[list-item]
        final = events.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"


@pytest.mark.parametrize(
    ("choice", "calls", "answers"),
    [
        ("auto", True, True),
        ("none", False, True),
        ("required", True, False),
        ({"type": "function", "function": {"name": "get_weather"}}, True, False),
        ({"type": "function", "function": {"name": "get_time"}}, False, False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
            },
            False,
            True,
        ),
    ],
)
def test_the_choice_of_tools_is_the_engines_grammar(
    client: openai.OpenAI, choice: Any, calls: bool, answers: bool
) -> None:
    ask(client, tools=[WEATHER, TIME], tool_choice=choice)
    regex = REQUESTS[0].regex or ""
    assert ("get_weather" in regex, "finish" in regex) == (calls, answers)
    assert "calc" not in regex


def test_our_own_tools_are_there_when_they_are_named(client: openai.OpenAI) -> None:
    ask(client, extra_body={"nightschool": {"tools": ["calculator"]}})
    regex = REQUESTS[0].regex or ""
    assert "calc" in regex
    assert "get_weather" in regex


def test_arguments_that_never_fit_are_no_call(client: openai.OpenAI) -> None:
    reply = ask(client, [{"role": "user", "content": "Ask badly."}])
    assert reply.choices[0].message.tool_calls is None
    assert reply.nightschool["stop_reason"] == "malformed"


def test_a_format_is_enforced_by_the_engine_without_our_tools(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    reply = ask(client, tools=openai.NOT_GIVEN, response_format=wanted)
    assert json.loads(reply.choices[0].message.content) == {"x": 1}
    assert REQUESTS[0].sampling["response_format"] == wanted
    assert REQUESTS[0].regex is None
    assert REQUESTS[0].sampling["max_tokens"] > 100


def test_fields_reach_the_engine_or_the_record(client: openai.OpenAI, service: Any) -> None:
    reply = ask(
        client,
        [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hello", "name": "ann"}],
        model="champion",
        tools=[],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["\n"],
        max_completion_tokens=9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": -3},
        user="u-1",
        safety_identifier="s-1",
        prompt_cache_key="k-1",
        service_tier="auto",
        store=False,
        parallel_tool_calls=False,
        metadata={"conversation_id": "conv-1", "team": "blue"},
        n=1,
        modalities=["text"],
    )
    (request,) = REQUESTS
    assert request.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["\n"],
        "max_tokens": 9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -3.0},
    }
    assert request.messages[1]["name"] == "ann"
    assert request.cache_salt not in (None, "default")
    run = run_of(service, reply)
    task = service[1].ledger.get_task(run.task_id)
    assert (run.purpose, run.conversation_id) == (Purpose.UNTAUGHT, "conv-1")
    assert (task.user, task.safety_identifier, task.metadata["team"]) == ("u-1", "s-1", "blue")


TOOL_TURN: list[Any] = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"nonsense": 1}, "nonsense"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [TIME]}, "response_format"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "finish"}}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"nightschool": {"watch": True}}, "nightschool"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "calc"}}],
                "nightschool": {"tools": ["calculator"]},
            },
            "nightschool",
        ),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "recalled"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, "messages"),
        ({"messages": TOOL_TURN}, "messages"),
        ({"messages": [*TOOL_TURN, {"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "assistant"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "user", "content": "\ud800"}]}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(service: Any, change: dict[str, Any], param: str) -> None:
    asked = {"model": "nightschool", "messages": ASKED} | change
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{service[0]}/v1/chat/completions", content=json.dumps(asked), headers=headers)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param), error
    assert param.split(".")[0] in error["message"]


def test_no_field_of_the_sdk_is_unknown_here() -> None:
    from openai.types.chat import completion_create_params as params

    from serve.api.openai_types import ChatCompletionRequest

    known = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert known <= set(ChatCompletionRequest.model_fields)


def test_null_says_nothing(client: openai.OpenAI) -> None:
    reply = ask(client, tools=openai.NOT_GIVEN, extra_body={"verbosity": None, "audio": None, "stop": None, "n": None})
    assert reply.choices[0].message.content == "I cannot know."
