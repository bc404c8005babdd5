"""How well a way of searching finds what is of the query's kind: rankings, their fusion, and the figures.

Owns lexical ranking (BM25), reciprocal rank fusion and recall@k with intervals. Owns no labels (`evals.labelled`).
Every ranking is exact: what an approximate index loses is measured by `bench recall`.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.labelled import Labelled
from evals.stats import paired_difference, wilson
from memory.embed import Embedder

Ranking = list[int]
"""Positions of stored texts, best first; those that do not match at all are left out."""

Ranker = Callable[[str], Ranking]

FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009)."""


@dataclass(frozen=True)
class Found:
    """Where the first right text stood for every query, 1 for the first place; None where it was not found."""

    ranks: list[int | None]
    kinds: list[str]

    @property
    def reciprocal(self) -> list[float]:
        """1/rank, 0 where nothing right was found."""
        return [1 / rank if rank else 0.0 for rank in self.ranks]

    def recall(self, k: int) -> str:
        """Share of queries with a right text among the first `k`, with its 95% Wilson interval."""
        hits, n = sum(rank is not None and rank <= k for rank in self.ranks), len(self.ranks)
        low, high = wilson(hits, n)
        return f"{hits / n:.3f} [{low:.3f}, {high:.3f}]"

    def mrr(self) -> str:
        """Mean reciprocal rank with its 95% bootstrap interval."""
        mean = paired_difference([0.0] * len(self.ranks), self.reciprocal)
        return f"{mean.points / 100:.3f} [{mean.low / 100:.3f}, {mean.high / 100:.3f}]"


def search_all(labelled: Labelled, rank: Ranker) -> Found:
    """Ask every query of the set."""
    ranks = []
    for kind, query in labelled.asked:
        places = (place for place, i in enumerate(rank(query), 1) if labelled.stored[i][0] == kind)
        ranks.append(next(places, None))
    return Found(ranks, [kind for kind, _ in labelled.asked])


def rankers(texts: Sequence[str], embedders: Mapping[str, Embedder]) -> dict[str, Ranker]:
    """Each embedder alone, BM25 alone, and each embedder fused with BM25 (`…+fts5`).

    BM25 is SQLite's FTS5, which needs no package; beside it bm25s, where that is installed.
    """
    lexical = {"fts5": by_fts5(texts)}
    if importlib.util.find_spec("bm25s") is not None:
        lexical["bm25s"] = by_bm25s(texts)
    found: dict[str, Ranker] = {name: by_vectors(texts, embedder) for name, embedder in embedders.items()}
    hybrid = {f"{name}+{other}": fused(found[name], rank) for name in embedders for other, rank in lexical.items()}
    return found | lexical | hybrid


def by_vectors(texts: Sequence[str], embedder: Embedder) -> Ranker:
    """By cosine similarity. Raises `ModelError`, here and when it is asked."""
    import numpy as np

    stored = np.asarray(embedder.embed(list(texts)), dtype=np.float32)

    def rank(query: str) -> Ranking:
        similarities = stored @ np.asarray(embedder.embed([query])[0], dtype=np.float32)
        return np.argsort(-similarities, kind="stable").tolist()

    return rank


def by_fts5(texts: Sequence[str]) -> Ranker:
    """By BM25 as SQLite's full-text index computes it, words stemmed by Porter's rules."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize='porter unicode61')")
    database.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", enumerate(texts))

    def rank(query: str) -> Ranking:
        words = " OR ".join(f'"{word}"' for word in sorted(set(re.findall(r"\w+", query.lower()))))
        if not words:
            return []
        rows = database.execute("SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY bm25(texts), rowid", (words,))
        return [row[0] for row in rows]

    return rank


def by_bm25s(texts: Sequence[str]) -> Ranker:
    """By BM25 as the package bm25s computes it, English stop words left out."""
    import bm25s  # pyright: ignore[reportMissingImports]
    import numpy as np

    index: Any = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)

    def rank(query: str) -> Ranking:
        [words] = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        scores = index.get_scores(words) if words else np.zeros(len(texts))
        return [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] > 0]

    return rank


def fused(*parts: Ranker) -> Ranker:
    """By the sum of 1 / (60 + rank) over the rankings."""

    def rank(query: str) -> Ranking:
        scores: dict[int, float] = {}
        for part in parts:
            for place, position in enumerate(part(query), 1):
                scores[position] = scores.get(position, 0.0) + 1 / (FUSION + place)
        return sorted(scores, key=lambda position: (-scores[position], position))

    return rank


def compare(labelled: Labelled, embedders: Mapping[str, Embedder]) -> dict[str, float | int | str]:
    """recall@1, recall@5 and MRR of every way of searching, and what BM25 adds to each embedder's MRR, in points."""
    name = labelled.name
    figures: dict[str, float | int | str] = {
        f"{name}_stored": len(labelled.stored),
        f"{name}_asked": len(labelled.asked),
        f"{name}_chance_recall@1": round(labelled.chance, 3),
    }
    found = {
        way: search_all(labelled, rank) for way, rank in rankers([t for _, t in labelled.stored], embedders).items()
    }
    for way, result in found.items():
        figures[f"{name}_{way}_recall@1"] = result.recall(1)
        figures[f"{name}_{way}_recall@5"] = result.recall(5)
        figures[f"{name}_{way}_mrr"] = result.mrr()
    for way, result in found.items():
        embedder, plus, _ = way.rpartition("+")
        if plus:
            gain = paired_difference(found[embedder].reciprocal, result.reciprocal)
            figures[f"{name}_{way}_gain_points"] = f"{gain.points:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
    return figures
