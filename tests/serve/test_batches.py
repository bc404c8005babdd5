"""Files and batches as the official OpenAI client meets them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest
from memory import batches, files, keys
from memory.batches import Batch, BatchStatus, Line, LineResult, LineStatus
from memory.errors import ConfigError, ContextLengthError, ModelUnavailableError
from memory.files import FilePurpose
from memory.keys import ApiKey, Scope
from memory.records import now
from serve import durable
from serve.batch_lines import MAX_LINE_BYTES
from serve.settings import BatchConfig, ServerConfig
from serve.wiring import Services
from tests.serve.fakes import running, services_in, settings_in

CHAT = "/v1/chat/completions"
away: set[str] = set()
"""Questions for which the engine is away."""


def pupil(request: ChatRequest) -> str | Exception:
    last = request.messages[-1]["content"]
    if last in away:
        return ModelUnavailableError("the model cannot be reached: connection refused")
    if "too long" in last:
        return ContextLengthError("the prompt does not fit the model's context: 9000 > 2048")
    return "Action: finish(3)" if request.regex else "Hello there."


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("batches"), batch=BatchConfig(concurrency=4))
    with running(settings, pupil) as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def line(custom_id: str, text: str = "What is 1 + 2?", **body: Any) -> dict[str, Any]:
    asked = {"model": "nightschool", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": asked}


def upload(client: openai.OpenAI, lines: list[Any] | bytes) -> str:
    data = lines if isinstance(lines, bytes) else "\n".join(json.dumps(each) for each in lines).encode()
    return client.files.create(file=("lines.jsonl", data), purpose="batch").id


def submit(client: openai.OpenAI, lines: list[Any] | bytes, endpoint: Any = CHAT) -> Any:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", metadata={"for": "tests"}
    )


def ended(client: openai.OpenAI, batch_id: str, patience_s: float = 60) -> Any:
    deadline = time.monotonic() + patience_s
    while (batch := client.batches.retrieve(batch_id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


def completed(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    return counts.completed if counts else 0


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    read = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert all(set(each) == {"id", "custom_id", "response", "error"} for each in read)
    return {each["custom_id"]: each for each in read}


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.files.create(file=("täglich.jsonl", b"\x00some bytes\r\n"), purpose="user_data")
    assert (made.bytes, made.filename, made.purpose, made.status) == (13, "täglich.jsonl", "user_data", "processed")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == b"\x00some bytes\r\n"
    assert [f.id for f in client.files.list(purpose="user_data")] == [made.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_files_are_listed_in_pages_that_follow_each_other(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}", b"x"), purpose="evals").id for i in range(5)]
    assert [f.id for f in client.files.list(purpose="evals", limit=2)] == made[::-1]
    assert [f.id for f in client.files.list(purpose="evals", limit=2, order="asc")] == made


def test_a_large_upload_passes_through(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 40_000
    made = client.files.create(
        file=("large", data), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert client.files.content(made.id).read() == data
    assert made.expires_at == made.created_at + 3600


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"files": {"file": b"x"}}, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch_output"}}, "purpose"),
        ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, "other"),
        ({"files": {"purpose": (None, "batch")}}, "file: missing"),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "colour": "red"}}, "colour"),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "1"}}, "expires_after"),
        ({"json": {"purpose": "batch"}}, "multipart"),
        ({"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form"),
    ],
)
def test_a_bad_upload_is_refused_by_field(service: tuple[str, Services], form: dict[str, Any], said: str) -> None:
    reply = httpx.post(f"{service[0]}/v1/files", **form)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert not list(service[1].settings.files_dir.glob("*.part"))


def test_a_batch_runs_every_line_and_scores_it_as_it_lands(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    mapped = {"nightschool.reference": "4", "nightschool.verifier": "numeric", "nightschool.workload": "sums"}
    batch = submit(
        client,
        [
            line("good", nightschool={"reference": "3"}),
            line("wrong", metadata=mapped),
            line("plain", model="champion"),
            line("long", "this is too long"),
            line("unknown", model="gpt-4"),
            line("field", logit_bias={"1": 2}, temperature=9),
            line("stream", stream=True),
        ],
    )
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
    done = ended(client, batch.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (7, 3, 4)
    assert done.metadata == {"for": "tests"}
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
    assert set(good) == {"good", "wrong", "plain"}
    reply = good["good"]["response"]
    assert (reply["status_code"], reply["body"]["choices"][0]["message"]["content"]) == (200, "3")
    assert reply["body"]["nightschool"]["outcome"]["score"] == 1.0
    assert good["wrong"]["response"]["body"]["nightschool"]["outcome"]["score"] == 0.0
    ledger = service[1].ledger
    run = ledger.get_trajectory(good["wrong"]["response"]["body"]["id"].removeprefix("chatcmpl-"))
    assert (run.workload, ledger.get_task(run.task_id).reference) == ("sums", "4")
    codes = {name: each["response"]["status_code"] for name, each in bad.items()}
    assert codes == {"long": 400, "unknown": 404, "field": 400, "stream": 400}
    assert all("message" in each["response"]["body"]["error"] for each in bad.values())
    assert client.files.retrieve(str(done.output_file_id)).purpose == "batch_output"


@pytest.mark.parametrize(
    ("verifier", "said"),
    [("numeric", None), ('{"name": "numeric", "args": {"tolerance": 0.5}}', None), ("{", "JSON"), ("guess", "guess")],
)
def test_metadata_scores_a_chat_as_well(client: openai.OpenAI, verifier: str, said: str | None) -> None:
    metadata = {"nightschool.reference": "3.0", "nightschool.verifier": verifier}

    def ask() -> Any:
        messages: Any = [{"role": "user", "content": "What is 1 + 2?"}]
        return client.chat.completions.create(model="nightschool", messages=messages, metadata=metadata)

    if said is None:
        assert ask().model_extra["nightschool"]["outcome"]["score"] == 1.0
        return
    with pytest.raises(openai.BadRequestError, match=said):
        ask()


def test_responses_come_in_batches_and_are_stored(client: openai.OpenAI, service: tuple[str, Services]) -> None:
    path = "/v1/responses"
    bodies = [
        {"model": "nightschool", "input": "What is 1 + 2?", "metadata": {"nightschool.reference": "3"}},
        {"model": "nightschool", "input": "And?", "previous_response_id": "resp_none"},
        {"model": "nightschool", "input": "Hi", "metadata": {"feedback_kind": "score"}},
    ]
    lines = [{"custom_id": str(i), "method": "POST", "url": path, "body": body} for i, body in enumerate(bodies)]
    done = ended(client, submit(client, lines, path).id)
    reply = results(client, done.output_file_id)["0"]["response"]["body"]
    assert client.responses.retrieve(reply["id"]).output_text == "3"
    refused = results(client, done.error_file_id)
    assert "previous_response_id" in refused["1"]["response"]["body"]["error"]["message"]
    assert "/v1/feedback" in refused["2"]["response"]["body"]["error"]["message"]


def test_embeddings_come_in_batches_too(client: openai.OpenAI) -> None:
    path = "/v1/embeddings"
    lines = [
        {"custom_id": str(i), "method": "POST", "url": path, "body": {"model": "embedder", "input": text}}
        for i, text in enumerate(["one", ""])
    ]
    done = ended(client, submit(client, lines, path).id)
    assert len(results(client, done.output_file_id)["0"]["response"]["body"]["data"][0]["embedding"]) > 1
    assert results(client, done.error_file_id)["1"]["response"]["status_code"] == 400


def test_lines_wait_while_the_engine_is_away(client: openai.OpenAI) -> None:
    away.add("Are you there?")
    batch = submit(client, [line("a", "Are you there?"), line("b")])
    deadline = time.monotonic() + 120
    while completed(client, batch.id) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    away.clear()
    assert ended(client, batch.id).request_counts.completed == 2


def test_a_cancelled_batch_finishes_what_runs_and_gives_what_it_has(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    away.add("Are you there?")
    batch = submit(client, [line("done"), *(line(f"w{i}", "Are you there?") for i in range(20))])
    deadline = time.monotonic() + 120
    while completed(client, batch.id) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch.id)
    away.clear()
    assert done.status == "cancelled"
    assert None not in (done.cancelling_at, done.cancelled_at)
    assert set(results(client, done.output_file_id)) == {"done"}
    unrun = results(client, done.error_file_id)
    assert len(unrun) == 20
    assert unrun["w0"]["response"] is None
    assert unrun["w0"]["error"]["code"] == "batch_cancelled"
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_whose_time_is_over_expires_with_what_it_has(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    away.add("Are you there?")
    batch = submit(client, [line("done"), line("late", "Are you there?")])
    deadline = time.monotonic() + 120
    while completed(client, batch.id) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monkeypatch.setattr(batches, "now", lambda: now() + timedelta(days=2))
    done = ended(client, batch.id)
    away.clear()
    assert done.status == "expired"
    assert done.expired_at is not None
    assert set(results(client, done.output_file_id)) == {"done"}
    assert results(client, done.error_file_id)["late"]["error"]["code"] == "batch_expired"


def test_an_ended_batch_cannot_be_cancelled(client: openai.OpenAI) -> None:
    done = ended(client, submit(client, [line("a")]).id)
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(done.id)


BAD = {
    "{": ("invalid_json_line", None),
    "[1]": ("invalid_json_line", None),
    '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}': ("missing_required_parameter", "body"),
    json.dumps(line("") | {}): ("invalid_custom_id", "custom_id"),
    json.dumps(line("x") | {"method": "GET"}): ("invalid_method", "method"),
    json.dumps(line("x") | {"url": "/v1/embeddings"}): ("mismatched_url", "url"),
    json.dumps(line("x") | {"body": []}): ("invalid_body", "body"),
    json.dumps(line("x") | {"colour": "red"}): ("unknown_parameter", "colour"),
    json.dumps(line("first")): ("duplicate_custom_id", "custom_id"),
    "[" * 100_000: ("invalid_json_line", None),
    " " * MAX_LINE_BYTES + "{}": ("line_too_long", None),
}


@pytest.mark.parametrize("bad", BAD, ids=[f"{code}-{i}" for i, (code, _) in enumerate(BAD.values())])
def test_a_bad_line_fails_the_batch_and_is_named_by_number(
    client: openai.OpenAI, service: tuple[str, Services], bad: str
) -> None:
    before = len(service[1].ledger.trajectories())
    file = "\n".join([json.dumps(line("first")), "", bad, json.dumps(line("last"))])
    done = ended(client, submit(client, file.encode()).id)
    assert done.status == "failed"
    assert done.errors is not None
    (error,) = done.errors.data or []
    assert (error.code, error.line, error.param) == (BAD[bad][0], 3, BAD[bad][1])
    assert (done.request_counts.total, done.output_file_id, done.error_file_id) == (0, None, None)
    assert len(service[1].ledger.trajectories()) == before


def test_of_many_bad_lines_the_first_hundred_are_told(client: openai.OpenAI) -> None:
    done = ended(client, submit(client, b"{\n" * 31_415).id)
    errors = done.errors.data or []
    assert [error.line for error in errors] == list(range(1, 101))


def test_a_bad_line_far_down_is_named(client: openai.OpenAI) -> None:
    good = "".join(json.dumps(line(str(i))) + "\n" for i in range(31_414))
    done = ended(client, submit(client, f"{good}oops\n".encode()).id)
    (error,) = done.errors.data or []
    assert error.line == 31_415
    assert done.request_counts.total == 0


def test_more_lines_than_allowed_and_none_at_all_fail(client: openai.OpenAI) -> None:
    many = "".join(json.dumps(line(str(i))) + "\n" for i in range(50_001)).encode()
    for data, code in ((many, "too_many_lines"), (b"\n\n", "empty_file")):
        done = ended(client, submit(client, data).id)
        assert [error.code for error in done.errors.data or []] == [code]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"endpoint": "/v1/completions"}, "endpoint"),
        ({"input_file_id": "file-none"}, "file-none"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_batch_is_refused_by_field(
    client: openai.OpenAI, service: tuple[str, Services], change: dict[str, Any], said: str
) -> None:
    body = {"input_file_id": upload(client, [line("a")]), "endpoint": CHAT, "completion_window": "24h"} | change
    reply = httpx.post(f"{service[0]}/v1/batches", json=body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_a_file_of_another_purpose_makes_no_batch(client: openai.OpenAI) -> None:
    other = client.files.create(file=("x", b"{}"), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError, match="fine-tune"):
        client.batches.create(input_file_id=other, endpoint=CHAT, completion_window="24h")


def test_batches_are_listed_newest_first_in_pages(client: openai.OpenAI) -> None:
    made = [ended(client, submit(client, [line("a")]).id).id for _ in range(3)]
    first = client.batches.list(limit=2)
    assert [b.id for b in first.data] == made[:0:-1]
    assert first.has_more
    assert [b.id for b in client.batches.list(limit=2)][:3] == made[::-1]


def test_files_and_batches_belong_to_their_tenant(tmp_path: Path) -> None:
    config = ServerConfig(keys=True, max_upload_mb=1)
    with running(settings_in(tmp_path, server=config), pupil) as (url, services):

        def client_of(tenant: str, *scopes: Scope) -> openai.OpenAI:
            secret = keys.mint(services.ledger.database, ApiKey(name=tenant, scopes=list(scopes), tenant=tenant))
            return openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)

        ann, bob = client_of("ann", Scope.BATCH), client_of("bob", Scope.BATCH)
        batch = submit(ann, [line("a")])
        done = ended(ann, batch.id)
        for file_id in (done.input_file_id, done.output_file_id):
            for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(file_id)
        for act in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                act(batch.id)
        with pytest.raises(openai.BadRequestError, match="no file"):
            bob.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h")
        assert list(bob.files.list()) == []
        assert list(bob.batches.list()) == []
        assert [t.tenant for t in services.ledger.trajectories()] == ["ann"]
        with pytest.raises(openai.PermissionDeniedError):
            client_of("carl", Scope.CHAT).files.list()
        with pytest.raises(openai.APIStatusError) as refused:
            upload(ann, b"x" * 2_000_000)
        assert refused.value.status_code == 413
        assert not list(services.settings.files_dir.glob("*.part"))


def test_ledger_and_workflows_may_both_live_on_postgresql(tmp_path: Path, postgres_database: str) -> None:
    settings = settings_in(tmp_path, ledger_url=postgres_database, durable_url=postgres_database)
    with running(settings, pupil) as (url, services):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        done = ended(client, submit(client, [line(f"r{i}") for i in range(50)]).id)
        assert done.status == "completed"
        assert len(results(client, done.output_file_id)) == 50
        assert len(services.ledger.trajectories()) == 50
    assert not list((tmp_path / "data").glob("*.sqlite"))


def test_a_database_of_workflows_that_is_not_there_is_said(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, durable_url="postgresql://postgres@127.0.0.1:1/none")
    with (
        services_in(settings, pupil, asyncio.new_event_loop()) as services,
        pytest.raises(ConfigError, match="durable_url") as refused,
    ):
        durable.launch(services)
    assert "\n" not in str(refused.value)


def test_a_batch_that_a_stopped_service_left_goes_on_at_the_next_start(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    away.add("Are you there?")
    with running(settings, pupil) as (url, services):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        batch = submit(client, [line("a"), line("b", "Are you there?")])
        deadline = time.monotonic() + 120
        while completed(client, batch.id) != 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    away.clear()
    with running(settings, pupil) as (url, services):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert ended(client, batch.id).status == "completed"
        assert len(services.ledger.trajectories()) == 2


def test_a_batch_killed_while_it_is_read_or_written_is_whole_after_the_next_start(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    data = "\n".join(json.dumps(line(f"r{i}")) for i in range(1, 7)).encode()
    with services_in(settings, pupil, asyncio.new_event_loop()) as services:
        database = services.ledger.database
        stored = files.store(
            database, settings.files_dir, [data], tenant="default", purpose=FilePurpose.BATCH, filename="in"
        )
        begun, ending = (
            Batch(tenant="default", caller="ann", endpoint=CHAT, input_file_id=stored.id) for _ in range(2)
        )
        for each in (begun, ending):
            batches.add(database, each)
        there = [Line(i, f"r{i}", json.dumps(line("")["body"])) for i in (1, 2, 3)]
        batches.add_lines(database, begun.id, there)
        batches.add_lines(database, ending.id, there)
        batches.advance(database, ending.id, BatchStatus.IN_PROGRESS)
        batches.finish_lines(database, ending.id, [LineResult(i, LineStatus.COMPLETED, f"{i}") for i in (1, 2, 3)])
        batches.advance(database, ending.id, BatchStatus.FINALIZING)
        (settings.files_dir / "file-0.part").write_bytes(b"half an output file")
    with running(settings, pupil) as (url, services):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        read, written = ended(client, begun.id), ended(client, ending.id)
        assert (read.status, written.status) == ("completed", "completed")
        assert sorted(results(client, read.output_file_id)) == [f"r{i}" for i in range(1, 7)]
        assert client.files.content(written.output_file_id).text == "1\n2\n3\n"
        assert len(services.ledger.trajectories()) == 6
        kept = {stored.id, read.output_file_id, written.output_file_id}
        assert {path.name for path in settings.files_dir.iterdir()} == kept
