"""The scan follows the ledger, embeds an item once, and is exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from memory import shelf
from memory.embed import Embedder
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus
from memory.scan import Scanner
from tests.memory import samples

PRINCIPLE = MemoryKind.PRINCIPLE


class Counting:
    """The real embedder, and how many texts it was given."""

    def __init__(self, inner: Embedder) -> None:
        self.name, self.dimensions, self._inner = inner.name, inner.dimensions, inner
        self.texts: list[str] = []

    def embed(self, texts: list[str]) -> list[list[float]]:
        self.texts += texts
        return self._inner.embed(texts)


def test_a_scan_follows_every_change_and_embeds_each_text_once(sqlite_ledger: Ledger, embedder: Embedder):
    rules = [samples.principle(f"Rule {n}: count the legs of {n} cows.") for n in range(5)]
    for rule in rules:
        sqlite_ledger.add_principle(rule)
    counting = Counting(embedder)
    scanner = Scanner(sqlite_ledger, counting)

    def found() -> set[str]:
        return {id for id, _ in scanner.nearest(PRINCIPLE, "default", "legs", 9)}

    with ThreadPoolExecutor(8) as pool:
        assert all(ids == {r.id for r in rules} for ids in pool.map(lambda _: found(), range(16)))
    assert len([t for t in counting.texts if t != "legs"]) == 5
    sqlite_ledger.set_memory_status(rules[0].id, MemoryStatus.RETIRED, "old")
    shelf.reword(sqlite_ledger.database, rules[1].id, "Count wings.", "better", tenant="default")
    late = samples.principle("Rule 9: look twice.")
    sqlite_ledger.add_principle(late)
    assert found() == {rule.id for rule in rules[1:]} | {late.id}
    assert [t for t in counting.texts if t != "legs"][5:] == ["Count wings.", "Rule 9: look twice."]
    [(best, similarity)] = scanner.nearest(PRINCIPLE, "default", "Count wings.", 1)
    assert (best, similarity) == (rules[1].id, pytest.approx(1.0, abs=1e-5))
    scanner.clear()
    assert found() == {rule.id for rule in rules[1:]} | {late.id}


def test_a_scan_reaches_no_other_tenant_or_kind(sqlite_ledger: Ledger, embedder: Embedder):
    sqlite_ledger.add_principle(samples.principle("Count legs.", "ada"))
    scanner = Scanner(sqlite_ledger, embedder)
    assert scanner.nearest(PRINCIPLE, "eve", "Count legs.", 9) == []
    assert scanner.nearest(MemoryKind.RUN, "ada", "Count legs.", 9) == []
    assert len(scanner.nearest(PRINCIPLE, "ada", "Count legs.", 9)) == 1
