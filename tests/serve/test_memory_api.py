"""`/v1/memory` as its holders meet it: every verb, and every attempt to reach over to another tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from memory import keys, shelf
from memory.keys import ApiKey
from memory.records import MemoryStatus
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("memory"), server=ServerConfig(keys=True))
    with running(settings, lambda _: "Three.") as started:
        yield started


def client(service: tuple[str, Services], tenant: str, *scopes: str) -> httpx.Client:
    """A client with a key of the tenant; scope memory unless others are given."""
    key = ApiKey.model_validate({"name": "ann", "tenant": tenant, "scopes": list(scopes) or ["memory"]})
    secret = keys.mint(service[1].ledger.database, key)
    return httpx.Client(base_url=f"{service[0]}/v1/memory", headers={"Authorization": f"Bearer {secret}"}, timeout=60)


def said(reply: httpx.Response, status: int = 200) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()


def added(api: httpx.Client, text: str, **more: Any) -> str:
    return said(api.post("/items", json={"text": text, **more}))["id"]


def test_a_principle_written_by_hand_is_found_at_once_until_it_retires(
    service: tuple[str, Services],
) -> None:
    with client(service, "farm") as api:
        item = added(api, "Count the cows before the goats.", workload="farm")
        added(api, "Boil the tea for three minutes.", workload="kitchen", kind="cautionary")
        found = said(api.post("/search", json={"query": "counting cows and goats"}))["data"]
        assert found[0]["id"] == item
        assert found[0]["similarity"] > found[1]["similarity"]
        kitchen = said(api.post("/search", json={"query": "counting cows", "workload": "kitchen"}))["data"]
        assert [hit["kind"] for hit in kitchen] == ["cautionary"]
        assert said(api.post("/search", json={"query": "cows", "type": "run"}))["data"] == []
        assert said(api.post(f"/items/{item}/retire", json={"why": "wrong"}))["status"] == "retired"
        assert item not in [h["id"] for h in said(api.post("/search", json={"query": "count cows"}))["data"]]
        said(api.post(f"/items/{item}/restore", json={}))
        assert said(api.post("/search", json={"query": "count cows"}))["data"][0]["id"] == item
        history = said(api.get(f"/items/{item}"))["history"]
        assert [change["why"] for change in history] == ["added", "key:ann: wrong", "key:ann: by hand"]


def test_a_principle_is_reworded_and_pinned_and_a_run_is_not_reworded(service: tuple[str, Services]) -> None:
    with client(service, "words") as api:
        item = added(api, "Old words about trains.")
        assert said(api.post(f"/items/{item}", json={"text": " Look at the timetable. "}))["text"] == (
            "Look at the timetable."
        )
        assert said(api.post("/search", json={"query": "timetable"}))["data"][0]["similarity"] > 0.3
        assert said(api.post(f"/items/{item}/pin", json={}))["pinned"] is True
        assert said(api.post(f"/items/{item}/unpin", json={}))["pinned"] is False
        run = samples.remember(service[1].ledger, "How long is a train?", "words")
        assert said(api.post(f"/items/{run.id}", json={"text": "x"}), 409)["error"]["code"] == "conflict"


def test_a_list_goes_on_from_its_last_id_and_is_filtered(service: tuple[str, Services]) -> None:
    with client(service, "pages") as api:
        ids = [added(api, f"Rule number {n}.") for n in range(5)]
        said(api.post(f"/items/{ids[1]}/retire", json={}))
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True, "last_id": None}
        while page["has_more"]:
            after = {"after": page["last_id"]} if page["last_id"] else {}
            page = said(api.get("/items", params={"limit": 2, **after}))
            seen += [item["id"] for item in page["data"]]
        assert seen == ids
        assert [i["id"] for i in said(api.get("/items", params={"status": "retired"}))["data"]] == [ids[1]]
        assert said(api.get("/items", params={"type": "run"}))["data"] == []
        said(api.get("/items", params={"after": "prin_none"}), 404)


def test_what_is_exported_comes_in_once_and_a_broken_line_not_at_all(service: tuple[str, Services]) -> None:
    with client(service, "out") as api, client(service, "in") as other:
        for n in range(3):
            added(api, f"Line\u2028rule {n}.")
        lines = api.get("/export")
        assert lines.headers["content-type"].startswith("application/x-ndjson")
        assert len(lines.text.strip().split("\n")) == 3
        assert said(api.post("/import", content=lines.content)) == {"object": "memory.import", "added": 0, "known": 3}
        broken = lines.content + b'{"kind": "principle"}\n'
        assert "line 4" in said(other.post("/import", content=broken), 400)["error"]["message"]
        said(other.post("/import", content=b"\xff\xfe"), 400)
        assert said(other.get("/items"))["data"] == []
        assert said(other.post("/import", content=lines.content))["added"] == 3
        assert said(other.post("/import", content=lines.content))["known"] == 3
        assert {hit["tenant"] for hit in said(other.post("/search", json={"query": "rule"}))["data"]} == {"in"}


def test_no_verb_reaches_another_tenants_item(service: tuple[str, Services]) -> None:
    database = service[1].ledger.database
    with client(service, "victim") as theirs, client(service, "thief", "memory", "operate", "admin") as thief:
        item = added(theirs, "The vault opens at nine.")
        before = shelf.get(database, item, tenant="victim")
        reached = [
            thief.get(f"/items/{item}"),
            thief.post(f"/items/{item}", json={"text": "Nothing."}),
            *(thief.post(f"/items/{item}/{verb}", json={}) for verb in ("pin", "unpin", "retire", "restore")),
            thief.get("/items", params={"after": item}),
        ]
        assert [reply.status_code for reply in reached] == [404] * len(reached)
        assert not [reply.text for reply in reached if "vault" in reply.text]
        for reply in (
            thief.get("/items"),
            thief.get("/export"),
            thief.get("/stats"),
            thief.post("/search", json={"query": "The vault opens at nine."}),
        ):
            assert reply.status_code == 200
            assert "vault" not in reply.text
        refused = thief.post("/forget", json={"tenant": "victim"})
        assert said(refused, 400)["error"]["param"] == "tenant"
        assert shelf.get(database, item, tenant="victim") == before
        said(thief.post("/import", content=theirs.get("/export").content))
        assert shelf.get(database, item, tenant="victim") == before


def test_forgetting_takes_an_admin_and_leaves_other_tenants_alone(service: tuple[str, Services]) -> None:
    ledger = service[1].ledger
    with client(service, "gone", "memory", "admin") as api, client(service, "stays") as other:
        secret = added(api, "Zebras sleep standing up.")
        kept = added(other, "Horses sleep standing up.")
        asked: list[str] = []
        for n, user in enumerate(("ann", "bob")):
            task = samples.task(f"Question number {n} of the day?", "gone").model_copy(update={"user": user})
            ledger.add_run(task, samples.trajectory(task))
            asked.append(task.id)
        with client(service, "gone") as reader:
            said(reader.post("/forget", json={"tenant": "gone"}), 403)
        said(api.post("/forget", json={}), 400)
        done = said(api.post("/forget", json={"tenant": "gone", "user": "ann"}))
        assert (done["counts"]["tasks"], done["generations"], done["by"]) == (1, [], "key:ann")
        assert list(ledger.tasks(asked)) == asked[1:]
        assert said(api.get(f"/items/{secret}"))["text"]
        said(api.post("/forget", json={"tenant": "gone"}))
        said(api.get(f"/items/{secret}"), 404)
        assert said(api.post("/search", json={"query": "Zebras"}))["data"] == []
        assert said(other.post("/search", json={"query": "Horses"}))["data"][0]["id"] == kept


def test_the_operator_forgets_for_any_tenant(service: tuple[str, Services]) -> None:
    with client(service, "far") as api:
        added(api, "Something far away.")
        headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}"}
        said(httpx.post(f"{service[0]}/v1/memory/forget", json={"tenant": "far"}, headers=headers, timeout=60))
        assert said(api.get("/items"))["data"] == []


def test_an_index_that_is_lost_is_searched_by_scan_and_made_anew(service: tuple[str, Services]) -> None:
    index = service[1].index
    with client(service, "scan", "memory", "operate") as api:
        item = added(api, "Owls hunt at night.")
        index.fault, index._build = "torn by this test", None
        assert said(api.get("/stats"))["index"] == "broken"
        assert said(api.post("/search", json={"query": "owls at night"}))["data"][0]["id"] == item
        made = said(api.post("/reindex", json={}))
        assert (made["state"], made["items"]) == ("ready", service[1].ledger.count_active())
        assert said(api.post("/search", json={"query": "owls at night"}))["data"][0]["id"] == item
        with client(service, "scan") as reader:
            said(reader.post("/reindex", json={}), 403)


def test_figures_count_what_there_is(service: tuple[str, Services]) -> None:
    with client(service, "figures") as api:
        added(api, "One.")
        said(api.post(f"/items/{added(api, 'Two.')}/retire", json={}))
        counts = said(api.get("/stats"))["counts"]
        assert sorted((c["type"], c["status"], c["items"]) for c in counts) == [
            ("principle", "active", 1),
            ("principle", MemoryStatus.RETIRED.value, 1),
        ]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/items", {"text": "  "}, "text"),
        ("/items", {"text": "x" * 4001}, "text"),
        ("/items", {"text": "x", "kind": "loud"}, "kind"),
        ("/items", {"text": "x", "tenant": "victim"}, "tenant"),
        ("/search", {"query": "x", "limit": 0}, "limit"),
        ("/search", {"query": ""}, "query"),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    service: tuple[str, Services], path: str, body: dict[str, Any], param: str
) -> None:
    with client(service, "fields") as api:
        assert said(api.post(path, json=body), 400)["error"]["param"] == param
