"""Recall: which few remembered items go into a prompt, and why.

Owns the ranking, the exclusions and the token budget. Owns no items (`memory.ledger`), no vectors
(`memory.index`) and no prompt text (`agent.prompts`).

An item is left out when it was made from an excluded task, or from this very question under another
task's id: a prompt never shows an item the answer that it was made from, so that training sees memory
as serving does. Age is measured from the task's own time: the same task recalls the same items later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from memory.embed import Embedder
from memory.errors import ConfigError, IndexUnavailableError
from memory.index import Index
from memory.items import Candidate, Item, question_fingerprint
from memory.ledger import Ledger
from memory.records import MemoryKind, PastRun, Principle, Recalled, Task, text_of

log = logging.getLogger(__name__)

FETCH = 16
"""Nearest items looked at first; more when exclusions leave too few."""


class RecallConfig(BaseModel):
    """How much is recalled, and what counts. The weights need not sum to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int = Field(default=1, ge=0)
    """Past runs in a prompt, at most. Tiny models copy one example well and drown in many."""
    principles: int = Field(default=0, ge=0)
    """Principles in a prompt, at most."""
    token_budget: int = Field(default=400, ge=0)
    """Tokens of all recalled items together, as `estimate_tokens` counts them."""
    min_similarity: float = Field(default=0.3, ge=-1.0, le=1.0)
    """Cosine similarity below which nothing is recalled."""
    similarity_weight: float = Field(default=0.7, ge=0.0)
    score_weight: float = Field(default=0.2, ge=0.0)
    recency_weight: float = Field(default=0.1, ge=0.0)
    half_life_days: float = Field(default=30.0, gt=0.0)
    """Age at which an item's recency is one half."""


@dataclass(frozen=True)
class Recall:
    """What was recalled, best first: `items` has the numbers, the other two the records."""

    items: list[Recalled] = field(default_factory=list[Recalled])
    principles: list[Principle] = field(default_factory=list[Principle])
    runs: list[PastRun] = field(default_factory=list[PastRun])


class Recaller(Protocol):
    """The agent's view of memory."""

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
    ) -> Recall:
        """What may help with `task`, leaving out what was made from the excluded tasks."""
        ...


class NoMemory:
    """A `Recaller` that recalls nothing."""

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
    ) -> Recall:
        """Nothing."""
        return Recall()


class Memory:
    """The `Recaller` over the ledger, by the index or, while that cannot answer, by an exact scan."""

    def __init__(
        self, ledger: Ledger, index: Index | None, config: RecallConfig, embedder: Embedder | None = None
    ) -> None:
        """`embedder` is for a memory without an index; it defaults to the index's own."""
        chosen = embedder if embedder is not None else index.embedder if index is not None else None
        if chosen is None:
            raise ConfigError("a memory without an index needs an embedder: pass one")
        self._ledger = ledger
        self._index = index
        self._config = config
        self._embedder = chosen
        self._vectors: dict[str, Any] = {}

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
    ) -> Recall:
        """The best of the task's tenant's active items within the limits of `RecallConfig`.

        Raises `LedgerError`, and `ModelError` if the embedder fails.
        """
        question = task.question
        if not question.strip():
            return Recall()
        own = frozenset({task.id, task.fingerprint, question_fingerprint(question)})
        barred = own | exclude_task_ids | exclude_fingerprints
        limits = {MemoryKind.RUN: self._config.runs, MemoryKind.PRINCIPLE: self._config.principles}
        ranked: list[tuple[Recalled, Item]] = []
        for kind, limit in limits.items():
            if limit:
                ranked += self._ranked(kind, task, question, barred, limit)
        ranked.sort(key=lambda pair: (-pair[0].rank, pair[0].id))
        return self._within_limits(ranked, limits)

    def _ranked(
        self, kind: MemoryKind, task: Task, question: str, barred: frozenset[str], limit: int
    ) -> list[tuple[Recalled, Item]]:
        """The nearest allowed items with their rank; looks further until there is a choice of them."""
        fetch = max(FETCH, 4 * limit)
        while True:
            near = self._nearest(kind, task.tenant, question, fetch)
            close = {item_id: s for item_id, s in near if s >= self._config.min_similarity}
            found = self._ledger.candidates(kind, task.tenant, list(close)) if close else {}
            allowed = [candidate for candidate in found.values() if not candidate.origins & barred]
            exhausted = len(near) < fetch or len(close) < len(near)
            if len(allowed) >= 2 * limit or exhausted:
                return [(self._weighed(kind, task, c, close[c.item.id]), c.item) for c in allowed]
            fetch *= 4

    def _nearest(self, kind: MemoryKind, tenant: str, question: str, k: int) -> list[tuple[str, float]]:
        if self._index is not None:
            try:
                return self._index.query(kind, tenant, question, k)
            except IndexUnavailableError as exc:
                log.warning("recall scans the ledger: %s", exc)
        return self._scan(kind, tenant, question, k)

    def _scan(self, kind: MemoryKind, tenant: str, question: str, k: int) -> list[tuple[str, float]]:
        """What the index would answer, from all of the tenant's active items."""
        import numpy as np

        texts = {item.id: item.text for item in self._ledger.tenant_texts(kind, tenant) if item.text}
        if not texts:
            return []
        new = [item_id for item_id in texts if item_id not in self._vectors]
        for item_id, vector in zip(new, self._embedder.embed([texts[i] for i in new]), strict=True):
            self._vectors[item_id] = np.array(vector, dtype=np.float32)
        ids = list(texts)
        similarities = np.array([self._vectors[i] for i in ids]) @ np.array(self._embedder.embed([question])[0])
        best = sorted(zip(ids, similarities.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
        return best[:k]

    def _weighed(self, kind: MemoryKind, task: Task, candidate: Candidate, similarity: float) -> Recalled:
        config, item = self._config, candidate.item
        days = max(0.0, (task.created_at - item.created_at).total_seconds() / 86400)
        recency = 0.5 ** (days / config.half_life_days)
        rank = (
            config.similarity_weight * similarity + config.score_weight * item.score + config.recency_weight * recency
        )
        used = f"succeeded in {item.successes} of {item.uses} uses" if item.uses else "not used yet"
        why = f"similarity {similarity:.2f} to the question, {used}, {days:.0f} days old"
        return Recalled(
            id=item.id,
            kind=kind,
            similarity=similarity,
            score=item.score,
            recency=recency,
            rank=rank,
            tokens=estimate_tokens(item),
            why=why,
        )

    def _within_limits(self, ranked: Iterable[tuple[Recalled, Item]], limits: dict[MemoryKind, int]) -> Recall:
        """The best-ranked that fit; one that is too long makes room for the next."""
        recall = Recall()
        room, left = self._config.token_budget, dict(limits)
        for recalled, item in ranked:
            if not left[recalled.kind] or recalled.tokens > room:
                continue
            left[recalled.kind] -= 1
            room -= recalled.tokens
            recall.items.append(recalled)
            if isinstance(item, Principle):
                recall.principles.append(item)
            else:
                recall.runs.append(item)
        return recall


def estimate_tokens(item: Item) -> int:
    """About how many tokens an item takes in a prompt: a third of its characters, at least 1."""
    if isinstance(item, Principle):
        text = item.text
    else:
        text = "".join(text_of(message) + _calls(message.get("tool_calls")) for message in item.messages)
    return max(1, len(text) // 3)


def _calls(calls: Any) -> str:
    return json.dumps(calls) if calls else ""
