"""Our memory as `bench recall` measures it: a ledger on SQLite with durable commits, the index, and recall whole.

Run as `python -m serve.benches.store TEXTS`; keeps everything in the working folder. What one search costs is what a
request pays: embedding, nearest neighbours, the ledger's word on every candidate, ranking, the budget.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from evals.peers.worker import work
from memory import items
from memory.embed import load_embedder
from memory.index import Index, drain, rebuild
from memory.ledger import Ledger
from memory.recall import Memory, RecallConfig
from memory.records import PastRun, Task

MADE = datetime(2024, 1, 1, tzinfo=UTC)
"""All of one age: with recency equal and no uses, the order is that of similarity, as in the stores beside ours."""


class Ours:
    """One tenant's past runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger.open(f"sqlite:///{(folder / 'ledger.sqlite').resolve()}")
        self._index = Index.open(folder / "index", load_embedder("wordllama", folder / "embedder"))
        drain(self._ledger, self._index)
        self._positions: dict[str, int] = {}

    def add(self, position: int, text: str) -> None:
        self._ledger.add_past_run(self._run(position, text))
        drain(self._ledger, self._index)

    def fill(self, first: int, texts: list[str]) -> None:
        runs = [self._run(position, text) for position, text in enumerate(texts, first)]
        with self._ledger.database.writing() as connection:
            for run in runs:
                items.add(connection, run)
        drain(self._ledger, self._index)

    def search(self, query: str, k: int) -> list[int]:
        config = RecallConfig(runs=k, principles=0, token_budget=1_000_000, min_similarity=-1.0, max_overlap=1.0)
        memory = Memory(self._ledger, self._index, config)
        task = Task(messages=[{"role": "user", "content": query}], created_at=MADE)
        return [self._positions[item.id] for item in memory.recall(task).items]

    def rebuild(self) -> bool:
        rebuild(self._ledger, self._index)
        return True

    def _run(self, position: int, text: str) -> PastRun:
        # Ids of real runs sort by time, so these do not: the candidates of a search lie all over the ledger.
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._positions[f"run_{name}"] = position
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"The answer is {position}."}]
        return PastRun(id=f"run_{name}", task_id=f"task_{name}", messages=messages, created_at=MADE)


if __name__ == "__main__":
    work(Ours(Path("data")))
