"""Whatever happens to memory, in whatever order, and wherever its keeper dies: drained, the index holds the ledger."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from memory import forget, life, shelf, uses
from memory.embed import Embedder
from memory.errors import ConflictError, IndexUnavailableError, NotFoundError
from memory.index import Index, drain, rebuild, sync
from memory.items import RECALLABLE
from memory.ledger import Ledger
from memory.life import LifeConfig
from memory.records import MEMORY_TRANSITIONS, MemoryKind, MemoryStatus, Principle
from memory.uses import Use
from tests.memory import samples

TENANTS = ("ada", "bob")
WORDS = ("cows", "hens", "ants", "geese", "spiders", "legs", "wings", "count")


class Hashed:
    """An embedder that costs nothing: a few letters' counts. What is near to what does not matter here."""

    dimensions = 8

    def __init__(self, name: str) -> None:
        self.name = name

    def embed(self, texts: list[str]) -> list[list[float]]:
        found = [[1.0 + text.count(letter) for letter in "aeioutns"] for text in texts]
        return [[x / sum(y * y for y in v) ** 0.5 for x in v] for v in found]


class Dies(Exception):
    """The process is gone."""


class Memory(RuleBasedStateMachine):
    """Two tenants' principles over a real ledger and a real Chroma folder."""

    items = Bundle("items")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="machine-"))
        self.ledger = Ledger.open(f"sqlite:///{self.home}/ledger.sqlite")
        self.number = 0
        self.embedder: Embedder = Hashed("one")
        self.index = Index.open(self.home / "index", self.embedder)
        self.model: dict[str, Principle] = {}
        self.owner: dict[str, str] = {}

    def teardown(self) -> None:
        self.index.close()
        self.ledger.close()
        shutil.rmtree(self.home)

    @rule(target=items, tenant=st.sampled_from(TENANTS), user=st.sampled_from(("ann", "ben")), words=st.data())
    def add(self, tenant: str, user: str, words: Any) -> str:
        self.number += 1
        said = words.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
        task = samples.task(f"question number {self.number}", tenant).model_copy(update={"user": user})
        run = samples.trajectory(task)
        self.ledger.add_run(task, run)
        item = samples.principle(" ".join(said), tenant, [run.id])
        self.ledger.add_principle(item)
        self.model[item.id], self.owner[item.id] = item, user
        return item.id

    @rule(id=items, other=items, tenant=st.sampled_from(TENANTS))
    def merge(self, id: str, other: str, tenant: str) -> None:
        winner, loser = self.model.get(id), self.model.get(other)
        allowed = (
            winner is not None
            and loser is not None
            and id != other
            and winner.tenant == loser.tenant == tenant
            and winner.status is not MemoryStatus.MERGED
            and MemoryStatus.MERGED in MEMORY_TRANSITIONS[loser.status]
        )
        again = loser is not None and winner is not None and loser.merged_into == id and winner.tenant == tenant
        try:
            merged = shelf.merge(self.ledger.database, id, other, "the same", tenant=tenant)
        except (ConflictError, NotFoundError):
            assert not allowed
            return
        assert allowed or again
        assert isinstance(merged, Principle)
        if allowed and winner is not None and loser is not None:
            assert merged.uses <= winner.uses + loser.uses
            assert set(merged.sources) == {*winner.sources, *loser.sources}
            self.model[id] = merged
            gone = {"status": MemoryStatus.MERGED, "merged_into": id}
            self.model[other] = loser.model_copy(update=gone)

    @rule(id=items, runs=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=6))
    def score(self, id: str, runs: list[tuple[int, bool, bool]]) -> None:
        item = self.model.get(id)
        told = [Use(id, f"traj_{n}", won, withheld, generation=0) for n, won, withheld in runs]
        with self.ledger.database.writing() as connection:
            uses.count(connection, told, tenant=item.tenant if item else "ada")
        self._read()

    @rule(tenant=st.sampled_from(TENANTS))
    def review(self, tenant: str) -> None:
        life.review(self.ledger.database, 0, LifeConfig(min_uses=1, min_runs=1), tenant=tenant)
        self._read()

    @rule(id=items, status=st.sampled_from(MemoryStatus), tenant=st.sampled_from(TENANTS))
    def move(self, id: str, status: MemoryStatus, tenant: str) -> None:
        item = self.model.get(id)
        mine = item is not None and item.tenant == tenant
        legal = mine and item is not None and (status is item.status or status in MEMORY_TRANSITIONS[item.status])
        try:
            shelf.set_status(self.ledger.database, id, status, "moved", tenant=tenant)
        except (ConflictError, NotFoundError):
            assert not legal
        else:
            assert legal
        self._read()

    @rule(id=items, words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    def reword(self, id: str, words: list[str]) -> None:
        item = self.model.get(id)
        if item is not None and item.status is not MemoryStatus.MERGED:
            shelf.reword(self.ledger.database, id, " ".join(words), "clearer", tenant=item.tenant)
            self._read()

    @rule(tenant=st.sampled_from(TENANTS), user=st.sampled_from((None, "ann", "ben")))
    def forget(self, tenant: str, user: str | None) -> None:
        forget.forget(self.ledger.database, self.home, tenant=tenant, user=user, by="test")
        left = {principle.id for principle in self.ledger.principles()}
        for item in self.model.values():
            if item.tenant == tenant and user in (None, self.owner[item.id]):
                assert item.id not in left
            if item.tenant != tenant:
                assert item.id in left
        # What was forgotten leaves no outbox row: the index is made anew, as the caller of `forget` does.
        rebuild(self.ledger, self.index)
        self._read()

    @rule()
    def reindex(self) -> None:
        self.index.embedder = Hashed(f"embedder {self.number}")
        rebuild(self.ledger, self.index)

    @rule(after=st.integers(0, 4), batch=st.integers(1, 3))
    def die_while_following(self, after: int, batch: int) -> None:
        """The process ends before some acknowledgement, and another one opens what it left."""
        acknowledge, left = self.ledger.ack_outbox, [after]

        def ack(seq_upto: int) -> None:
            if not left[0]:
                raise Dies
            left[0] -= 1
            acknowledge(seq_upto)

        self.ledger.ack_outbox = ack
        try:
            drain(self.ledger, self.index, batch)
        except Dies:
            pass
        finally:
            self.ledger.ack_outbox = acknowledge
        self._open_again()

    @rule(after=st.integers(0, 3))
    def die_while_rebuilding(self, after: int) -> None:
        pages, left = self.ledger.active_texts, [after]

        def page(after_seq: int, limit: int) -> Any:
            if not left[0]:
                raise Dies
            left[0] -= 1
            return pages(after_seq, 1)

        self.ledger.active_texts = page
        try:
            rebuild(self.ledger, self.index, 1)
        except Dies:
            pass
        finally:
            self.ledger.active_texts = pages
        self._open_again()

    @rule()
    def lose_the_folder(self) -> None:
        shutil.rmtree(self.home / "index", ignore_errors=True)
        try:
            self.index.query(MemoryKind.PRINCIPLE, "ada", "cows", 1)
        except IndexUnavailableError:
            assert self.index.needs_rebuild

    @rule(tenant=st.sampled_from(TENANTS), batch=st.integers(1, 3))
    def drained_the_index_holds_the_ledger(self, tenant: str, batch: int) -> None:
        sync(self.ledger, self.index, batch)
        found = {id for id, _ in self.index.query(MemoryKind.PRINCIPLE, tenant, "cows", 10_000)}
        assert found == {i.id for i in self.model.values() if i.tenant == tenant and i.status in RECALLABLE}
        assert self.index.count() == self.ledger.count_active()
        assert self.ledger.outbox(1) == []

    @invariant()
    def the_ledger_holds_the_model(self) -> None:
        assert {p.id: p for p in self.ledger.principles()} == self.model

    @invariant()
    def counts_are_possible(self) -> None:
        for item in self.model.values():
            assert 0 <= item.successes <= item.uses
            assert (item.merged_into is not None) == (item.status is MemoryStatus.MERGED) or item.merged_into is None

    def _read(self) -> None:
        self.model = {principle.id: principle for principle in self.ledger.principles()}

    def _open_again(self) -> None:
        self.index.close()
        embedder = self.index.embedder
        # The child that tries the folder first takes seconds; torn folders have tests of their own.
        import memory.chroma

        probe = memory.chroma.move_aside_if_broken
        memory.chroma.move_aside_if_broken = lambda _: None
        try:
            self.index = Index.open(self.home / "index", embedder)
        finally:
            memory.chroma.move_aside_if_broken = probe


Memory.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestMemory = Memory.TestCase
