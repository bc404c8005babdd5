"""Figures of memory, per tenant."""

from __future__ import annotations

from memory import stats, uses
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus, Purpose, Recalled, Step, Trajectory
from memory.stats import PromptCost
from memory.uplift import Count, Exposure
from memory.uses import Use
from tests.memory import samples


def test_items_are_listed_with_what_they_are_worth(ledger: Ledger):
    best, unmeasured, never, theirs = (
        samples.principle(f"Rule {n}.", tenant) for n, tenant in enumerate(("ada", "ada", "ada", "eve"))
    )
    for item in (best, unmeasured, never, theirs):
        ledger.add_principle(item)
    told = [Use(best.id, f"traj_{n}", n < 8, n % 2 == 1) for n in range(10)] + [Use(unmeasured.id, "traj_1", True)]
    with ledger.database.writing() as connection:
        uses.count(connection, told, tenant="ada")
    first, second = stats.worths(ledger.database, tenant="ada")
    assert (first.item.id, first.exposure) == (best.id, Exposure(Count(5, 4), Count(5, 4)))
    assert first.uplift is not None
    assert (second.item.id, second.uplift) == (unmeasured.id, None)
    assert stats.worths(ledger.database, tenant="eve") == []
    assert stats.worths(ledger.database, tenant="ada", kind=MemoryKind.RUN) == []
    assert stats.counts(ledger.database, tenant="ada") == {(MemoryKind.PRINCIPLE, MemoryStatus.ACTIVE): 3}


def test_prompts_cost_what_served_runs_spent_on_them(ledger: Ledger):
    number = {"similarity": 1.0, "score": 0.5, "recency": 1.0, "rank": 1.0, "tokens": 9, "why": "near"}
    shown = Recalled(id="run_1", kind=MemoryKind.RUN, **number)
    withheld = shown.model_copy(update={"withheld": True})

    def ran(generation: int, *tokens: int | None, tenant: str = "ada", **more: object) -> None:
        task = samples.task(f"Question {len(ledger.trajectories())}?", tenant)
        steps = [Step(message=1, prompt_tokens=n) for n in tokens]
        run: Trajectory = samples.trajectory(task)
        ledger.add_run(task, run.model_copy(update={"generation": generation, "steps": steps, **more}))

    ran(0, 100, 120, recalled=[shown])
    ran(0, 80, recalled=[withheld])
    ran(0, None)
    ran(0, 5, tenant="eve")
    ran(0, 5, purpose=Purpose.EVAL)
    ran(1, 900, 30, inherited_steps=1)
    assert stats.prompt_costs(ledger.database, tenant="ada") == [
        PromptCost(0, 2, 150.0, 0.5),
        PromptCost(1, 1, 30.0, 0.0),
    ]
