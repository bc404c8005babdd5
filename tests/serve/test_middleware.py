"""What every request meets before its route: ids and timing, limits, retries with a key, readiness, draining."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatReply, ChatRequest, ScriptedModel
from memory import keys
from memory.errors import LedgerError, ModelUnavailableError
from memory.keys import ApiKey
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.serve.fakes import Running, running, running_server, settings_in

asked: list[str] = []
held = threading.Event()
engine_away = threading.Event()


def pupil(request: ChatRequest) -> str | Exception:
    if engine_away.is_set():
        return ModelUnavailableError("the model cannot be reached")
    return "Action: finish(3)" if request.regex else "Hello."


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    config = ServerConfig(keys=False, max_body_mb=1, max_upload_mb=2)
    with running(settings_in(tmp_path_factory.mktemp("middleware"), server=config), pupil) as started:
        yield started


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model notes what it is asked, and answers what it is asked slowly once `held` is set."""
    answer = ScriptedModel.complete

    async def complete(self: ScriptedModel, request: ChatRequest) -> ChatReply:
        asked.append(str(request.messages[-1]["content"]))
        slow = "slowly" in asked[-1]
        while slow and not held.is_set():
            await asyncio.sleep(0.01)
        return await answer(self, request)

    monkeypatch.setattr(ScriptedModel, "complete", complete)
    asked.clear()
    held.clear()
    engine_away.clear()
    yield
    held.set()


def chat(text: str = "1 + 2?", **extra: Any) -> dict[str, Any]:
    return {"model": "nightschool", "messages": [{"role": "user", "content": text}], **extra}


def post(url: str, body: Any, key: str | None = None, path: str = "/v1/chat/completions", **kwargs: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    return httpx.post(url + path, json=body, headers=headers, timeout=30, **kwargs)


def until(happened: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 400),
    ],
)
def test_every_reply_has_a_request_id_and_its_time(
    service: tuple[str, Services], method: str, path: str, status: int
) -> None:
    reply = httpx.request(method, service[0] + path, headers={"x-request-id": "mine-1"})
    assert reply.status_code == status
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.headers["openai-processing-ms"].isdigit()
    if status >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>"])
def test_a_request_id_that_is_not_sane_is_replaced(service: tuple[str, Services], given: str) -> None:
    reply = httpx.get(f"{service[0]}/healthz", headers={"x-request-id": given})
    assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])


def test_the_official_client_finds_the_request_id(service: tuple[str, Services]) -> None:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none") as client:
        assert str(client.chat.completions.create(**chat())._request_id).startswith("req_")


def test_an_unknown_url_and_a_wrong_method_say_so(service: tuple[str, Services]) -> None:
    unknown = httpx.get(f"{service[0]}/v1/nothing").json()["error"]
    assert (unknown["code"], "GET /v1/nothing" in unknown["message"]) == ("unknown_url", True)
    wrong = httpx.put(f"{service[0]}/v1/models")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "GET"


def test_a_bug_is_an_openai_error_with_an_id_and_without_its_trace(
    service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the secret plan")

    monkeypatch.setattr("serve.promotion.model_names", broken)
    reply = httpx.get(f"{service[0]}/v1/models")
    assert reply.status_code == 500
    assert reply.headers["x-request-id"]
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret plan" not in reply.text


def test_a_body_over_the_limit_is_413(service: tuple[str, Services]) -> None:
    big = json.dumps(chat("x" * (1 << 20))).encode()

    def dripping() -> Iterator[bytes]:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    for content in (big, dripping()):
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{service[0]}/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code == 413, reply.text
        assert reply.json()["error"]["code"] == "request_too_large"
        assert reply.headers["x-request-id"]


def test_an_upload_may_be_larger_but_not_endless(service: tuple[str, Services]) -> None:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as client:
        row = b'{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": %s}\n'
        line = json.dumps(chat("x" * 1000)).encode()
        file = client.files.create(file=b"".join(row % (n, line) for n in range(1200)), purpose="batch")
        assert file.bytes > 1 << 20
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=b"x" * (3 << 20), purpose="batch")
        assert refused.value.status_code == 413


