"""The whole loop with fakes at the model, engine and trainer: days, corrections, nights, rejection, rollback."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from agent.calculator import calculate
from agent.llm import ChatRequest
from distill.rehearsal import PROMPTS
from evals.chat import chat_suite
from evals.oracle import oracle, oracle_expression
from evals.suites import TRAINED_FAMILIES, reasoning_gym_suite, reasoning_gym_tasks, save_suite
from memory.night_records import GenerationStatus, NightStatus
from memory.records import MemoryStatus, Principle, PrincipleKind, Task
from serve.batch import line_of, run_lines
from serve.client import Client
from serve.days import correct_value
from serve.settings import Settings
from serve.wiring import Services
from tests.serve.fakes import fake_training, running, settings_in

HELD_OUT = reasoning_gym_suite(TRAINED_FAMILIES, 5, 70_001, "held_out", "held_out")


def test_held_out_is_kept_apart_from_days() -> None:
    assert not HELD_OUT.fingerprints & {t.fingerprint for t in day(1)}


def day(number: int) -> list[Task]:
    return reasoning_gym_tasks(TRAINED_FAMILIES, 4, 100 + number, source=f"day-{number}")


ANSWERS = {task.question: oracle_expression(task) for task in [*day(1), *day(2), *(i.task for i in HELD_OUT.tasks)]}
CHAT = {item.task.question: item.task for item in chat_suite().tasks}


def pupil(request: ChatRequest) -> str:
    """Generation 0 guesses, 1 has learned to use the tool, 2 has forgotten how to chat."""
    generation = 0 if request.model == "base" else int(request.model.split("@")[0].removeprefix("gen-"))
    last = request.messages[-1]["content"]
    if last in PROMPTS:
        return "Gladly."
    if last in CHAT:
        verifier = CHAT[last].verifier
        said = (verifier.args["any"] if verifier else None) or ["well"]
        kind = f"It is {said[0]}, as far as I know, good friend of mine."
        return "Action: finish(1)" if generation == 2 else kind
    if "[DESCRIPTION]" in last:
        return "[DESCRIPTION]: Use the tool for every step.\n[STRUCTURE]: [(agent, uses, tool)]"
    if last.startswith("Observation: "):
        return f"Action: finish({last.removeprefix('Observation: ')})"
    return f"Action: calc({ANSWERS[last]})" if generation else "Action: finish(0)"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    # The trainer is a process of its own with torch in it; tests/distill runs it for real.
    monkeypatch.setattr("serve.stages.training.launch.run", fake_training)
    made = settings_in(tmp_path)
    for suite in (HELD_OUT, chat_suite()):
        save_suite(suite, made.suites_dir / f"{suite.name}.jsonl")
    return made


def live(client: Client, number: int) -> dict[int, dict]:
    return run_lines(
        client, list(enumerate(map(line_of, day(number)))), run_id=f"day-{number}", on_reply=lambda _n, _r: None
    )


def sleep_through(client: Client, **options: Any) -> dict:
    job = client.post("/v1/fine_tuning/jobs", options)
    while (job := client.get(f"/v1/fine_tuning/jobs/{job['id']}"))["status"] == "running":
        time.sleep(0.05)
    return job


def test_a_day_of_corrections_makes_a_better_champion_and_a_forgetful_one_is_rejected(settings: Settings) -> None:
    with running(settings, pupil) as (url, services):
        client, ledger = Client(url), services.ledger
        replies = live(client, 1)
        assert not any(r["nightschool"]["outcome"]["score"] for r in replies.values())
        for number, task in enumerate(day(1)):
            said = {
                "response_id": replies[number]["id"],
                "kind": "correction",
                "value": correct_value(task),
                "author": "u",
            }
            assert client.post("/v1/feedback", said)["trust"] == "quarantined"

        first = sleep_through(client)
        assert first["nightschool"]["status"] == NightStatus.PROMOTED, first
        assert first["fine_tuned_model"] == "nightschool:gen-1"
        assert ledger.champion().number == 1
        assert len(ledger.past_runs(status=MemoryStatus.ACTIVE)) == len(day(1))
        assert {f.trust for f in ledger.feedback()} == {"trusted"}
        examples = [e for e in ledger.examples(first["id"]) if e.recipe != "rehearsal"]
        assert any(e.with_memory for e in examples)
        assert any(not e.with_memory for e in examples)
        assert not {ledger.get_task(e.task_id).fingerprint for e in examples} & HELD_OUT.fingerprints

        again = live(client, 2)
        assert all(r["nightschool"]["outcome"]["score"] == 1 for r in again.values())
        assert {r["nightschool"]["generation"] for r in again.values()} == {1}
        assert all(r["nightschool"]["recalled"] for r in again.values())

        foretold = client.post("/v1/fine_tuning/jobs/estimate", {})
        idle = sleep_through(client)
        assert idle["nightschool"]["status"] == NightStatus.SKIPPED
        assert idle["nightschool"]["reasons"] == foretold["reasons"][1:]
        assert "no new run failed" in foretold["reasons"][1]
        assert foretold["would_skip"] is True
        assert ledger.stage(idle["id"], "train") is None
        # Memory has the day all the same.
        assert len(ledger.past_runs(status=MemoryStatus.ACTIVE)) > len(day(1))

        second = sleep_through(client, recipes=["successes"])
        assert second["nightschool"]["status"] == NightStatus.REJECTED
        assert ledger.generation(2).status is GenerationStatus.REJECTED
        assert ledger.champion().number == 1
        assert any("chat" in reason for reason in second["nightschool"]["reasons"])

        back = client.post("/v1/generations/rollback", {"why": "test"})
        assert (back["from_generation"], back["to_generation"]) == (1, 0)
        assert ledger.champion().number == 0


def test_memory_edited_between_champion_and_candidate_costs_another_exam_and_not_the_night(settings: Settings) -> None:
    edits: list[Services] = []

    def meddling(request: ChatRequest) -> str:
        if request.model != "base" and edits:
            text = "Check the sign of every number."
            edits.pop().ledger.add_principle(Principle(kind=PrincipleKind.GUIDING, text=text, sources=[]))
        return pupil(request)

    with running(settings, meddling) as (url, services):
        client = Client(url)
        replies = live(client, 1)
        for number, task in enumerate(day(1)):
            said = {"kind": "correction", "value": correct_value(task), "author": "u"}
            client.post("/v1/feedback", {"response_id": replies[number]["id"], **said})
        edits.append(services)
        night = sleep_through(client)
        assert night["nightschool"]["status"] == NightStatus.PROMOTED, night["nightschool"]["reasons"]
        events = client.get(f"/v1/fine_tuning/jobs/{night['id']}/events", limit=1000)["data"]
        assert any("once more" in event["message"] for event in events)
        # Of all suites and both generations, the suite that was run again included.
        counts = [event["data"] for event in reversed(events) if "stage_done" in event["data"]]
        runs = sum(len(evaluation.outcomes) for evaluation in services.ledger.evaluations(night_id=night["id"]))
        assert (counts[0]["stage_done"], counts[-1]["stage_done"], counts[-1]["stage_total"]) == (0, runs, runs)
        assert [c["stage_done"] for c in counts] == sorted(c["stage_done"] for c in counts)


def test_the_oracle_of_the_demo_is_right() -> None:
    assert all(oracle(task, calculate)[-1]["content"] for task in day(1))
