"""Searching a tenant's memory by hand: the items nearest to a text, with nothing left out that recall would leave out.

By the index, or by an exact scan of the ledger, which any process may do: the index has one owner. Owns no ranking.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from memory.embed import Embedder
from memory.errors import IndexUnavailableError
from memory.index import Index
from memory.items import Item
from memory.ledger import Ledger
from memory.records import IndexKind, MemoryKind
from memory.rows import CHUNK
from memory.scan import Scanner

log = logging.getLogger(__name__)

FETCH = 16

Nearest = Callable[[IndexKind, str, str, int], list[tuple[str, float]]]
"""Ids of a kind and tenant nearest to a text, at most so many, with their cosine."""


@dataclass(frozen=True)
class Hit:
    """An item and its cosine to what was asked."""

    item: Item
    similarity: float


def by_index(ledger: Ledger, index: Index) -> Nearest:
    """Asks the index; the ledger, item by item, while the index cannot answer."""
    scanner = Scanner(ledger, index.embedder)

    def nearest(kind: IndexKind, tenant: str, text: str, k: int) -> list[tuple[str, float]]:
        try:
            near = index.query(kind, tenant, text, k)
        except IndexUnavailableError as exc:
            log.warning("a search scans the ledger: %s", exc)
            return scanner.nearest(kind, tenant, text, k)
        scanner.clear()
        return near

    return nearest


def by_scan(ledger: Ledger, embedder: Embedder) -> Nearest:
    """Asks the ledger only."""
    return Scanner(ledger, embedder).nearest


def search(
    ledger: Ledger,
    nearest: Nearest,
    text: str,
    *,
    tenant: str,
    kind: MemoryKind | None = None,
    workload: str | None = None,
    limit: int = 10,
) -> list[Hit]:
    """The tenant's recallable items (active, internalised) nearest to a text, nearest first.

    None leaves a filter out. Raises `LedgerError`, and `ModelError` if the embedder fails.
    """
    if not text.strip():
        return []
    hits: list[Hit] = []
    for each in MemoryKind if kind is None else [kind]:
        fetch = max(FETCH, limit)
        while True:
            near = nearest(each, tenant, text, fetch)
            found = {}
            for start in range(0, len(near), CHUNK):
                found |= ledger.candidates(each, tenant, [item_id for item_id, _ in near[start : start + CHUNK]])
            mine = [
                Hit(found[item_id].item, similarity)
                for item_id, similarity in near
                if item_id in found and workload in (None, found[item_id].item.workload)
            ]
            if len(mine) >= limit or len(near) < fetch:
                break
            fetch *= 4
        hits += mine
    return sorted(hits, key=lambda hit: (-hit.similarity, hit.item.id))[:limit]