def test_a_retry_gets_the_stored_words_and_no_second_run(service: tuple[str, Services]) -> None:
    first, again = (post(service[0], chat("once"), "retry-1") for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.content == again.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(asked) == 1


def test_every_post_can_be_retried(service: tuple[str, Services]) -> None:
    run = post(service[0], chat()).json()["nightschool"]["trajectory_id"]
    said = {"trajectory_id": run, "kind": "score", "value": 1}
    first, again = (post(service[0], said, "retry-feedback", "/v1/feedback") for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"


def test_a_reply_that_cannot_be_stored_is_not_sent(
    service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise LedgerError("the ledger has no room on its disk")

    with monkeypatch.context() as patched:
        patched.setattr("memory.replies.keep", full)
        refused = post(service[0], chat("durable"), "durable-1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
    again = post(service[0], chat("durable"), "durable-1")
    assert (again.status_code, len(asked)) == (200, 1), "the run itself was committed: it is not made twice"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", chat("another")), ("/v1/feedback", chat("mismatch"))],
    ids=["another body", "another path"],
)
def test_a_key_used_for_another_request_is_409(service: tuple[str, Services], path: str, body: Any) -> None:
    key = f"mismatch-{path}"
    assert post(service[0], chat("mismatch"), key).status_code == 200
    refused = post(service[0], body, key, path)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "idempotency_key_reused"


def test_a_mistake_is_replayed_but_a_failure_is_tried_again(service: tuple[str, Services]) -> None:
    wrong = [post(service[0], {"model": "nightschool"}, "mistake") for _ in range(2)]
    assert [r.status_code for r in wrong] == [400, 400]
    assert wrong[1].headers["idempotent-replayed"] == "true"
    engine_away.set()
    failed = post(service[0], chat("later"), "failure")
    assert failed.status_code == 503
    assert failed.headers["retry-after"]
    engine_away.clear()
    better = post(service[0], chat("later"), "failure")
    assert better.status_code == 200
    assert "idempotent-replayed" not in better.headers


def test_a_duplicate_waits_for_the_first_and_gets_its_words(service: tuple[str, Services]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, service[0], chat("slowly"), "twice")
        until(lambda: asked)
        second = pool.submit(post, service[0], chat("slowly"), "twice")
        other = post(service[0], chat("something else"), "twice")
        assert other.status_code == 409
        held.set()
        assert first.result().json() == second.result().json()
    assert second.result().headers["idempotent-replayed"] == "true"
    assert len(asked) == 1


def test_a_duplicate_does_not_wait_for_ever(service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.idempotency.WAIT_S", 0.1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, service[0], chat("slowly"), "in-progress")
        until(lambda: asked)
        refused = post(service[0], chat("slowly"), "in-progress")
        held.set()
        assert first.result().status_code == 200
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "idempotency_in_progress"
    assert refused.headers["retry-after"]


def test_a_stream_is_replayed_from_its_run_and_not_mistaken_for_another(service: tuple[str, Services]) -> None:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as client:

        def stream(text: str) -> tuple[str, str]:
            headers = {"Idempotency-Key": "stream-1"}
            chunks = list(client.chat.completions.create(**chat(text), stream=True, extra_headers=headers))
            return chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

        assert stream("count") == stream("count")
        assert len(asked) == 1
        with pytest.raises(openai.ConflictError):
            stream("something else")


def test_an_upload_can_be_retried_although_its_boundary_differs(service: tuple[str, Services]) -> None:
    rows = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n' * 2
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as client:

        def upload(content: bytes) -> str:
            headers = {"Idempotency-Key": "upload-1"}
            return client.files.create(file=content, purpose="batch", extra_headers=headers).id

        assert upload(rows) == upload(rows)
        with pytest.raises(openai.ConflictError):
            upload(rows + b"\n")


def test_an_idempotency_key_of_no_use_is_400(service: tuple[str, Services]) -> None:
    assert post(service[0], chat(), "k" * 256).status_code == 400


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("guarded"), server=ServerConfig(keys=True))
    with running(settings, pupil) as started:
        yield started


def bearer(services: Services, **limits: int) -> dict[str, str]:
    made = ApiKey.model_validate({"name": "app", "scopes": ["chat"], **limits})
    return {"Authorization": f"Bearer {keys.mint(services.ledger.database, made)}"}


def test_a_key_is_held_to_its_requests_per_minute(guarded: tuple[str, Services]) -> None:
    url, services = guarded
    mine, others = bearer(services, requests_per_minute=2), bearer(services, requests_per_minute=2)
    replies = [httpx.get(f"{url}/v1/models", headers=mine) for _ in range(3)]
    assert [r.status_code for r in replies] == [200, 200, 429]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0", "0"]
    assert {r.headers["x-ratelimit-limit-requests"] for r in replies} == {"2"}
    assert re.fullmatch(r"(\d+m)?\d+s|\d+ms", replies[2].headers["x-ratelimit-reset-requests"])
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30
    assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"
    reused = [
        httpx.post(f"{url}/v1/feedback", json={"n": n}, headers=others | {"Idempotency-Key": "n"}) for n in (1, 2)
    ]
    assert [r.status_code for r in reused] == [403, 409]
    assert reused[1].headers["x-ratelimit-remaining-requests"] == "0"


def test_a_used_up_allowance_comes_back_with_time(guarded: tuple[str, Services]) -> None:
    url, services = guarded
    mine = bearer(services, requests_per_minute=600)
    codes = [httpx.get(f"{url}/v1/models", headers=mine).status_code for _ in range(3)]
    before = int(httpx.get(f"{url}/v1/models", headers=mine).headers["x-ratelimit-remaining-requests"])
    time.sleep(0.5)
    after = int(httpx.get(f"{url}/v1/models", headers=mine).headers["x-ratelimit-remaining-requests"])
    assert codes == [200] * 3
    assert after >= before


def test_a_key_is_held_to_its_requests_at_once(guarded: tuple[str, Services]) -> None:
    url, services = guarded
    mine = bearer(services, max_concurrent=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=chat("slowly"), headers=mine, timeout=30)
        until(lambda: asked)
        refused = httpx.get(f"{url}/v1/models", headers=mine)
        held.set()
        assert first.result().status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
    assert refused.headers["retry-after"]
    assert httpx.get(f"{url}/v1/models", headers=mine).status_code == 200


def test_readiness_says_what_goes_on(service: tuple[str, Services]) -> None:
    url, services = service
    engine: Any = services.engine
    residency: Any = services.residency
    ready = httpx.get(f"{url}/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert (ready.json()["night"], ready.json()["swapping"], ready.json()["draining"]) == (None, False, False)
    engine.status, residency.swapping = "restarting", True
    try:
        loading = httpx.get(f"{url}/readyz")
    finally:
        engine.status, residency.swapping = "ready", False
    assert loading.status_code == 503
    assert (loading.json()["engine"], loading.json()["swapping"]) == ("restarting", True)
    assert loading.headers["retry-after"]


def test_a_full_service_says_when_to_come_back(tmp_path: Path) -> None:
    config = ServerConfig(keys=False, max_concurrent=1, max_waiting=1)
    with running(settings_in(tmp_path, server=config), pupil) as (url, _), ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(post, url, chat(f"slowly {n}")) for n in range(2)]
        until(lambda: httpx.get(f"{url}/readyz").json()["runs"] == 2)
        refused = post(url, chat("one more"))
        held.set()
        assert [each.result().status_code for each in inside] == [200, 200]
    assert refused.status_code == 429
    assert refused.headers["retry-after"]


def test_a_stopping_service_ends_its_streams_and_takes_nothing_new(tmp_path: Path) -> None:
    with running_server(settings_in(tmp_path), pupil) as started, ThreadPoolExecutor(1) as pool:
        with httpx.Client(base_url=started.url) as kept:
            assert kept.get("/healthz").status_code == 200
            streaming = pool.submit(_streamed, started)
            until(lambda: asked)
            started.server.handle_exit(signal.SIGTERM, None)
            refused = kept.post("/v1/chat/completions", json=chat())
            ready = httpx.get(f"{started.url}/readyz")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            held.set()
            assert streaming.result() == "3"
        until(lambda: not started.server.started or started.server.should_exit)


def _streamed(started: Running) -> str:
    with openai.OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(**chat("slowly"), stream=True))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
