"""The exact scan: what recall asks while the index cannot answer. Slower, needs nothing but the ledger.

Owns the vectors of a tenant's items while they are needed. They are made once for all who ask at the same time,
and again only for items that changed; `clear` gives the memory back.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from memory.documents import Chunks
from memory.embed import Embedder
from memory.ledger import Ledger
from memory.records import CHUNK, IndexKind


@dataclass(frozen=True)
class _Held:
    """The items of one tenant and kind as they stood at a change of memory."""

    watermark: str
    ids: list[str]
    keys: list[bytes]
    """Hashes of the texts: nothing that was forgotten is kept in words."""
    vectors: Any


class Scanner:
    """Compares a question with every item of a tenant. Safe to share between threads."""

    def __init__(self, ledger: Ledger, embedder: Embedder) -> None:
        self._ledger = ledger
        self._embedder = embedder
        self._held: dict[tuple[IndexKind, str], _Held] = {}
        self._guard = threading.Lock()

    def nearest(self, kind: IndexKind, tenant: str, question: str, k: int) -> list[tuple[str, float]]:
        """The `k` recallable items nearest to the question with their cosine, nearest first.

        Raises `LedgerError`, and `ModelError` if the embedder fails.
        """
        import numpy as np

        with self._guard:
            held = self._current(kind, tenant)
        if not held.ids:
            return []
        similarities = held.vectors @ np.array(self._embedder.embed([question])[0], dtype=np.float32)
        best = np.argpartition(-similarities, k)[:k] if k < len(held.ids) else np.arange(len(held.ids))
        return sorted(((held.ids[i], float(similarities[i])) for i in best), key=lambda pair: (-pair[1], pair[0]))

    def clear(self) -> None:
        """Forget all vectors."""
        if self._held:
            with self._guard:
                self._held.clear()

    def _current(self, kind: IndexKind, tenant: str) -> _Held:
        import numpy as np

        source = Chunks(self._ledger.database) if kind == CHUNK else self._ledger
        watermark, before = source.memory_watermark(), self._held.get((kind, tenant))
        if before is not None and before.watermark == watermark:
            return before
        items = [item for item in source.tenant_texts(kind, tenant) if item.text]
        keys = [hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).digest() for item in items]
        rows: dict[bytes, Any] = dict(zip(before.keys, before.vectors, strict=True)) if before is not None else {}
        new = {key: item.text for key, item in zip(keys, items, strict=True) if key not in rows}
        for key, vector in zip(new, self._embedder.embed(list(new.values())), strict=True):
            rows[key] = np.array(vector, dtype=np.float32)
        vectors = np.array([rows[key] for key in keys])
        held = _Held(watermark, [item.id for item in items], keys, vectors)
        self._held[kind, tenant] = held
        return held
