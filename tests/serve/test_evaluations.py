"""Stored evaluations as different callers see them: nobody reads another tenant's exam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from memory import keys
from memory.ledger import Ledger
from memory.night_records import Evaluation, TaskOutcome
from memory.records import Purpose
from serve.settings import ServerConfig
from tests.memory import samples
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in

SECRET = "The vault of the farm opens at nine."


def an_exam(ledger: Ledger) -> None:
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
