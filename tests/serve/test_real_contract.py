"""The front door as a user has it: a service process with keys, the real engine, the official OpenAI client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.client import stop
from tests.serve.conftest import needs_engine
from tests.serve.whole_service import Service

pytestmark = needs_engine

SUM: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[openai.OpenAI]:
    service = Service(tmp_path_factory.mktemp("contract") / "data", model)
    service.data_dir.mkdir(parents=True)
    try:
        token = service.start()
        key = token.post("/v1/keys", {"name": "contract", "scopes": ["admin"]})["secret"]
        yield openai.OpenAI(base_url=f"{token.url}/v1", api_key=key, max_retries=0, timeout=300)
    finally:
        if service.process is not None:
            stop(service.process)


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    for name in ("nightschool", "champion"):
        asked: dict[str, Any] = {"model": name, "messages": SUM, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        assert chunks[-1].usage
        assert whole.usage
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
        # A final answer of one or two tokens may come in one piece.
        assert name == "nightschool" or len([piece for piece in pieces if piece]) > 1, "it came in one piece"


def test_clients_run_their_own_tools_and_the_turns_are_one_conversation(client: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Paris? Use C."}]
    first = client.chat.completions.create(model="nightschool", messages=asked, tools=WEATHER, tool_choice="required")
    assert first.choices[0].finish_reason == "tool_calls"
    [call] = first.choices[0].message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("C", "F")
    asked += [first.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 C"}]
    second: Any = client.chat.completions.create(model="nightschool", messages=asked, tools=WEATHER, tool_choice="none")
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content


def test_a_json_schema_is_kept_to(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    asked: list[Any] = [{"role": "user", "content": "Give me a number."}]
    reply = client.chat.completions.create(
        model="champion", messages=asked, response_format=form, max_tokens=40, temperature=0
    )
    assert isinstance(json.loads(reply.choices[0].message.content or "")["n"], int)


def test_log_probabilities_come_from_the_engine(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="champion", messages=SUM, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    assert reply.choices[0].logprobs
    tokens = reply.choices[0].logprobs.content or []
    assert len(tokens) == 3
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in tokens)


def test_responses_follow_each_other(client: openai.OpenAI) -> None:
    first = client.responses.create(model="nightschool", input="What is 5 + 5?")
    assert first.status == "completed"
    assert first.output_text
    events = list(
        client.responses.create(model="nightschool", input="And 6 + 6?", previous_response_id=first.id, stream=True)
    )
    assert events[-1].type == "response.completed"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == events[-1].response.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_a_batch_is_scored_by_the_answers_its_lines_carry(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"line-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "nightschool",
                "messages": [{"role": "user", "content": f"What is {n} + {n}?"}],
                "metadata": {"nightschool.reference": str(2 * n)},
            },
        }
        for n in range(6)
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("tasks.jsonl", body), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 300
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.output_file_id
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {result["custom_id"] for result in results} == {f"line-{n}" for n in range(6)}
    outcomes = [result["response"]["body"]["nightschool"]["outcome"] for result in results]
    assert all(outcome["by"] == "verifier" for outcome in outcomes)


def test_embeddings_tell_near_from_far(client: openai.OpenAI) -> None:
    words = ["a dog barks", "the dog is barking", "quarterly tax report"]
    one, near, far = (item.embedding for item in client.embeddings.create(model="embedder", input=words).data)

    def alike(other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert alike(near) > alike(far)


def test_a_prompt_that_does_not_fit_is_the_clients_error(client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "word " * 6000}]
    for name in ("champion", "nightschool"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=name, messages=long)
        assert refused.value.code == "context_length_exceeded"


def test_a_client_that_hangs_up_frees_the_engine(client: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Count from 1 to 500, one number a line."}]
    with client.chat.completions.create(model="champion", messages=asked, stream=True, max_tokens=1500) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 60
    while httpx.get(str(client.base_url.join("/readyz"))).json()["runs"]:
        assert time.monotonic() < deadline, "the run went on"
        time.sleep(0.1)
