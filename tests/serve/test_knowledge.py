"""Documents through the API and the command line, and the agent that reads them, tenant by tenant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from agent.llm import ChatRequest
from memory import keys
from memory.keys import ApiKey
from memory.records import Principle, PrincipleKind
from serve import cli_knowledge
from serve.cli import app
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

PUMPS = b"# Guarantee\n\nThe pump is guaranteed for two years.\n\n# Care\n\nOil the XJ-900 valve every month.\n"
LOOKUPS = ["search_knowledge", "search_experience"]


def pupil(request: ChatRequest) -> str:
    """Looks into documents, then asks experience, then answers with all that it saw."""
    seen = [m["content"] for m in request.messages if str(m["content"]).startswith("Observation:")]
    if len(seen) < 2:
        return ["Action: search_knowledge(how long is the guarantee)", "Action: search_experience(manuals)"][len(seen)]
    return "Action: finish(" + " ".join(" ".join(seen).split()) + ")"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("knowledge"), server=ServerConfig(keys=True))
    with running(settings, pupil) as started:
        yield started


def client(service: tuple[str, Services], tenant: str, *scopes: str) -> httpx.Client:
    key = ApiKey.model_validate({"name": "ann", "tenant": tenant, "scopes": list(scopes) or ["memory", "chat"]})
    secret = keys.mint(service[1].ledger.database, key)
    return httpx.Client(base_url=f"{service[0]}/v1", headers={"Authorization": f"Bearer {secret}"}, timeout=60)


def said(reply: httpx.Response, status: int = 200) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()


def brought(api: httpx.Client, name: str, data: bytes, **fields: str) -> Any:
    return said(api.post("/knowledge/documents", files={"file": (name, data)}, data=fields))


def asked(api: httpx.Client, tools: list[str] | None = None) -> Any:
    extra = {"tools": LOOKUPS if tools is None else tools}
    messages = [{"role": "user", "content": "How long is the pump guaranteed?"}]
    body = {"model": "nightschool", "messages": messages, "max_tokens": 400, "nightschool": extra}
    return said(api.post("/chat/completions", json=body))


def test_a_document_is_found_at_once_and_its_new_version_instead_of_the_old(service: tuple[str, Services]) -> None:
    with client(service, "shop") as api:
        document = brought(api, "pumps.md", PUMPS, source="manuals/pumps.md")
        assert (document["outcome"], document["chunks"], document["source"]) == ("added", 2, "manuals/pumps.md")
        assert brought(api, "pumps.md", PUMPS, source="manuals/pumps.md")["outcome"] == "unchanged"
        [hit, *_] = said(api.post("/knowledge/search", json={"query": "How long is the guarantee?"}))["data"]
        assert (hit["source"], hit["place"], hit["first_line"]) == ("manuals/pumps.md", 'line 3, "Guarantee"', 3)
        again = brought(api, "pumps.md", PUMPS.replace(b"two", b"five"), source="manuals/pumps.md")
        assert (again["outcome"], again["id"]) == ("replaced", document["id"])
        texts = [p["text"] for p in said(api.get(f"/knowledge/documents/{document['id']}"))["passages"]]
        assert texts == ["The pump is guaranteed for five years.", "Oil the XJ-900 valve every month."]
        assert [d["id"] for d in said(api.get("/knowledge/documents"))["data"]] == [document["id"]]
        assert said(api.delete(f"/knowledge/documents/{document['id']}"))["deleted"] is True
        assert said(api.post("/knowledge/search", json={"query": "How long is the guarantee?"}))["data"] == []


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({"file": ("a.exe", b"MZ")}, {}, "file"),
        ({"file": ("a.pdf", b"no")}, {}, "file"),
        ({"other": ("a.txt", b"no")}, {}, "file"),
        ({"file": ("a.txt", b"yes")}, {"colour": "red"}, "colour"),
        ({"file": ("a.txt", b"yes")}, {"source": "x" * 1001}, "source"),
    ],
)
def test_what_cannot_be_read_is_refused_and_named(
    service: tuple[str, Services], files: dict[str, Any], fields: dict[str, str], param: str
) -> None:
    with client(service, "shop") as api:
        reply = api.post("/knowledge/documents", files=files, data=fields)
        assert said(reply, 400)["error"]["param"] == param


def test_the_agent_reads_documents_and_asks_experience_where_its_tools_name_them(
    service: tuple[str, Services],
) -> None:
    rule = Principle(tenant="desk", kind=PrincipleKind.GUIDING, text="Look into the manuals before you answer.")
    service[1].ledger.add_principle(rule)
    with client(service, "desk") as api:
        document = brought(api, "pumps.md", PUMPS)
        answer = asked(api)["choices"][0]["message"]["content"]
        assert "guaranteed for two years" in answer
        assert "Look into the manuals" in answer
        [reply] = [asked(api)]
        run = service[1].ledger.get_trajectory(reply["id"].removeprefix("chatcmpl-"))
        assert {passage.document_id for passage in run.consulted} == {document["id"]}
        assert [(item.id, item.turn) for item in run.recalled] == [(rule.id, 2)]
        plain = asked(api, ["calculator"])["choices"][0]["message"]["content"]
        assert "two years" not in str(plain)


def test_no_verb_and_no_run_reaches_another_tenants_documents(service: tuple[str, Services]) -> None:
    service[1].ledger.add_principle(
        Principle(tenant="victim", kind=PrincipleKind.GUIDING, text="Manuals are in the vault.")
    )
    with client(service, "victim") as theirs, client(service, "thief") as thief:
        document = brought(theirs, "pumps.md", PUMPS)["id"]
        assert thief.get(f"/knowledge/documents/{document}").status_code == 404
        assert thief.delete(f"/knowledge/documents/{document}").status_code == 404
        assert thief.get("/knowledge/documents", params={"after": document}).status_code == 404
        assert said(thief.get("/knowledge/documents"))["data"] == []
        assert said(thief.post("/knowledge/search", json={"query": "XJ-900 guarantee"}))["data"] == []
        answer = asked(thief)["choices"][0]["message"]["content"]
        assert "two years" not in answer
        assert "vault" not in answer
        assert said(theirs.get(f"/knowledge/documents/{document}"))["id"] == document
    with client(service, "victim", "chat") as reader:
        assert reader.get("/knowledge/documents").status_code == 403


def knowledge(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--data-dir", str(folder / "data"), "knowledge", *arguments])


def test_files_are_added_by_hand_and_broken_ones_are_told_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_knowledge, "out", Console(width=300))
    manuals = tmp_path / "manuals"
    (manuals / ".git").mkdir(parents=True)
    (manuals / ".git" / "note.txt").write_text("hidden")
    (manuals / "pumps.md").write_bytes(PUMPS)
    (manuals / "faq.jsonl").write_text('{"text": "Tea is hot.", "title": "Tea"}\n')
    (manuals / "noise.txt").write_bytes(b"\xff\x00")
    done = knowledge(tmp_path, "add", str(manuals), str(tmp_path / "none.txt"))
    assert "2 could not be added" in str(done.exception)
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("added")] == ["added", "added"]
    assert (
        len([line for line in lines if line.endswith(("there is no such file", "zero bytes")) or "UTF-8" in line]) == 2
    )
    assert "unchanged" in knowledge(tmp_path, "add", str(manuals / "pumps.md")).output
    assert "pumps.md" in knowledge(tmp_path, "list").output
    assert "pumps.md" not in knowledge(tmp_path, "list", "--tenant", "other").output
    hits = knowledge(tmp_path, "search", "How long is the guarantee?").output
    assert "two years" in hits
    assert 'line 3, "Guarantee"' in hits
    [document] = {
        word for word in lines[[*map(lambda s: "pumps.md" in s, lines)].index(True)].split() if "doc_" in word
    }
    assert json.loads(knowledge(tmp_path, "show", document).output)["passages"][0]["heading"] == "Guarantee"
    assert "no document" in str(knowledge(tmp_path, "remove", document, "--tenant", "other").exception)
    assert "removed" in knowledge(tmp_path, "remove", document).output
    assert "two years" not in knowledge(tmp_path, "search", "How long is the guarantee?").output
