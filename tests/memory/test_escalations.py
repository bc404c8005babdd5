"""What goes to the teacher is counted in the ledger: the budget holds, also after a restart. On both databases."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path

import pytest

from memory import escalations, forget
from memory.escalations import RESERVED_TOKENS, Budget, Escalation, Reason, Status
from memory.ledger import Ledger
from memory.records import Purpose, Task, now
from tests.memory import samples

PLENTY = Budget(share=1.0)


def serve(ledger: Ledger, count: int, generation: int = 0, purpose: Purpose = Purpose.SERVE) -> list[Task]:
    tasks = [samples.task(f"Question {n}?") for n in range(count)]
    for task in tasks:
        run = samples.trajectory(task).model_copy(update={"generation": generation, "purpose": purpose})
        ledger.add_run(task, run)
    return tasks


def escalation(reason: Reason = Reason.FAILED, generation: int = 0, task_id: str = "task_1") -> Escalation:
    return Escalation(task_id=task_id, generation=generation, reason=reason, teacher="openai/oracle")


def answered(ledger: Ledger, begun: Escalation, success: bool, tokens: int, cost: float | None) -> None:
    known = {"status": Status.ANSWERED, "success": success, "tokens": tokens, "cost_usd": cost}
    escalations.end(ledger.database, begun.model_copy(update=known))


def test_the_figures_of_a_generation_are_its_requests_what_was_taken_and_what_that_cost(ledger: Ledger):
    assert escalations.figures(ledger.database) == []
    serve(ledger, 8)
    serve(ledger, 3, generation=2)
    serve(ledger, 5, purpose=Purpose.EVAL)
    failed, untried, silent = escalation(), escalation(Reason.PREDICTED), escalation(Reason.PREDICTED)
    assert all(escalations.begin(ledger.database, one, PLENTY) for one in (failed, untried, silent))
    answered(ledger, failed, True, 120, 0.25)
    answered(ledger, untried, False, 80, None)
    escalations.end(ledger.database, silent.model_copy(update={"status": Status.UNANSWERED, "tokens": 0}))
    (found,) = escalations.figures(ledger.database)
    assert found.model_dump() == {
        "generation": 0,
        "requests": 9,
        "escalated": 2,
        "rate": 2 / 9,
        "predicted": 1,
        "unanswered": 1,
        "succeeded": 1,
        "tokens": 200,
        "cost_usd": 0.25,
    }
    assert [e.status for e in escalations.all_escalations(ledger.database)] == ["answered", "answered", "unanswered"]


def test_tokens_of_the_last_day_count_and_older_ones_do_not(ledger: Ledger):
    budget = Budget(share=1.0, tokens_per_day=2 * RESERVED_TOKENS + 50)
    old = escalation(Reason.PREDICTED).model_copy(update={"at": now() - timedelta(days=1, seconds=5), "tokens": 10**9})
    assert escalations.begin(ledger.database, old, PLENTY)
    first, second = escalation(Reason.PREDICTED), escalation(Reason.PREDICTED)
    assert escalations.begin(ledger.database, first, budget)
    assert escalations.begin(ledger.database, second, budget)
    # Both are under way: what they may cost is spent.
    assert not escalations.begin(ledger.database, escalation(Reason.PREDICTED), budget)
    answered(ledger, first, True, 10, None)
    assert escalations.begin(ledger.database, escalation(Reason.PREDICTED), budget)


def test_a_forgotten_task_takes_its_escalations_along(sqlite_ledger: Ledger, tmp_path: Path):
    task = serve(sqlite_ledger, 1)[0]
    assert escalations.begin(sqlite_ledger.database, escalation(task_id=task.id), PLENTY)
    forget.forget(sqlite_ledger.database, tmp_path, tenant=task.tenant, by="test")
    assert escalations.all_escalations(sqlite_ledger.database) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34])
def test_the_share_is_never_exceeded_and_a_restart_forgets_nothing(tmp_path: Path, share: float):
    dice, begun = random.Random(share), 0
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    for request in range(30):
        if request == 15:
            ledger.close()
            ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
        reason = dice.choice(list(Reason))
        taken = escalations.begin(ledger.database, escalation(reason), Budget(share))
        if reason is Reason.FAILED or not taken:
            serve(ledger, 1)
        begun += taken
        assert begun <= share * (request + 1)
    ledger.close()
    assert begun >= int(share * 30) - 1
