"""Memory goes out as JSON lines and comes in again, whole, once, and into the tenant that asked."""

from __future__ import annotations

import json

import pytest

from memory import exchange, shelf, uses
from memory.errors import ConfigError
from memory.exchange import Imported
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus
from memory.uses import Use
from tests.memory import samples


@pytest.fixture
def filled(sqlite_ledger: Ledger) -> list[str]:
    task = samples.task("How many legs do 4 cows have?", "ada")
    run = samples.trajectory(task)
    sqlite_ledger.add_run(task, run)
    sqlite_ledger.add_past_run(samples.past_run(task))
    one, two, three = (samples.principle(f"Rule {n}: é.", "ada", [run.id]) for n in range(3))
    for item in (one, two, three):
        sqlite_ledger.add_principle(item)
    told = [Use(one.id, f"traj_{n}", n % 2 == 0, n > 3, 1) for n in range(6)]
    with sqlite_ledger.database.writing() as connection:
        uses.count(connection, told, tenant="ada")
    shelf.merge(sqlite_ledger.database, one.id, two.id, "the same", tenant="ada")
    shelf.set_pinned(sqlite_ledger.database, one.id, True, "mine", tenant="ada")
    sqlite_ledger.set_memory_status(three.id, MemoryStatus.RETIRED, "wrong")
    sqlite_ledger.add_principle(samples.principle("Not ada's.", "eve"))
    return list(exchange.export_lines(sqlite_ledger.database, tenant="ada"))


def test_what_goes_out_comes_in_again_to_the_letter(filled: list[str], ledger: Ledger):
    assert len(filled) == 4
    assert exchange.import_lines(ledger.database, filled, tenant="ada") == Imported(added=4, known=0)
    assert list(exchange.export_lines(ledger.database, tenant="ada")) == filled
    assert exchange.import_lines(ledger.database, [*filled, ""], tenant="ada") == Imported(added=0, known=4)
    assert list(exchange.export_lines(ledger.database, tenant="ada")) == filled
    assert ledger.count_active() == 2


def test_an_imported_item_is_still_kept_from_the_task_it_was_made_from(filled: list[str], ledger: Ledger):
    exchange.import_lines(ledger.database, filled, tenant="ada")
    [run] = ledger.past_runs()
    [candidate] = ledger.candidates(MemoryKind.RUN, "ada", [run.id]).values()
    assert run.task_id in candidate.origins


def test_another_tenants_export_becomes_ones_own_beside_the_original(filled: list[str], sqlite_ledger: Ledger):
    before = sqlite_ledger.principles("ada")
    db = sqlite_ledger.database
    assert exchange.import_lines(db, filled, tenant="bob") == Imported(added=4, known=0)
    assert exchange.import_lines(db, filled, tenant="bob") == Imported(added=0, known=4)
    assert sqlite_ledger.principles("ada") == before
    mine = sqlite_ledger.principles("bob")
    assert [p.text for p in mine] == [p.text for p in before]
    assert not {p.id for p in mine} & {p.id for p in before}
    assert {p.merged_into for p in mine} == {None, mine[0].id}
    own_ids_for_ada = [
        json.dumps({**json.loads(line), "item": {**json.loads(line)["item"], "tenant": "bob"}}) for line in filled
    ]
    assert exchange.import_lines(db, own_ids_for_ada, tenant="bob").known == 4
    assert sqlite_ledger.principles("ada") == before


@pytest.mark.parametrize(
    "bad", ["{", "[]", "null", '{"kind":"run","item":{}}', '{"kind":"x","item":{}}', "[" * 100_000]
)
def test_a_line_that_is_no_item_is_named_and_nothing_is_added(filled: list[str], ledger: Ledger, bad: str):
    with pytest.raises(ConfigError, match="line 5 is no exported"):
        exchange.import_lines(ledger.database, [*filled, bad], tenant="ada")
    assert ledger.principles() == []
