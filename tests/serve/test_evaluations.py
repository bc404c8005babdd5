"""Evaluations and the nights they decided as different callers see them: nobody reads another tenant's exam."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory import forget, keys
from memory.ledger import Ledger
from memory.night_records import Evaluation, Night, NightStatus, StageRun, TaskOutcome
from memory.records import Purpose
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in

SECRET = "The vault of the farm opens at nine."


def an_exam(ledger: Ledger, night_id: str | None = None) -> None:
    """One suite over the tasks of two tenants."""
    outcomes: list[TaskOutcome] = []
    for tenant, answer, score in (("farm", SECRET, 1.0), ("zoo", "Seven llamas.", 0.0)):
        task = samples.task(f"A question of the {tenant}?", tenant)
        run = samples.trajectory(task, answer).model_copy(update={"purpose": Purpose.EVAL})
        ledger.add_run(task, run)
        outcomes.append(
            TaskOutcome(
                key=task.fingerprint[:16],
                workload=f"work of the {tenant}",
                score=score,
                answer=answer,
                trajectory_id=run.id,
                prompt_tokens=100 if score else 50,
            )
        )
    ledger.add_evaluation(
        Evaluation(
            suite="held_out",
            suite_hash="h",
            role="held_out",
            generation=0,
            memory=True,
            outcomes=outcomes,
            seconds=1.0,
            night_id=night_id,
        )
    )


def test_a_key_sees_its_own_tenants_outcomes_and_figures_of_all(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, server=ServerConfig(keys=True)), lambda _: "1") as (url, services):
        an_exam(services.ledger)

        def seen(secret: str) -> dict[str, Any]:
            reply = httpx.get(f"{url}/v1/evaluations", headers={"Authorization": f"Bearer {secret}"})
            [evaluation] = reply.json()["data"]
            return evaluation

        def by_key(tenant: str) -> dict[str, Any]:
            key = keys.ApiKey(name="ann", tenant=tenant, scopes=[keys.Scope.OPERATE])
            return seen(keys.mint(services.ledger.database, key))

        for tenant, others in (("zoo", ("farm", SECRET)), ("default", ("farm", "zoo", SECRET, "llamas"))):
            told = by_key(tenant)
            assert [word for word in others if word in json.dumps(told)] == []
            assert told["summary"] == {"tasks": 2, "successes": 1, "prompt_tokens": 75.0}
        assert [outcome["answer"] for outcome in by_key("zoo")["outcomes"]] == ["Seven llamas."]
        assert by_key("default")["outcomes"] == []
        assert [outcome["answer"] for outcome in seen(OPERATOR_TOKEN)["outcomes"]] == [SECRET, "Seven llamas."]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, Services, Night]]:
    """A night that has ended with a decision over the tasks of two tenants."""
    with running(settings_in(tmp_path, server=ServerConfig(keys=True)), lambda _: "1") as (url, services):
        night = Night()
        services.ledger.add_night(night)
        an_exam(services.ledger, night.id)
        table = [{"workload": None}, {"workload": "work of the farm"}, {"workload": "work of the zoo"}]
        decided = {"verdict": "reject", "table": table, "reasons": ["'work of the farm' lost", "'work of the zoo' won"]}
        services.ledger.record_stage(StageRun(night_id=night.id, stage="decide", output=decided, seconds=1.0))
        services.ledger.end_night(night.id, NightStatus.REJECTED, decided["reasons"])
        yield url, services, night


def key_of(services: Services, tenant: str) -> dict[str, str]:
    key = keys.ApiKey(name="ann", tenant=tenant, scopes=[keys.Scope.OPERATE])
    return {"Authorization": f"Bearer {keys.mint(services.ledger.database, key)}"}


def test_an_ended_night_is_read_once_for_a_key_until_somebody_is_forgotten(
    service: tuple[str, Services, Night], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services, night = service
    key, read, evaluations = key_of(services, "zoo"), list[Any](), Ledger.evaluations

    def counted(self: Ledger, *args: Any, **named: Any) -> list[Evaluation]:
        read.append(named)
        return evaluations(self, *args, **named)

    monkeypatch.setattr(Ledger, "evaluations", counted)

    def workloads() -> list[str | None]:
        [job] = httpx.get(f"{url}/v1/fine_tuning/jobs", headers=key).json()["data"]
        assert "farm" not in json.dumps(job)
        return [row["workload"] for row in job["nightschool"]["decision"]["table"]]

    assert workloads() == workloads() == [None, "work of the zoo"]
    assert read == [{"night_id": night.id}]
    forget.forget(services.ledger.database, services.settings.data_dir, tenant="zoo", by="operator")
    assert workloads() == [None]


def test_whoever_watches_nights_holds_nobody_up(
    service: tuple[str, Services, Night], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services, night = service
    key, on_the_loop = key_of(services, "zoo"), set[str]()

    def watched(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **named: Any) -> Any:
            with suppress(RuntimeError):
                asyncio.get_running_loop()
                on_the_loop.add(name)
            return verb(*args, **named)

        return read

    for name in ("evaluations", "generations", "night", "nights", "stage", "stages"):
        monkeypatch.setattr(Ledger, name, watched(name, getattr(Ledger, name)))
    jobs = f"{url}/v1/fine_tuning/jobs"
    for path in (
        jobs,
        *(f"{jobs}/{night.id}{part}" for part in ("", "/events", "/checkpoints")),
        f"{url}/v1/generations",
    ):
        httpx.get(path, headers=key).raise_for_status()
    assert httpx.post(f"{jobs}/{night.id}/cancel", headers=key).status_code == 409
    assert httpx.post(jobs, headers=key, json={"training_file": "file-none"}).status_code == 404
    assert on_the_loop == set()
