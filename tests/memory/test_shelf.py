"""Items changed by hand, and nobody reaches another tenant's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memory import forget, shelf
from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus
from tests.memory import samples


def test_an_item_is_pinned_reworded_and_retired_with_its_reasons(ledger: Ledger):
    item = samples.principle(tenant="ada")
    ledger.add_principle(item)
    db = ledger.database
    shelf.set_pinned(db, item.id, True, "I wrote it", tenant="ada")
    shelf.set_pinned(db, item.id, True, "again", tenant="ada")
    shelf.reword(db, item.id, " Add the tens first. ", "clearer", tenant="ada")
    changed = shelf.set_status(db, item.id, MemoryStatus.RETIRED, "wrong after all", tenant="ada")
    assert changed == shelf.get(db, item.id, tenant="ada")
    wanted = {"pinned": True, "text": "Add the tens first.", "structure": [], "status": MemoryStatus.RETIRED}
    assert changed == item.model_copy(update=wanted)
    told = [(change.op, change.why) for change in shelf.history(db, item.id, tenant="ada")]
    assert told == [
        ("upsert", "added"),
        ("upsert", "I wrote it"),
        ("upsert", "clearer"),
        ("delete", "wrong after all"),
    ]
    assert all(change.at for change in shelf.history(db, item.id, tenant="ada"))


def test_what_happened_cannot_be_reworded_and_a_merged_item_stays_as_it_is(ledger: Ledger):
    run, one, two = samples.past_run(samples.task()), samples.principle(), samples.principle("Ones first.")
    ledger.add_past_run(run)
    for item in (one, two):
        ledger.add_principle(item)
    with pytest.raises(ConflictError, match="only a principle"):
        shelf.reword(ledger.database, run.id, "Something", "", tenant="default")
    with pytest.raises(ConflictError, match="some words"):
        shelf.reword(ledger.database, one.id, " ", "", tenant="default")
    shelf.merge(ledger.database, one.id, two.id, "the same", tenant="default")
    with pytest.raises(ConflictError, match=one.id):
        shelf.set_pinned(ledger.database, two.id, True, "", tenant="default")


def test_pages_follow_each_other_and_filter(ledger: Ledger):
    rules = [samples.principle(f"Rule {n}.") for n in range(5)]
    for rule in rules:
        ledger.add_principle(rule)
    run = samples.past_run(samples.task())
    ledger.add_past_run(run)
    ledger.set_memory_status(rules[0].id, MemoryStatus.RETIRED, "old")
    first = shelf.page(ledger.database, tenant="default", limit=4)
    assert [i.id for i in first] == [r.id for r in rules[:4]]
    assert [i.id for i in shelf.page(ledger.database, tenant="default", after=first[-1].id)] == [rules[4].id, run.id]
    assert shelf.page(ledger.database, tenant="default", kind=MemoryKind.RUN) == [run]
    [retired] = shelf.page(ledger.database, tenant="default", status=MemoryStatus.RETIRED)
    assert retired.id == rules[0].id


CROSSINGS: dict[str, Callable[[Any, str, str], Any]] = {
    "get": lambda db, id, _: shelf.get(db, id, tenant="eve"),
    "history": lambda db, id, _: shelf.history(db, id, tenant="eve"),
    "exposure": lambda db, id, _: shelf.exposure(db, id, tenant="eve"),
    "page": lambda db, id, _: shelf.page(db, tenant="eve", after=id),
    "set_status": lambda db, id, _: shelf.set_status(db, id, MemoryStatus.RETIRED, "", tenant="eve"),
    "set_pinned": lambda db, id, _: shelf.set_pinned(db, id, True, "", tenant="eve"),
    "reword": lambda db, id, _: shelf.reword(db, id, "mine now", "", tenant="eve"),
    "merge into mine": lambda db, id, own: shelf.merge(db, own, id, "", tenant="eve"),
    "merge into theirs": lambda db, id, own: shelf.merge(db, id, own, "", tenant="eve"),
}


@pytest.mark.parametrize("attempt", CROSSINGS)
def test_nobody_sees_or_changes_another_tenants_item(sqlite_ledger: Ledger, attempt: str):
    item, own = samples.principle(tenant="ada"), samples.principle(tenant="eve")
    for added in (item, own):
        sqlite_ledger.add_principle(added)
    with pytest.raises(NotFoundError):
        CROSSINGS[attempt](sqlite_ledger.database, item.id, own.id)
    assert sqlite_ledger.principles() == [item, own]


def test_every_function_of_the_shelf_was_tried_on_another_tenants_item():
    doors = {name for name, value in vars(shelf).items() if getattr(value, "__module__", "") == shelf.__name__}
    tried = {name.split()[0] for name in CROSSINGS}
    assert {door for door in doors if not door.startswith("_")} == tried


def test_forgetting_a_tenant_reaches_no_other(sqlite_ledger: Ledger, tmp_path):
    item, own = samples.principle(tenant="ada"), samples.principle(tenant="eve")
    for added in (item, own):
        sqlite_ledger.add_principle(added)
    forget.forget(sqlite_ledger.database, tmp_path, tenant="eve", by="eve")
    assert sqlite_ledger.principles() == [item]
    assert forget.all_forgotten(sqlite_ledger.database, tenant="ada") == []
