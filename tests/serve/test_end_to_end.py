"""The real thing from end to end: vLLM, TRL, the gate, a hot-load, a rollback, and `kill -9` in between."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from evals.chat import chat_suite
from evals.suites import TRAINED_FAMILIES, Suite, reasoning_gym_suite, reasoning_gym_tasks, save_suite
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, NightStatus
from serve.adapters import adapter_sha256
from serve.batch import line_of, run_lines
from serve.client import Client, stop
from serve.days import correct_value
from tests.serve.conftest import needs_engine
from tests.serve.whole_service import Service, until

pytestmark = needs_engine

FAMILIES = {name: TRAINED_FAMILIES[name] for name in ("gcd", "lcm", "products")}
DAY = reasoning_gym_tasks(FAMILIES, 2, 101, source="test")


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    running = Service(tmp_path / "data", model)
    chat = chat_suite()
    small = Suite(name="chat", role="control", tasks=chat.tasks[:4])
    for suite in (reasoning_gym_suite(FAMILIES, 2, 70_001, "held_out", "held_out"), small):
        save_suite(suite, running.data_dir / "suites" / f"{suite.name}.jsonl")
    yield running
    if running.process is not None:
        stop(running.process)


def test_a_night_survives_kill_9_rejects_a_worse_adapter_and_what_is_promoted_can_be_rolled_back(
    service: Service,
) -> None:
    client = service.start()
    replies = run_lines(client, list(enumerate(map(line_of, DAY))), run_id="day", on_reply=lambda _n, _r: None)
    ledger = Ledger.open(f"sqlite:///{service.data_dir / 'ledger.sqlite'}")
    for number, task in enumerate(DAY):
        said = {"response_id": replies[number]["id"], "kind": "correction", "value": correct_value(task), "author": "u"}
        client.post("/v1/feedback", said)
    recorded = ledger.get_trajectory(replies[0]["nightschool"]["trajectory_id"])
    assert recorded.steps[0].token_ids
    assert recorded.steps[0].prompt_token_ids

    job = client.post("/v1/fine_tuning/jobs", {})
    until(lambda: _events(service.data_dir, job["id"], "train"), "the night's training")
    service.kill()
    assert ledger.night(job["id"]).status is NightStatus.RUNNING

    client = service.start()
    again = run_lines(client, list(enumerate(map(line_of, DAY))), run_id="day", on_reply=lambda _n, _r: None)
    assert {r["id"] for r in again.values()} == {r["id"] for r in replies.values()}, "a finished line was run again"
    ended = until(lambda: _ended(client, job["id"]), "the night's end", 900)
    assert ended["nightschool"]["status"] == NightStatus.REJECTED, ended
    assert [g.status for g in ledger.generations()] == [GenerationStatus.CHAMPION, GenerationStatus.REJECTED]
    assert [s.stage for s in ledger.stages(job["id"])].count("publish") == 1
    assert len(ledger.feedback()) == len(DAY)

    _enter_by_hand(ledger, service.data_dir)
    switched = client.post("/v1/generations/2/promote", {"why": "test"})
    assert switched["to_generation"] == 2
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key=client.token) as sdk:
        reply: Any = sdk.chat.completions.create(model="nightschool", messages=[{"role": "user", "content": "1 + 1?"}])
        assert reply.model_extra["nightschool"]["served_by"] == ledger.generation(2).served_name
        _kill_engine(service)
        reply = sdk.chat.completions.create(
            model="nightschool", messages=[{"role": "user", "content": "2 + 2?"}], timeout=600
        )
        assert reply.model_extra["nightschool"]["generation"] == 2
    back = client.post("/v1/generations/rollback", {"why": "test"})
    assert (back["from_generation"], back["to_generation"]) == (2, 0)
    ledger.close()


def _events(data_dir: Path, night: str, stage: str) -> list[dict[str, Any]]:
    path = data_dir / "nights" / night / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [e for e in map(json.loads, lines) if e["stage"] == stage and e["data"].get("event") == "step"]


def _ended(client: Client, job: str) -> dict[str, Any] | None:
    found = client.get(f"/v1/fine_tuning/jobs/{job}")
    return None if found["status"] == "running" else found


def _enter_by_hand(ledger: Ledger, data_dir: Path) -> None:
    """The rejected adapter once more as a candidate, so that a promotion can be tried on real weights."""
    rejected = ledger.generation(1)
    folder = data_dir / "adapters" / "by-hand"
    shutil.copytree(data_dir / "adapters" / str(rejected.adapter_path), folder)
    ledger.add_generation(
        Generation(
            number=2,
            parent=0,
            base_model=rejected.base_model,
            adapter_path="by-hand",
            adapter_sha256=adapter_sha256(folder),
            status=GenerationStatus.CANDIDATE,
        )
    )


def _kill_engine(service: Service) -> None:
    assert service.process is not None
    launcher = [p for p in psutil.Process(service.process.pid).children() if "vllm_launcher" in " ".join(p.cmdline())]
    assert launcher
    launcher[0].send_signal(signal.SIGKILL)
