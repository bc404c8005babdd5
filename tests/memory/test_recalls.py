"""A run says afterwards what memory did for it: every figure of the choice, and what came of it."""

from __future__ import annotations

import pytest

from memory import items, recalls, uses
from memory.errors import NotFoundError
from memory.ledger import Ledger
from memory.records import MemoryKind, Recalled, Trajectory
from memory.uplift import Count
from tests.memory import samples

FIGURES = {"similarity": 0.9, "score": 0.5, "recency": 1.0, "rank": 0.83, "tokens": 9, "why": "it is near"}


def a_run(ledger: Ledger, *shown: str, withheld: str | None = None) -> Trajectory:
    task = samples.task("How many legs do 4 cows have?", "farm")
    ids = [(id, False) for id in shown] + ([(withheld, True)] if withheld else [])
    recalled = [Recalled(id=id, kind=MemoryKind.PRINCIPLE, withheld=out, **FIGURES) for id, out in ids]
    run = samples.trajectory(task).model_copy(update={"recalled": recalled})
    ledger.add_run(task, run)
    return run


def count(ledger: Ledger, item_id: str, shown: tuple[int, int], withheld: tuple[int, int]) -> None:
    """Judged runs and successes among them, with the item and without."""
    told = [
        uses.Use(item_id, f"traj_{withheld_}{n}", n < won, withheld_)
        for withheld_, (total, won) in ((False, shown), (True, withheld))
        for n in range(total)
    ]
    with ledger.database.writing() as connection:
        uses.count(connection, told, tenant="farm")


def test_each_item_has_its_figures_the_runs_end_and_its_worth_by_now(ledger: Ledger):
    good, bad, gone = (samples.principle(text, "farm") for text in ("Count legs.", "Guess.", "Ask."))
    for each in (good, bad):
        ledger.add_principle(each)
    run = a_run(ledger, good.id, gone.id, withheld=bad.id)
    with ledger.database.writing() as connection:
        uses.count(connection, [uses.Use(good.id, run.id, True)], tenant="farm")
    count(ledger, good.id, (30, 29), (30, 3))
    count(ledger, bad.id, (30, 3), (30, 29))
    read, (one, two, three) = recalls.of_run(ledger.database, run.id, tenant="farm")
    assert read == run
    assert [each.recalled for each in (one, two, three)] == run.recalled
    assert (one.success, one.helps, one.exposure.shown) == (True, True, Count(31, 30))
    assert (two.item, two.success, two.helps) == (None, None, None)
    assert (three.success, three.helps, three.recalled.withheld) == (None, False, True)


def test_an_item_that_was_merged_since_is_judged_by_the_one_that_took_it_over(ledger: Ledger):
    winner, loser = (samples.principle(text, "farm") for text in ("Count legs.", "Count the legs."))
    for each in (winner, loser):
        ledger.add_principle(each)
    run = a_run(ledger, loser.id)
    with ledger.database.writing() as connection:
        items.merge(connection, winner.id, loser.id, "the same")
        uses.count(connection, [uses.Use(loser.id, run.id, True)], tenant="farm")
    _, [found] = recalls.of_run(ledger.database, run.id, tenant="farm")
    assert found.success is True


def test_another_tenants_run_is_not_found(ledger: Ledger):
    run = a_run(ledger)
    for tenant in ("zoo", "default"):
        with pytest.raises(NotFoundError):
            recalls.of_run(ledger.database, run.id, tenant=tenant)
