"""When items retire, leave the prompt and come back."""

from __future__ import annotations

import pytest

from memory import life, shelf, uses
from memory.ledger import Ledger
from memory.life import LifeConfig, internalised, verdict
from memory.records import MemoryStatus, Principle
from memory.uplift import Count, Exposure
from memory.uses import Use
from tests.memory import samples

RULE = LifeConfig()
RETIRED, ACTIVE, INTERNALISED = MemoryStatus.RETIRED, MemoryStatus.ACTIVE, MemoryStatus.INTERNALISED


def used(times: int, successes: int, **more: object) -> Principle:
    return samples.principle().model_copy(update={"uses": times, "successes": successes, **more})


def to(item: Principle, measured: dict[int | None, Exposure] | None = None, generation: int = 1) -> MemoryStatus | None:
    decided = verdict(item, measured or {}, generation, RULE)
    return decided[0] if decided else None


def test_a_low_score_retires_a_principle_once_it_was_used_often_enough():
    assert to(used(4, 0)) is None
    assert to(used(5, 0)) is RETIRED
    assert to(used(5, 1)) is RETIRED  # 2/7
    assert to(used(8, 2)) is None  # 3/10
    assert to(used(5, 0, pinned=True)) is None


def test_a_low_score_on_hard_tasks_does_not_retire_what_provably_helps():
    helps: dict[int | None, Exposure] = {1: Exposure(Count(200, 40), Count(200, 4))}
    assert to(used(200, 40), helps) is None
    assert to(used(200, 40)) is RETIRED


def test_what_provably_hurts_retires_whatever_its_score_unless_it_is_pinned():
    hurts: dict[int | None, Exposure] = {0: Exposure(Count(30, 18), Count(0, 0)), 1: Exposure(withheld=Count(30, 29))}
    assert to(used(30, 18), hurts) is RETIRED
    assert to(used(30, 18, pinned=True), hurts) is None
    assert to(used(30, 18), {1: Exposure(Count(30, 18), Count(10, 8))}) is None
    run = samples.past_run(samples.task()).model_copy(update={"uses": 30, "successes": 18})
    assert verdict(run, hurts, 1, RULE) is not None
    assert verdict(run.model_copy(update={"successes": 0}), {}, 1, RULE) is None


@pytest.mark.parametrize(
    ("with_it", "without", "leaves", "stays_out"),
    [
        ((20, 19), (10, 10), True, True),
        ((20, 19), (9, 9), False, True),
        ((9, 9), (10, 10), False, True),
        ((20, 20), (20, 19), True, True),
        ((20, 20), (20, 18), False, True),
        ((20, 20), (20, 17), False, False),
        ((20, 14), (20, 16), False, False),
        ((0, 0), (0, 0), False, True),
    ],
)
def test_an_item_leaves_the_prompt_when_runs_without_it_succeed_as_well(
    with_it: tuple[int, int], without: tuple[int, int], leaves: bool, stays_out: bool
):
    assert internalised(Count(*with_it), Count(*without), RULE, is_now=False) is leaves
    assert internalised(Count(*with_it), Count(*without), RULE, is_now=True) is stays_out


def test_only_the_current_generation_decides_who_leaves_the_prompt():
    learned = Exposure(Count(20, 20), Count(20, 20))
    assert to(used(20, 20), {1: learned}, generation=1) is INTERNALISED
    assert to(used(20, 20), {1: learned}, generation=2) is None
    assert to(used(20, 20, pinned=True), {1: learned}) is None


def test_an_internalised_item_returns_when_a_later_generation_has_forgotten(sqlite_ledger: Ledger):
    item = samples.principle()
    sqlite_ledger.add_principle(item)

    def lived(generation: int, successes: int, withheld: bool) -> None:
        with sqlite_ledger.database.writing() as connection:
            name = f"traj_{generation}_{withheld}"
            told = [Use(item.id, f"{name}_{n}", n < successes, withheld, generation) for n in range(20)]
            uses.count(connection, told, tenant="default")

    def review(generation: int) -> list[MemoryStatus]:
        return [m.status for m in life.review(sqlite_ledger.database, generation, RULE, tenant="default")]

    lived(1, 20, withheld=False)
    lived(1, 20, withheld=True)
    assert review(1) == [INTERNALISED]
    assert review(1) == []
    lived(2, 20, withheld=True)
    assert review(2) == []
    lived(3, 12, withheld=True)
    assert review(3) == [ACTIVE]
    assert [change.op for change in shelf.history(sqlite_ledger.database, item.id, tenant="default")] == ["upsert"] * 3
    assert "12 of 20 without it" in shelf.history(sqlite_ledger.database, item.id, tenant="default")[-1].why


def test_a_review_touches_one_tenant_only(sqlite_ledger: Ledger):
    mine, theirs = used(9, 0), used(9, 0, tenant="ada")
    for item in (mine, theirs):
        sqlite_ledger.add_principle(item)
    [move] = life.review(sqlite_ledger.database, 0, RULE, tenant="ada")
    assert (move.item_id, move.status) == (theirs.id, RETIRED)
    assert sqlite_ledger.get_principle(mine.id).status is ACTIVE
