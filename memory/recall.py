"""Recall: which few remembered items go into a prompt, and why.

Owns the ranking, the exclusions and the token budget. Owns no items (`memory.ledger`), no vectors
(`memory.index`) and no prompt text (`agent.prompts`).

An item is left out when it was made from an excluded task, or from this very question under another
task's id: a prompt never shows an item the answer that it was made from, so that training sees memory
as serving does. Age is measured from the task's own time: the same task recalls the same items later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from memory.embed import Embedder
from memory.errors import ConfigError, IndexUnavailableError
from memory.index import Index
from memory.items import Candidate, Item, question_fingerprint
from memory.ledger import Ledger
from memory.records import MemoryKind, MemoryStatus, PastRun, Principle, Recalled, Task, text_of
from memory.scan import Scanner
from memory.uplift import shrunken, uplift

log = logging.getLogger(__name__)

FETCH = 16
"""Nearest items looked at first; more when exclusions leave too few."""

RETIRED_SCANNED = 2000
"""Retired principles, the newest, that a new one is compared with."""


class RecallConfig(BaseModel):
    """How much is recalled, and what counts. The weights need not sum to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int = Field(default=1, ge=0)
    """Past runs in a prompt, at most. Two help an untrained 135M model more (92% against 67%, `bench usefulness`), but
    after a night both end alike (docs/memory.md), and the second costs 200 tokens a task."""
    principles: int = Field(default=0, ge=0)
    """Principles in a prompt, at most; the same model solved 26% under one or two of them, 22% under nothing."""
    asked_runs: int = Field(default=1, ge=0)
    """Past runs at most when the agent asks for experience in the middle of a run."""
    asked_principles: int = Field(default=2, ge=0)
    """Principles at most then."""
    token_budget: int = Field(default=400, ge=0)
    """Tokens of all recalled items together, as `estimate_tokens` counts them."""
    min_similarity: float = Field(default=0.3, ge=-1.0, le=1.0)
    """Cosine similarity below which nothing is recalled."""
    similarity_weight: float = Field(default=0.7, ge=0.0)
    score_weight: float = Field(default=0.2, ge=0.0)
    recency_weight: float = Field(default=0.1, ge=0.0)
    uplift_weight: float = Field(default=0.5, ge=0.0)
    """What a measured uplift, in -1..1 and shrunken towards 0, adds to an item's rank."""
    min_exposures: int = Field(default=10, ge=1)
    """Judged runs with an item and without it, each, from which on its uplift counts."""
    half_life_days: float = Field(default=30.0, gt=0.0)
    """Age at which an item's recency is one half."""
    max_overlap: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of words in common above which an item only repeats a better one, and is passed over."""
    withhold_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of served runs from which an item is withheld, to measure what it is worth."""


@dataclass(frozen=True)
class Recall:
    """What was recalled, best first: `items` has the numbers, `principles` and `runs` the records.

    `withheld`: what belongs here and is not to be shown (`withhold`, or internalised); `unshown` has its records.
    """

    items: list[Recalled] = field(default_factory=list[Recalled])
    principles: list[Principle] = field(default_factory=list[Principle])
    runs: list[PastRun] = field(default_factory=list[PastRun])
    withheld: list[Recalled] = field(default_factory=list[Recalled])
    unshown: list[Item] = field(default_factory=list[Item])


def withhold(recall: Recall, run_id: str, share: float) -> Recall:
    """The recall without those items whose turn it is to be missing from this run; they are in `withheld`.

    Item and run decide, by a hash: the same run asked again goes the same way.
    """

    def missing(item_id: str) -> bool:
        digest = hashlib.sha256(f"{run_id}/{item_id}".encode()).digest()
        return int.from_bytes(digest[:8]) < share * 2**64

    out = {item.id for item in recall.items if missing(item.id)}
    if not out:
        return recall
    gone: list[Item] = [item for item in (*recall.principles, *recall.runs) if item.id in out]
    return replace(
        recall,
        items=[item for item in recall.items if item.id not in out],
        principles=[item for item in recall.principles if item.id not in out],
        runs=[item for item in recall.runs if item.id not in out],
        withheld=[*recall.withheld, *(i.model_copy(update={"withheld": True}) for i in recall.items if i.id in out)],
        unshown=[*recall.unshown, *gone],
    )


@dataclass(frozen=True)
class Asked:
    """What the agent asks memory in the middle of a run, in its own words."""

    query: str
    known: frozenset[str] = frozenset()
    """Ids of the items that the run was shown, or had withheld, before."""


class Recaller(Protocol):
    """The agent's view of memory."""

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
        asked: Asked | None = None,
    ) -> Recall:
        """What may help with `task`, leaving out what was made from the excluded tasks; searched for by its question,
        or by what is `asked`."""
        ...


