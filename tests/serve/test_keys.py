"""Keys as their holders meet them: scopes, tenants, expiry, revocation, signatures; the operator's own way in."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest
from memory import keys
from memory.keys import ApiKey
from memory.ledger import Ledger
from memory.records import now
from serve.client import Client
from serve.server import bind, local_url
from serve.settings import ServerConfig
from serve.wiring import Services, announce
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in
from tests.serve.test_cli import assert_refused, nightschool


def pupil(request: ChatRequest) -> str | Exception:
    return "Action: finish(3)" if request.regex else "Hello."


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("keys"), server=ServerConfig(keys=True))
    with running(settings, pupil) as started:
        yield started


def mint(services: Services, **given: Any) -> str:
    """The secret of a new key."""
    made = ApiKey.model_validate({"name": "ann", "scopes": ["chat", "feedback"]} | given)
    return keys.mint(services.ledger.database, made)


def sdk(url: str, secret: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)


def ask(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(model="nightschool", messages=[{"role": "user", "content": "1 + 2?"}])


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_key_opens_what_its_scopes_say_and_the_refusal_names_the_scope(service: tuple[str, Services]) -> None:
    url, services = service
    with sdk(url, mint(services, scopes=["chat"])) as client:
        assert ask(client).choices[0].message.content == "3"
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError, match="operate") as refused:
            client.fine_tuning.jobs.list()
        assert refused.value.code == "insufficient_scope"
    with (
        sdk(url, mint(services, scopes=["feedback"])) as client,
        pytest.raises(openai.PermissionDeniedError, match="chat"),
    ):
        ask(client)


def test_no_route_is_open_to_a_key_without_its_scope(service: tuple[str, Services]) -> None:
    url, services = service
    headers = bearer(mint(services, scopes=["memory"]))
    open_to_it = [
        (path, method, reply.status_code)
        for path, methods in httpx.get(f"{url}/openapi.json").json()["paths"].items()
        if path.startswith("/v1/") and not path.startswith(("/v1/memory", "/v1/knowledge"))
        for method in methods
        for reply in [httpx.request(method.upper(), url + re.sub(r"\{.*?\}", "1", path), json={}, headers=headers)]
        if reply.status_code != 403
    ]
    assert open_to_it == []


def test_every_route_but_health_asks_for_a_key(service: tuple[str, Services]) -> None:
    url, _ = service
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    open_to_all = [
        (path, method)
        for path, methods in paths.items()
        for method in methods
        if httpx.request(method.upper(), url + path.replace("{", "").replace("}", "")).status_code != 401
    ]
    assert sorted(open_to_all) == [("/healthz", "get"), ("/readyz", "get")]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer nope", "Basic abc", "sk-ns-x", "Bearer é"])
def test_without_a_valid_key_it_is_401(service: tuple[str, Services], header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    reply = httpx.get(f"{service[0]}/v1/models", headers=headers)  # type: ignore[arg-type]
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


def test_an_expired_key_and_a_revoked_one_are_401(service: tuple[str, Services]) -> None:
    url, services = service
    with (
        sdk(url, mint(services, expires_at=now() - timedelta(seconds=1))) as client,
        pytest.raises(openai.AuthenticationError, match="expired"),
    ):
        ask(client)
    gone = ApiKey.model_validate({"name": "gone", "scopes": ["chat"], "revoked_at": now()})
    with (
        sdk(url, keys.mint(services.ledger.database, gone)) as client,
        pytest.raises(openai.AuthenticationError, match="revoked"),
    ):
        ask(client)


def test_a_key_revoked_through_the_service_ends_at_once(service: tuple[str, Services]) -> None:
    url, services = service
    admin = bearer(mint(services, scopes=["admin"]))
    made = httpx.post(f"{url}/v1/keys", json={"name": "bob", "expires_in": "30d"}, headers=admin)
    assert made.headers["cache-control"] == "no-store"
    with sdk(url, made.json()["secret"]) as client:
        ask(client)
        revoked = httpx.delete(f"{url}/v1/keys/{made.json()['id']}", headers=admin)
        assert revoked.json()["revoked_at"]
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            ask(client)
    listed = httpx.get(f"{url}/v1/keys", headers=admin)
    assert made.json()["id"] in [key["id"] for key in listed.json()["data"]]
    assert made.json()["secret"] not in listed.text


def test_a_secret_is_not_kept_for_a_retry(service: tuple[str, Services]) -> None:
    url, services = service
    headers = bearer(mint(services, scopes=["admin"])) | {"Idempotency-Key": "make-a-key"}
    first = httpx.post(f"{url}/v1/keys", json={"name": "once"}, headers=headers)
    again = httpx.post(f"{url}/v1/keys", json={"name": "once"}, headers=headers)
    assert (first.status_code, again.status_code) == (200, 409)
    assert len([k for k in keys.all_keys(services.ledger.database) if k.name == "once"]) == 1


def test_an_admin_of_one_tenant_has_no_say_in_another(service: tuple[str, Services]) -> None:
    url, services = service
    theirs = ApiKey.model_validate({"name": "victim", "scopes": ["chat"], "tenant": "other"})
    keys.mint(services.ledger.database, theirs)
    admin = bearer(mint(services, scopes=["admin"], tenant="acme"))
    assert httpx.post(f"{url}/v1/keys", json={"name": "x", "tenant": "other"}, headers=admin).status_code == 400
    assert httpx.post(f"{url}/v1/keys", json={"name": "x"}, headers=admin).json()["tenant"] == "acme"
    assert {k["tenant"] for k in httpx.get(f"{url}/v1/keys", headers=admin).json()["data"]} == {"acme"}
    assert httpx.delete(f"{url}/v1/keys/{theirs.id}", headers=admin).status_code == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["fly"]}, "scopes"),
        ({"name": "a", "expires_in": "soon"}, "expires_in"),
        ({"name": "a", "requests_per_minute": 0}, "requests_per_minute"),
    ],
)
def test_what_makes_no_key_is_a_400_that_names_the_field(
    service: tuple[str, Services], body: dict[str, object], said: str
) -> None:
    reply = httpx.post(f"{service[0]}/v1/keys", json=body, headers=bearer(OPERATOR_TOKEN))
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_tenants_do_not_see_each_other(service: tuple[str, Services]) -> None:
    url, services = service
    ours, theirs = mint(services, tenant="us"), mint(services, tenant="them")
    with sdk(url, ours) as client:
        reply = ask(client)
    run = services.ledger.get_trajectory(reply.id.removeprefix("chatcmpl-"))
    assert run.tenant == "us"
    said = {"response_id": reply.id, "kind": "score", "value": 1}
    assert httpx.post(f"{url}/v1/feedback", json=said, headers=bearer(theirs)).status_code == 404
    assert httpx.post(f"{url}/v1/feedback", json=said, headers=bearer(ours)).status_code == 200
    with sdk(url, ours) as mine, sdk(url, theirs) as others:
        same: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "shared"}}
        words: list[Any] = [{"role": "user", "content": "1 + 2?"}]
        first = mine.chat.completions.create(model="nightschool", messages=words, **same)
        second = others.chat.completions.create(model="nightschool", messages=words, **same)
    assert first.id != second.id


def test_feedback_is_signed_by_the_key_and_not_by_what_its_holder_claims(service: tuple[str, Services]) -> None:
    url, services = service
    secret = mint(services, name="app")
    with sdk(url, secret) as client:
        reply = ask(client)

    def say(value: float, headers: dict[str, str], **author: str) -> httpx.Response:
        body = {"response_id": reply.id, "kind": "score", "value": value, **author}
        return httpx.post(f"{url}/v1/feedback", json=body, headers=headers)

    say(0.1, bearer(secret))
    say(0.2, bearer(secret), author="eve")
    say(0.3, bearer(OPERATOR_TOKEN))
    say(0.4, bearer(OPERATOR_TOKEN), author="oracle")
    for claimed in ("operator", "Operator-eve", "key:bob"):
        assert say(0.5, bearer(secret), author=claimed).status_code == 400
    authors = [said.author for said in services.ledger.feedback(trajectory_id=reply.id.removeprefix("chatcmpl-"))]
    assert authors == ["key:app", "key:app/eve", "operator", "oracle"]


def test_a_task_knows_the_key_that_asked_and_is_the_same_task_from_another(service: tuple[str, Services]) -> None:
    url, services = service
    asked = {"model": "nightschool", "messages": [{"role": "user", "content": "2 + 1?"}]}

    def caller(headers: dict[str, str], path: str = "chat/completions", **more: Any) -> str | None:
        body = {**({"input": "2 + 1?", "model": "nightschool"} if path == "responses" else asked), **more}
        reply = httpx.post(f"{url}/v1/{path}", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        run = services.ledger.get_trajectory(reply.json()["nightschool"]["trajectory_id"])
        return services.ledger.get_task(run.task_id).caller

    shop = bearer(mint(services, name="shop", scopes=["chat", "batch"]))
    app = bearer(mint(services, name="app", vouches=True))
    assert caller(shop) == caller(shop, "responses") == "key:shop"
    assert caller(app, user="ann") == "app:app"
    assert caller(bearer(OPERATOR_TOKEN)) is None
    named: dict[str, Any] = {"nightschool": {"task_id": "task_from_two_keys"}}
    assert caller(shop, **named) == caller(app, **named) == "key:shop", "whoever asked first"

    with sdk(url, shop["Authorization"].removeprefix("Bearer ")) as client:
        lines = [{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": asked}]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = client.files.create(file=("lines.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        deadline = time.monotonic() + 60
        while (done := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline, done
            time.sleep(0.1)
    (batched,) = [t for t in services.ledger.trajectories() if services.ledger.get_task(t.task_id).source == "batch"]
    assert services.ledger.get_task(batched.task_id).caller == "key:shop"


def test_the_operators_token_opens_everything_with_and_without_keys(
    service: tuple[str, Services], tmp_path: Path
) -> None:
    assert Client(service[0], OPERATOR_TOKEN).get("/v1/keys")["object"] == "list"
    assert Client(service[0], OPERATOR_TOKEN).get("/v1/generations")["data"]


def test_the_token_lies_where_only_the_services_user_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        announce(tmp_path, "http://127.0.0.1:1", "secret")
    finally:
        os.umask(before)
    info = tmp_path / "service.json"
    assert stat.S_IMODE(info.stat().st_mode) == 0o600
    assert json.loads(info.read_text())["token"] == "secret"


def test_a_service_that_listens_everywhere_is_announced_on_loopback() -> None:
    with bind("0.0.0.0", 0) as listener:
        port = listener.getsockname()[1]
        assert local_url(listener) == f"http://127.0.0.1:{port}"


def test_keys_are_made_listed_and_revoked_at_the_command_line(tmp_path: Path) -> None:
    asked = ("--name", "ci", "--tenant", "acme", "--scope", "chat", "--scope", "batch")
    made = nightschool("keys", "create", *asked, "--expires-in", "30d", "--rpm", "60", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'data' / 'ledger.sqlite'}")
    found = keys.find(ledger.database, made.stdout.strip())
    assert found is not None
    assert (found.tenant, found.scopes, found.requests_per_minute) == ("acme", ["batch", "chat"], 60)
    listed = nightschool("keys", "list", cwd=tmp_path)
    assert found.id in listed.stdout
    assert made.stdout.strip() not in listed.stdout
    assert nightschool("keys", "revoke", found.id, cwd=tmp_path).returncode == 0
    again = keys.find(ledger.database, made.stdout.strip())
    assert again is not None
    assert again.revoked_at is not None
    ledger.close()


def test_a_wrong_key_command_is_one_line(tmp_path: Path) -> None:
    assert_refused(nightschool("keys", "create", "--name", "a", "--scope", "fly", cwd=tmp_path), "scopes")
    assert_refused(nightschool("keys", "create", "--name", "a", "--expires-in", "x", cwd=tmp_path), "expires_in")
    assert_refused(nightschool("keys", "revoke", "key_nope", cwd=tmp_path), "key_nope")
