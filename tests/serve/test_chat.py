"""The endpoint as the official OpenAI client meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest
from memory.errors import ContextLengthError, ModelUnavailableError
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

TASK = {"workload": "sums", "reference": "3"}


def pupil(request: ChatRequest) -> str | Exception:
    last = request.messages[-1]["content"]
    if "too long" in last:
        return ContextLengthError("the prompt does not fit the model's context: 9000 > 2048")
    if "engine is away" in last:
        return ModelUnavailableError("the model cannot be reached: connection refused")
    if not request.regex:
        return "Hello there."
    return "Action: finish(3)" if last.startswith("Observation: ") else "Action: calc(1 + 2)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("chat")), pupil) as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, text: str = "What is 1 + 2?", **extra: Any) -> Any:
    return client.chat.completions.create(
        model="nightschool", messages=[{"role": "user", "content": text}], extra_body={"nightschool": TASK}, **extra
    )


def test_the_agent_answers_and_the_run_is_in_the_ledger_before_the_reply(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    reply = ask(client)
    assert reply.choices[0].message.content == "3"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens > 0
    trajectory = service[1].ledger.get_trajectory(reply.id.removeprefix("chatcmpl-"))
    assert trajectory.success
    assert [m["role"] for m in trajectory.own_messages] == ["user", "assistant", "tool", "assistant"]


def test_a_stream_has_role_content_finish_usage_and_done(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "3"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])


def test_an_error_in_a_stream_is_an_error_for_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="cannot be reached"):
        list(ask(client, "the engine is away", stream=True))


def test_the_plain_model_neither_acts_nor_recalls(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="champion", messages=[{"role": "user", "content": "Hi"}])
    assert reply.choices[0].message.content == "Hello there."


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}, 404, "does not exist"),
        ({"model": "nightschool:gen-9", "messages": [{"role": "user", "content": "Hi"}]}, 404, "9"),
        ({"model": "nightschool", "messages": []}, 400, "messages"),
        ({"model": "nightschool"}, 400, "messages"),
        ({"model": "nightschool", "messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages[0].role"),
        ({"model": "nightschool", "messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        (
            {"model": "nightschool", "messages": [{"role": "user", "content": "x"}], "verbosity": "low"},
            400,
            "verbosity",
        ),
        (
            {"model": "nightschool", "messages": [{"role": "user", "content": "x"}], "temperature": 9},
            400,
            "temperature",
        ),
        ({"model": "nightschool", "messages": [{"role": "user", "content": "this is too long"}]}, 400, "context"),
        ({"model": "nightschool", "messages": [{"role": "user", "content": "the engine is away"}]}, 503, "reached"),
        (
            {"model": "nightschool", "messages": [{"role": "user", "content": "x"}], "nightschool": {"tools": ["rm"]}},
            400,
            "unknown tool",
        ),
        (
            {
                "model": "nightschool",
                "messages": [{"role": "user", "content": "x"}],
                "nightschool": {"verifier": {"name": "os:system"}},
            },
            400,
            "unknown verifier",
        ),
        (
            {
                "model": "nightschool",
                "messages": [{"role": "user", "content": "x"}],
                "nightschool": {"verifier": {"name": "contains", "args": {"any": ["0", 5]}}},
            },
            400,
            "verifier 'contains': argument any.1",
        ),
        ("{", 400, "JSON"),
        ([], 400, ""),
    ],
)
def test_bad_input_is_a_clear_openai_error(service: tuple[str, Services], body: object, status: int, said: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    reply = httpx.post(
        f"{service[0]}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "Traceback" not in reply.text


def test_a_retry_with_the_same_key_is_the_same_run(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first, again = ask(client, extra_headers=headers), ask(client, extra_headers=headers)
    assert first.id == again.id
    with pytest.raises(openai.ConflictError):
        ask(client, "Another question?", extra_headers=headers)


def test_a_task_may_be_asked_again_but_its_id_stands_for_no_other(client: openai.OpenAI) -> None:
    def named(text: str, model: str = "nightschool") -> Any:
        messages: list = [{"role": "user", "content": text}]
        return client.chat.completions.create(
            model=model, messages=messages, extra_body={"nightschool": {**TASK, "task_id": "sum-1"}}
        )

    assert named("What is 1 + 2?").id != named("What is 1 + 2?", "champion").id
    with pytest.raises(openai.ConflictError, match="sum-1"):
        named("What is 2 + 2?")


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["nightschool", "champion", "nightschool:gen-0", "gen-0", "embedder"]
    assert client.models.retrieve("gen-0").id == "gen-0"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gen-7")


def test_health_and_readiness(service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(f"{service[0]}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{service[0]}/readyz")
    assert ready.status_code == 200
    monkeypatch.setattr(service[1].engine, "status", "starting")
    assert httpx.get(f"{service[0]}/readyz").status_code == 503


def test_feedback_is_stored_once_and_waits_for_trust(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    reply = ask(client)
    body = {"response_id": reply.id, "kind": "correction", "value": "3", "author": "ann"}
    first = httpx.post(f"{service[0]}/v1/feedback", json=body).json()
    again = httpx.post(f"{service[0]}/v1/feedback", json=body).json()
    assert first["id"] == again["id"]
    assert first["trust"] == "quarantined"
    assert len(service[1].ledger.feedback(trajectory_id=first["trajectory_id"])) == 1


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"response_id": "chatcmpl-nope"}, 404, "nope"),
        ({"response_id": None}, 400, "exactly one"),
        ({"kind": "score", "value": 7}, 400, "0 to 1"),
        ({"kind": "score", "value": "good"}, 400, "0 to 1"),
        ({"kind": "correction", "value": ""}, 400, "correction"),
        ({"kind": "praise"}, 400, "kind"),
        ({"author": "operator-eve"}, 400, "reserved"),
        ({"kind": "preference", "value": "that one"}, 400, "over"),
    ],
)
def test_bad_feedback_is_refused(
    client: openai.OpenAI, service: tuple[str, Services], change: dict[str, object], status: int, said: str
) -> None:
    body = {"response_id": ask(client).id, "kind": "hint", "value": "Use the tool."} | change
    reply = httpx.post(f"{service[0]}/v1/feedback", json={k: v for k, v in body.items() if v is not None})
    assert reply.status_code == status
    assert said in reply.json()["error"]["message"]


def test_the_data_folder_has_one_owner(service: tuple[str, Services], tmp_path: Path) -> None:
    from memory.errors import ConfigError
    from serve.wiring import _own

    release = _own(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        _own(tmp_path)
    release()
    _own(tmp_path)()
