"""A user's word on a run, by every name of the run and in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest
from memory.keys import ApiKey, Scope, mint
from memory.records import Message, Purpose, StopReason, Task, Trajectory
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.serve.fakes import running, settings_in


def pupil(request: ChatRequest) -> str:
    if not request.regex:
        return "Hello there."
    return "Action: finish(3)" if request.messages[-1]["content"].startswith("Observation: ") else "Action: calc(1 + 2)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("feedback")), pupil) as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, model: str = "nightschool", **extra: Any) -> str:
    """The id of a fresh reply."""
    messages: Any = [{"role": "user", "content": "What is 1 + 2?"}]
    return client.chat.completions.create(model=model, messages=messages, **extra).id


def say(service: tuple[str, Services], **body: Any) -> httpx.Response:
    return httpx.post(f"{service[0]}/v1/feedback", json=body)


def heard(service: tuple[str, Services], **about: str) -> list[dict[str, Any]]:
    reply = httpx.get(f"{service[0]}/v1/feedback", params=about)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


def run_in(service: tuple[str, Services], **change: Any) -> Trajectory:
    """A run that is put into the ledger by hand."""
    ledger = service[1].ledger
    task = Task(messages=[{"role": "user", "content": "1 + 1?"}], tenant=change.get("tenant", "default"))
    run = Trajectory(
        task_id=task.id,
        generation=0,
        model="base",
        messages=task.messages,
        answer="3",
        stop_reason=StopReason.ANSWER,
        purpose=Purpose.SERVE,
        **change,
    )
    ledger.add_task(task)
    ledger.add_trajectory(run)
    return run


def test_a_word_is_listed_with_its_trust(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    reply = ask(client)
    said = say(service, response_id=reply, kind="hint", value="Use the tool.", author="ann").json()
    assert said["object"] == "feedback"
    for about in ({"response_id": reply}, {"trajectory_id": said["trajectory_id"]}):
        assert heard(service, **about) == [said]
    assert said["trust"] == "quarantined"
    assert said["author"] == "ann"


def test_a_boolean_is_a_score(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    reply = ask(client)
    assert say(service, response_id=reply, kind="score", value=True).json()["value"] == 1.0
    assert say(service, response_id=reply, kind="score", value=0.25).json()["value"] == 0.25


def test_a_reply_of_the_responses_api_is_known_by_its_id(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    reply = client.responses.create(model="nightschool", input="What is 1 + 2?").id
    assert say(service, response_id=reply, kind="correction", value="4").status_code == 200
    assert [said["value"] for said in heard(service, response_id=reply)] == ["4"]


def test_a_word_on_a_conversation_is_about_its_last_run(service: tuple[str, Services]) -> None:
    first, last = (run_in(service, conversation_id="conv-1") for _ in range(2))
    said = say(service, conversation_id="conv-1", kind="comment", value="Nice.").json()
    assert said["trajectory_id"] == last.id
    say(service, trajectory_id=first.id, kind="comment", value="Less so.")
    assert [word["value"] for word in heard(service, conversation_id="conv-1")] == ["Less so.", "Nice."]


CALCULATION: list[Message] = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 + 2"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "assistant", "content": "3"},
]


@pytest.mark.parametrize("start", [[], [{"role": "user", "content": "What is 1 + 2?"}]])
def test_a_correction_may_be_a_whole_better_run(
    client: openai.OpenAI, service: tuple[str, Services], start: list[Message]
) -> None:
    reply = say(service, response_id=ask(client), kind="correction", value=start + CALCULATION)
    assert reply.status_code == 200, reply.text
    assert reply.json()["value"] == start + CALCULATION


def test_a_correction_may_call_the_clients_own_tools(service: tuple[str, Services]) -> None:
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    run = run_in(service, client_tools=[look])
    value = json.loads(json.dumps(CALCULATION).replace("calculator", "look"))
    assert say(service, trajectory_id=run.id, kind="correction", value=value).status_code == 200


def test_a_preference_is_between_two_replies(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    better, worse = ask(client), ask(client)
    said = say(service, response_id=better, kind="preference", value={"over": worse}).json()
    assert said["value"] == {"over": worse.removeprefix("chatcmpl-")}


def call(function: Any) -> list[Any]:
    return [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]


@pytest.mark.parametrize(
    ("kind", "value", "status", "said"),
    [
        ("score", 1.5, 400, "0 to 1"),
        ("score", "1", 400, "0 to 1"),
        ("score", None, 400, "0 to 1"),
        ("hint", ["a"], 400, "hint is a text"),
        ("hint", " ", 400, "hint is a text"),
        ("comment", "x" * 20_001, 400, "at most 20000"),
        ("correction", 4, 400, "better answer"),
        ("correction", [], 400, "whole better run"),
        ("correction", ["4"], 400, "[0]"),
        ("correction", [{"role": "assistant", "content": text} for text in ("Buy!", "3")], 400, "nothing may follow"),
        ("correction", [{"role": "wizard", "content": "4"}], 400, "[0].role"),
        ("correction", [{"role": "assistant", "content": 4}], 400, "[0].content"),
        ("correction", [{"role": "assistant", "content": None}], 400, "[0].content"),
        ("correction", [{"role": "assistant", "content": [{"type": "image_url"}]}], 400, "[0].content"),
        ("correction", [{"role": "assistant", "content": "4", "mood": "glad"}], 400, "[0].mood"),
        ("correction", [{"role": "user", "content": "4", "tool_calls": [{}]}], 400, "[0].tool_calls"),
        ("correction", call({"name": "calculator"}), 400, "[0].tool_calls[0]"),
        ("correction", call(3), 400, "[0].tool_calls[0]"),
        ("correction", call({"name": "calculator", "arguments": "{}"}), 400, "whole better run"),
        ("correction", call({"name": "rm", "arguments": "{}"}), 400, "rm"),
        ("correction", [{"role": "user", "content": "Another question"}], 400, "whole better run"),
        ("correction", [{"role": "assistant", "content": "x" * 200_001}], 400, "at most 200000"),
        ("preference", {"over": "chatcmpl-traj_nope"}, 404, "traj_nope"),
        ("preference", {"under": "x"}, 400, "over"),
    ],
)
def test_a_value_that_does_not_fit_its_kind_is_refused(
    client: openai.OpenAI, service: tuple[str, Services], kind: str, value: Any, status: int, said: str
) -> None:
    reply = say(service, response_id=ask(client), kind=kind, value=value)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert said in error["message"]
    assert error["param"] == (None if status == 404 else "value")


def test_a_reply_is_not_better_than_itself(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    reply = ask(client)
    refused = say(service, response_id=reply, kind="preference", value={"over": reply})
    assert refused.status_code == 400
    assert "two responses" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("about", "status", "said"),
    [
        ({}, 400, "exactly one"),
        ({"trajectory_id": "a", "conversation_id": "b"}, 400, "exactly one"),
        ({"response_id": "resp_nope"}, 404, "resp_nope"),
        ({"response_id": "chatcmpl-nope"}, 404, "chatcmpl-nope"),
        ({"conversation_id": "conv-nope"}, 404, "conv-nope"),
    ],
)
def test_a_word_names_one_run_that_there_is(
    service: tuple[str, Services], about: dict[str, str], status: int, said: str
) -> None:
    replies = [say(service, kind="hint", value="x", **about), httpx.get(f"{service[0]}/v1/feedback", params=about)]
    for reply in replies:
        assert reply.status_code == status
        assert said in reply.json()["error"]["message"]


def test_another_tenants_runs_are_not_there(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    run = run_in(service, tenant="rival", conversation_id="conv-rival")
    for about in ({"trajectory_id": run.id}, {"conversation_id": "conv-rival"}):
        assert say(service, kind="hint", value="x", **about).status_code == 404
        assert httpx.get(f"{service[0]}/v1/feedback", params=about).status_code == 404
    assert say(service, response_id=ask(client), kind="preference", value={"over": run.id}).status_code == 404
    assert service[1].ledger.feedback(trajectory_id=run.id) == []


@pytest.mark.parametrize(
    ("kind", "value", "stored"),
    [
        ("score", "0.5", 0.5),
        ("score", "false", 0.0),
        ("correction", "42", "42"),
        ("correction", json.dumps(CALCULATION), CALCULATION),
        ("hint", "Use the tool.", "Use the tool."),
    ],
)
def test_a_word_may_come_in_the_metadata_of_the_next_request(
    client: openai.OpenAI, service: tuple[str, Services], kind: str, value: str, stored: Any
) -> None:
    reply = ask(client)
    ask(client, metadata={"feedback_response_id": reply, "feedback_kind": kind, "feedback_value": value, "trace": "t"})
    assert [said["value"] for said in heard(service, response_id=reply)] == [stored]


def test_a_word_may_come_in_the_metadata_of_the_responses_api(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    reply = client.responses.create(model="nightschool", input="What is 1 + 2?").id
    metadata = {"feedback_response_id": reply, "feedback_kind": "score", "feedback_value": "1"}
    client.responses.create(model="nightschool", input="What is 2 + 2?", metadata=metadata)
    assert [said["value"] for said in heard(service, response_id=reply)] == [1.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feedback_kind": "praise"}, "metadata.feedback_kind"),
        ({"feedback_kind": "score", "feedback_value": "good"}, "metadata.feedback_value"),
        ({"feedback_response_id": "chatcmpl-nope"}, "chatcmpl-nope"),
        ({"feedback_response_id": None}, "exactly one"),
        ({"feedback_value": None}, "metadata.feedback_value"),
        ({"feedback_kind": "correction", "feedback_value": '[{"role": "assistant", "con'}, "expected JSON"),
        ({"feedback_kind": "preference", "feedback_value": "[" * 500}, "expected JSON"),
    ],
)
def test_a_malformed_word_in_the_metadata_is_refused_before_the_run(
    client: openai.OpenAI, service: tuple[str, Services], change: dict[str, Any], said: str
) -> None:
    good = {"feedback_response_id": ask(client), "feedback_kind": "hint", "feedback_value": "Use the tool."}
    metadata = {key: value for key, value in (good | change).items() if value is not None}
    runs = len(service[1].ledger.trajectories())
    with pytest.raises(openai.BadRequestError, match="metadata") as refused:
        ask(client, metadata=metadata)
    assert said in refused.value.message
    assert len(service[1].ledger.trajectories()) == runs


def test_an_operator_decides_about_a_word_and_what_was_decided_has_its_trace(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, server=ServerConfig(keys=True)), pupil) as (url, services):
        database = services.ledger.database
        scopes = [Scope.CHAT, Scope.FEEDBACK]

        def headers(name: str, *more: Scope, tenant: str = "default") -> dict[str, str]:
            key = mint(database, ApiKey(name=name, tenant=tenant, scopes=[*scopes, *more]))
            return {"Authorization": f"Bearer {key}"}

        ann, mia, rival = headers("ann"), headers("mia", Scope.OPERATE), headers("eve", Scope.OPERATE, tenant="rival")
        asked = {"model": "nightschool", "messages": [{"role": "user", "content": "What is 1 + 2?"}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=ann, timeout=60).json()["id"]
        word = {"response_id": reply, "kind": "hint", "value": "Use the tool."}
        said = httpx.post(f"{url}/v1/feedback", json=word, headers=ann).json()["id"]

        def decide(by: dict[str, str], trust: str, about: str = said) -> httpx.Response:
            body = {"trust": trust, "reason": "I asked her."}
            return httpx.post(f"{url}/v1/feedback/{about}/trust", json=body, headers=by)

        tries = [(ann, "trusted", said), (rival, "trusted", said), (mia, "quarantined", said), (mia, "trusted", "fb_x")]
        assert [decide(*each).status_code for each in tries] == [403, 404, 400, 404]
        line = services.ledger.watermark()["feedback"]
        for trust in ("trusted", "rejected"):
            decided = decide(mia, trust).json()
            assert (decided["id"], decided["trust"], decided["trust_reason"]) == (said, trust, "key:mia: I asked her.")
        behind = services.ledger.feedback(after_seq=line)
        assert [(f.kind, f.author, f.trajectory_id) for f in behind] == [
            ("comment", "key:mia", reply.removeprefix("chatcmpl-"))
        ] * 2


def test_a_key_without_the_scope_brings_no_word_along_either(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, server=ServerConfig(keys=True))
    with running(settings, pupil) as (url, services):
        chatty = mint(services.ledger.database, ApiKey(name="bot", scopes=[Scope.CHAT]))
        whole = mint(services.ledger.database, ApiKey(name="ann", scopes=[Scope.CHAT, Scope.FEEDBACK]))
        with openai.OpenAI(base_url=f"{url}/v1", api_key=chatty, max_retries=0) as client:
            reply = ask(client)
            word = {"feedback_response_id": reply, "feedback_kind": "score", "feedback_value": "1"}
            with pytest.raises(openai.PermissionDeniedError):
                ask(client, metadata=word)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=whole, max_retries=0) as client:
            ask(client, metadata=word)
        (said,) = services.ledger.feedback(trajectory_id=reply.removeprefix("chatcmpl-"))
        assert said.author == "key:ann"
