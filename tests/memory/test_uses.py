"""Judged runs are counted once, for the right item, and move when items merge. On both databases."""

from __future__ import annotations

import pytest

from memory import items, uses
from memory.errors import ConflictError
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus, PrincipleKind
from memory.uplift import Count, Exposure
from memory.uses import Use
from tests.memory import samples


def count(ledger: Ledger, *counted: Use, tenant: str = "default") -> int:
    with ledger.database.writing() as connection:
        return uses.count(connection, counted, tenant=tenant)


def exposures(ledger: Ledger, item_id: str) -> dict[int | None, Exposure]:
    with ledger.database.reading() as connection:
        return uses.exposures(connection, [item_id]).get(item_id, {})


def merge(ledger: Ledger, winner: str, loser: str):
    with ledger.database.writing() as connection:
        return items.merge(connection, winner, loser, "the same")


def test_shown_runs_count_as_uses_and_withheld_ones_as_controls(ledger: Ledger):
    item = samples.principle()
    ledger.add_principle(item)
    told = [Use(item.id, f"traj_{n}", n < 3, withheld=n % 2 == 1, generation=n // 4) for n in range(8)]
    assert count(ledger, *told) == 8
    assert count(ledger, *told) == 0
    counted = ledger.get_principle(item.id)
    assert (counted.uses, counted.successes) == (4, 2)
    assert exposures(ledger, item.id) == {
        0: Exposure(shown=Count(2, 2), withheld=Count(2, 1)),
        1: Exposure(shown=Count(2, 0), withheld=Count(2, 0)),
    }


def test_a_run_that_is_judged_otherwise_later_is_counted_anew(ledger: Ledger):
    item = samples.principle()
    ledger.add_principle(item)
    count(ledger, Use(item.id, "traj_1", True), Use(item.id, "traj_2", True, withheld=True))
    assert count(ledger, Use(item.id, "traj_1", False), Use(item.id, "traj_2", False, withheld=True)) == 2
    counted = ledger.get_principle(item.id)
    assert (counted.uses, counted.successes) == (1, 0)
    assert exposures(ledger, item.id) == {None: Exposure(shown=Count(1, 0), withheld=Count(1, 0))}


def test_another_tenants_item_and_one_that_is_gone_are_passed_over(ledger: Ledger):
    theirs = samples.principle(tenant="ada")
    ledger.add_principle(theirs)
    assert count(ledger, Use(theirs.id, "traj_1", True), Use("prin_gone", "traj_1", True), tenant="eve") == 0
    assert ledger.get_principle(theirs.id).uses == 0


def test_merged_items_share_their_evidence_and_no_run_counts_twice(ledger: Ledger):
    first, second = samples.task("What is 1 + 1?"), samples.task("What is 2 + 2?")
    runs = [samples.trajectory(of) for of in (first, second)]
    for of, run in zip((first, second), runs, strict=True):
        ledger.add_run(of, run)
    winner, loser = samples.principle(sources=[runs[0].id]), samples.principle("Begin with ones.", sources=[runs[1].id])
    for item in (winner, loser):
        ledger.add_principle(item)
    count(ledger, Use(winner.id, "traj_a", True), Use(loser.id, "traj_a", True), Use(loser.id, "traj_b", False))
    count(ledger, Use(loser.id, "traj_c", True, withheld=True))
    merged = merge(ledger, winner.id, loser.id)
    assert (merged.uses, merged.successes) == (2, 1)
    assert merged.sources == sorted(run.id for run in runs)
    assert exposures(ledger, winner.id) == {None: Exposure(shown=Count(2, 1), withheld=Count(1, 1))}
    gone = ledger.get_principle(loser.id)
    assert (gone.status, gone.merged_into) == (MemoryStatus.MERGED, winner.id)
    origins = ledger.candidates(MemoryKind.PRINCIPLE, "default", [winner.id, loser.id])
    assert list(origins) == [winner.id]
    assert origins[winner.id].origins == {first.id, second.id, first.fingerprint, second.fingerprint}
    assert merge(ledger, winner.id, loser.id) == merged


def test_a_run_that_was_shown_a_merged_item_counts_for_the_one_that_took_it_over(ledger: Ledger):
    one, two, three = (samples.principle(f"Rule {n}.") for n in range(3))
    for item in (one, two, three):
        ledger.add_principle(item)
    merge(ledger, two.id, three.id)
    merge(ledger, one.id, two.id)
    assert count(ledger, Use(three.id, "traj_1", True), Use(one.id, "traj_1", True)) == 1
    assert ledger.get_principle(one.id).uses == 1
    assert ledger.get_principle(three.id).uses == 0


def test_counts_that_came_without_their_runs_move_as_numbers(ledger: Ledger):
    winner = samples.principle().model_copy(update={"uses": 4, "successes": 3})
    loser = samples.principle("Ones first.").model_copy(update={"uses": 2, "successes": 1})
    for item in (winner, loser):
        ledger.add_principle(item)
    count(ledger, Use(loser.id, "traj_1", True))
    merged = merge(ledger, winner.id, loser.id)
    assert (merged.uses, merged.successes) == (7, 5)


def test_what_is_not_two_of_one_kind_does_not_merge(sqlite_ledger: Ledger):
    base = samples.principle()
    others = [
        samples.principle(tenant="ada"),
        samples.principle().model_copy(update={"kind": PrincipleKind.CAUTIONARY}),
        samples.principle().model_copy(update={"pinned": True}),
        samples.principle().model_copy(update={"status": MemoryStatus.RETIRED}),
    ]
    for item in (base, *others):
        sqlite_ledger.add_principle(item)
    run = samples.past_run(samples.task())
    sqlite_ledger.add_past_run(run)
    before = sqlite_ledger.principles()
    for loser in (base.id, run.id, *(other.id for other in others)):
        with pytest.raises(ConflictError):
            merge(sqlite_ledger, base.id, loser)
    assert sqlite_ledger.principles() == before
