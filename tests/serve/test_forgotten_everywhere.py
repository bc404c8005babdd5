"""A user whose words went everywhere is forgotten over the API: no file holds them, and the next night does without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.llm import ChatRequest
from evals.chat import chat_suite
from evals.suites import save_suite
from memory.night_records import NightStatus
from memory.records import MemoryStatus
from serve.client import Client
from serve.demo import correct_value
from tests.serve import test_loop
from tests.serve.fakes import fake_training, running, settings_in

SECRET = "my badger Ünderwood"
QUESTION = f"How many legs has {SECRET}, who lost none?"
ADVICE = f"Count the legs of {SECRET} before you answer."


def pupil(request: ChatRequest) -> str:
    """Knows one answer about the badger, and the demo's tasks as `test_loop`'s does."""
    last = str(request.messages[-1]["content"])
    if SECRET in last and "[DESCRIPTION]" in last:
        return f"[DESCRIPTION]: {ADVICE}\n[STRUCTURE]: [(agent, counts, legs)]"
    if SECRET in last:
        return "Action: finish(4)" if request.regex else f"Four, as far as I know, has {SECRET}."
    return test_loop.pupil(request)


def files_with(folder: Path, text: str) -> list[str]:
    spelled = {form.encode() for form in (text, json.dumps(text)[1:-1], "Ünderwood", "\\u00dcnderwood")}
    everything = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(
        {path.relative_to(folder).as_posix() for path in everything if any(s in path.read_bytes() for s in spelled)}
    )


def ask_everywhere(client: Client) -> None:
    """A reply kept by its Idempotency-Key, a stored response, an upload and a word on a run, all by ann."""
    messages = [{"role": "user", "content": QUESTION}]
    body: dict[str, Any] = {"model": "nightschool", "messages": messages, "user": "ann"}
    scored = body | {"nightschool": {"reference": "4"}}
    reply = client.post("/v1/chat/completions", scored, key="once")
    client.post("/v1/responses", {"model": "champion", "input": QUESTION, "user": "ann"})
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    upload = {"file": ("in.jsonl", json.dumps(line).encode())}
    client.call("POST", "/v1/files", files=upload, data={"purpose": "batch"})
    said = {"response_id": reply["id"], "kind": "hint", "value": ADVICE, "author": "ann"}
    client.post("/v1/feedback", said)


def test_words_that_went_everywhere_are_in_no_file_and_the_next_night_starts_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The trainer is a process of its own with torch in it; tests/distill runs it for real.
    monkeypatch.setattr("serve.stages.training.launch.run", fake_training)
    settings = settings_in(tmp_path)
    for suite in (test_loop.HELD_OUT, chat_suite()):
        save_suite(suite, settings.suites_dir / f"{suite.name}.jsonl")
    with running(settings, pupil) as (url, services):
        client, ledger = Client(url), services.ledger
        replies = test_loop.live(client, 1)
        for number, task in enumerate(test_loop.day(1)):
            word = {"response_id": replies[number]["id"], "kind": "correction", "value": correct_value(task)}
            client.post("/v1/feedback", word | {"author": "u"})
        ask_everywhere(client)
        first = test_loop.sleep_through(client)
        assert first["nightschool"]["status"] == NightStatus.PROMOTED, first
        before = files_with(settings.data_dir, SECRET)
        assert any(name.startswith("ledger.sqlite") for name in before)
        assert any(name.startswith(f"nights/{first['id']}/dataset/") for name in before)
        assert any(name.startswith("files/") for name in before)

        told = client.post("/v1/memory/forget", {"tenant": "default", "user": "ann"})
        assert (told["generations"], told["nights"]) == ([1], [first["id"]])
        assert files_with(settings.data_dir, SECRET) == []
        assert len(ledger.past_runs(status=MemoryStatus.ACTIVE)) == len(test_loop.day(1))

        second = test_loop.sleep_through(client)
        stage = ledger.stage(second["id"], "snapshot")
        assert stage is not None
        assert stage.output["train_from"] == "base"
        examples = ledger.examples(second["id"])
        assert len([e for e in examples if e.recipe != "rehearsal"]) >= len(test_loop.day(1))
        assert not [e.id for e in examples if "Ünderwood" in e.model_dump_json()]
        assert ledger.generation(2).parent == 0
    assert files_with(settings.data_dir, SECRET) == []
