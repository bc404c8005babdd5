"""Searching a tenant's documents: passages near to a question in meaning, or in its very words, each with its place.

Vectors find what is meant, BM25 what is named (a part number has no meaning); their ranks are fused. Owns the ranking.
Owns no documents (`memory.documents`) and no vectors (`memory.index`).
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from memory import documents
from memory.database import Database
from memory.documents import Chunk, Document
from memory.reading import KnowledgeConfig
from memory.records import CHUNK
from memory.search import Nearest

FETCH = 64
WORDS = 6
"""Words of a question that are looked for as they are, the longest ones."""
SHORTEST_WORD = 4
"""Shorter ones without a digit say nothing by themselves."""
COMMON = frozenset(
    {"about", "been", "could", "does", "from", "have", "many", "much", "should", "that", "their", "them"}
    | {"then", "there", "these", "they", "this", "those", "were", "what", "when", "where", "which", "with"}
    | {"would", "your"}
)
"""Nor do these."""
RANKED = 64
"""Words that BM25 is asked for, the longest ones."""
FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009)."""

_CONTROL = re.compile(r"<(?=\|)|(?<=\|)>|<(?=/?s>)|<(?=(start|end)_of_turn>)|\[(?=/?INST\])|<(?=/?(experience|think)>)")
"""Where the marks begin or end by which chat templates, and our own prompt, know who speaks."""


@dataclass(frozen=True)
class Passage:
    """A chunk that answers a search, and the document that it stands in."""

    chunk: Chunk
    document: Document
    similarity: float | None
    """Its cosine to the question; None when only its words led to it."""
    excerpt: str
    """The beginning of it, on one line, as a run may be shown it."""


class Library(Protocol):
    """The agent's view of a tenant's documents."""

    def search(self, question: str, *, tenant: str, workload: str | None, limit: int | None = None) -> list[Passage]:
        """The passages that say most about the question, best first; `workload`: whose run asks, None for all.

        `limit`: None is as many as the settings show to a run.
        """
        ...


class NoLibrary:
    """A `Library` without a document."""

    def search(self, question: str, *, tenant: str, workload: str | None, limit: int | None = None) -> list[Passage]:
        """Nothing."""
        return []


class Documents:
    """The `Library` over the ledger."""

    def __init__(self, database: Database, nearest: Nearest, config: KnowledgeConfig) -> None:
        self._database = database
        self._nearest = nearest
        self._config = config

    def search(self, question: str, *, tenant: str, workload: str | None, limit: int | None = None) -> list[Passage]:
        """As `Library` says. Raises `LedgerError`, and `ModelError` if the embedder fails."""
        limit, chars = limit or self._config.hits, self._config.excerpt_chars
        if not question.strip():
            return []
        named = self._named(question, tenant)
        fetch = max(FETCH, 4 * limit)
        while True:
            near = self._nearest(CHUNK, tenant, question, fetch)
            cosine = dict(near)
            close = [chunk_id for chunk_id, s in near if s >= self._config.min_similarity]
            ids = [*close, *(chunk_id for chunk_id in named if chunk_id not in set(close))]
            held = documents.passages(self._database, ids, tenant=tenant)
            found = {
                chunk_id: Passage(chunk, document, cosine.get(chunk_id), excerpt(chunk.text, chars))
                for chunk_id, (chunk, document) in held.items()
                if workload is None or document.workload in (None, workload)
            }
            if len(found) >= limit or len(near) < fetch or len(close) < len(near):
                break
            fetch *= 4
        by_meaning = [chunk_id for chunk_id in close if chunk_id in found]
        by_words = _by_bm25(question, {chunk_id: _text(p) for chunk_id, p in found.items()})
        scores: dict[str, float] = {}
        for ranking in (by_meaning, by_words):
            for place, chunk_id in enumerate(ranking, 1):
                scores[chunk_id] = scores.get(chunk_id, 0.0) + 1 / (FUSION + place)
        best = sorted(scores, key=lambda chunk_id: (-scores[chunk_id], chunk_id))
        return [found[chunk_id] for chunk_id in best[:limit]]

    def _named(self, question: str, tenant: str) -> list[str]:
        """Chunks that hold one of the question's telling words."""
        words = set(re.findall(r"\w+(?:[-.]\w+)*", question.casefold()))
        telling = [w for w in words - COMMON if len(w) >= SHORTEST_WORD or any(c.isdigit() for c in w)]
        ids: dict[str, None] = {}
        for word in sorted(telling, key=lambda word: (-len(word), word))[:WORDS]:
            ids.update(dict.fromkeys(documents.with_word(self._database, word, tenant=tenant, limit=FETCH)))
        return list(ids)


def one_line(text: str) -> str:
    """A text that cannot be mistaken for another line, or for the end of a turn."""
    return _CONTROL.sub(lambda mark: f" {mark.group()}" if mark.group() == ">" else f"{mark.group()} ", _squeeze(text))


def excerpt(text: str, chars: int) -> str:
    """The beginning of a text on one line."""
    line = one_line(text)
    return line if len(line) <= chars else f"{line[: chars - 1]}…"


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _text(passage: Passage) -> str:
    return f"{passage.chunk.heading or ''}\n{passage.chunk.text}"


def _by_bm25(question: str, texts: dict[str, str]) -> list[str]:
    """Those of the texts that hold a word of the question, best first, by SQLite's full-text index."""
    words = sorted(set(re.findall(r"\w+", question.lower())), key=lambda word: (-len(word), word))[:RANKED]
    if not words or not texts:
        return []
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize='porter unicode61')")
        ids = list(texts)
        database.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", enumerate(texts.values()))
        asked = " OR ".join(f'"{word}"' for word in words)
        query = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY bm25(texts), rowid"
        return [ids[row[0]] for row in database.execute(query, (asked,))]