class NoMemory:
    """A `Recaller` that recalls nothing."""

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
        asked: Asked | None = None,
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
        self._scanner = Scanner(ledger, chosen)

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
        asked: Asked | None = None,
    ) -> Recall:
        """The best of the task's tenant's active items within the limits of `RecallConfig`.

        Raises `LedgerError`, and `ModelError` if the embedder fails.
        """
        question = task.question if asked is None else asked.query
        if not question.strip():
            return Recall()
        own = frozenset({task.id, task.fingerprint, question_fingerprint(task.question)})
        barred = own | exclude_task_ids | exclude_fingerprints | (asked.known if asked else frozenset())
        limits = {MemoryKind.RUN: self._config.runs, MemoryKind.PRINCIPLE: self._config.principles}
        if asked is not None:
            limits = {MemoryKind.RUN: self._config.asked_runs, MemoryKind.PRINCIPLE: self._config.asked_principles}
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
            allowed = [c for c in found.values() if c.item.id not in barred and not c.origins & barred]
            exhausted = len(near) < fetch or len(close) < len(near)
            if len(allowed) >= 2 * limit or exhausted:
                return [(self._weighed(kind, task, c, close[c.item.id]), c.item) for c in allowed]
            fetch *= 4

    def _nearest(self, kind: MemoryKind, tenant: str, question: str, k: int) -> list[tuple[str, float]]:
        if self._index is not None:
            try:
                near = self._index.query(kind, tenant, question, k)
            except IndexUnavailableError as exc:
                log.warning("recall scans the ledger: %s", exc)
            else:
                self._scanner.clear()
                return near
        return self._scanner.nearest(kind, tenant, question, k)

    def neighbours(self, principle: Principle, *, at_least: float, k: int) -> list[Principle]:
        """The `k` principles of its tenant and kind nearest to this one, from cosine `at_least` on, nearest first.

        Retired ones are among them: a lesson that was put away does not come back in other words.
        Raises `LedgerError`, and `ModelError` if the embedder fails.
        """
        tenant, asked = principle.tenant, max(FETCH, 8 * k)
        near = self._nearest(MemoryKind.PRINCIPLE, tenant, principle.text, asked)
        found = self._ledger.candidates(MemoryKind.PRINCIPLE, tenant, [item_id for item_id, _ in near])
        known = {item_id: candidate.item for item_id, candidate in found.items()}
        retired = {p.id: p for p in self._ledger.principles(tenant, MemoryStatus.RETIRED)[-RETIRED_SCANNED:] if p.text}
        near += self._similarities(retired.values(), principle.text)
        close: list[Principle] = []
        for item_id, similarity in sorted(near, key=lambda pair: (-pair[1], pair[0])):
            item = known.get(item_id) or retired.get(item_id)
            if similarity >= at_least and isinstance(item, Principle) and item.kind is principle.kind:
                close.append(item)
        return [item for item in close if item.id != principle.id][:k]

    def _similarities(self, principles: Iterable[Principle], text: str) -> list[tuple[str, float]]:
        known = list(principles)
        asked, *vectors = self._embedder.embed([text, *(p.text for p in known)])
        return [
            (p.id, sum(x * y for x, y in zip(asked, vector, strict=True)))
            for p, vector in zip(known, vectors, strict=True)
        ]

    def _weighed(self, kind: MemoryKind, task: Task, candidate: Candidate, similarity: float) -> Recalled:
        config, item = self._config, candidate.item
        days = max(0.0, (task.created_at - item.created_at).total_seconds() / 86400)
        recency = 0.5 ** (days / config.half_life_days)
        rank = (
            config.similarity_weight * similarity + config.score_weight * item.score + config.recency_weight * recency
        )
        used = f"succeeded in {item.successes} of {item.uses} uses" if item.uses else "not used yet"
        why = f"similarity {similarity:.2f} to the question, {used}, {days:.0f} days old"
        worth = shrunken(candidate.exposure, config.min_exposures)
        if worth is not None and (measured := uplift(candidate.exposure)) is not None:
            rank += config.uplift_weight * worth
            why += f", uplift {measured.value:+.2f} ({measured.low:+.2f} to {measured.high:+.2f})"
        return Recalled(
            id=item.id,
            kind=kind,
            similarity=similarity,
            score=item.score,
            recency=recency,
            rank=rank,
            tokens=estimate_tokens(item),
            why=why,
            uplift=worth,
            withheld=item.status is MemoryStatus.INTERNALISED,
        )

    def _within_limits(self, ranked: Iterable[tuple[Recalled, Item]], limits: dict[MemoryKind, int]) -> Recall:
        """The best-ranked that fit; one that is too long, or repeats a better one, makes room for the next.

        An internalised item takes nobody's place: it is noted where it would have been shown.
        """
        recall = Recall()
        room, left = self._config.token_budget, dict(limits)
        said: list[frozenset[str]] = []
        for recalled, item in ranked:
            if not left[recalled.kind] or recalled.tokens > room:
                continue
            words = _words(item)
            if any(_overlap(words, other) > self._config.max_overlap for other in said):
                continue
            if recalled.withheld:
                recall.withheld.append(recalled)
                recall.unshown.append(item)
                continue
            said.append(words)
            left[recalled.kind] -= 1
            room -= recalled.tokens
            recall.items.append(recalled)
            if isinstance(item, Principle):
                recall.principles.append(item)
            else:
                recall.runs.append(item)
        return recall


def _words(item: Item) -> frozenset[str]:
    """What an item says, as a set: numbers count, since puzzles of one form differ in nothing else."""
    return frozenset(re.findall(r"\w+", (item.text if isinstance(item, Principle) else item.question).casefold()))


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard's index (1901)."""
    together = one | other
    return len(one & other) / len(together) if together else 1.0


def estimate_tokens(item: Item) -> int:
    """About how many tokens an item takes in a prompt: a third of its characters, at least 1."""
    if isinstance(item, Principle):
        text = item.text
    else:
        text = "".join(text_of(message) + _calls(message.get("tool_calls")) for message in item.messages)
    return max(1, len(text) // 3)


def _calls(calls: Any) -> str:
    return json.dumps(calls) if calls else ""
