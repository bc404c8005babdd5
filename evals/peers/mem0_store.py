"""mem0 as `bench recall` measures it: its open-source package, `infer=False`, so that no LLM is in the loop.

Run by the Python of the peers' environment, as `python -m evals.peers.mem0_store TEXTS qdrant|chroma`: its default
vector store, Qdrant embedded, or the one that Nightschool uses. The embedder is ours, the same as everybody's.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evals.peers.worker import work
from memory.embed import load_embedder

USER = "bench"


class Mem0:
    """One user's memories in the working folder."""

    def __init__(self, vectors: str) -> None:
        # Its default LLM's client is made, never called. Nothing may be sent home while we measure.
        os.environ.update(MEM0_TELEMETRY="False", MEM0_DIR="mem0", OPENAI_API_KEY="none", ANONYMIZED_TELEMETRY="False")
        from langchain_core.embeddings import Embeddings
        from mem0 import Memory  # pyright: ignore[reportMissingImports]

        embedder = self._embedder = load_embedder("wordllama", Path("embedder"))

        class Same(Embeddings):
            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return embedder.embed(texts)

            def embed_query(self, text: str) -> list[float]:
                return embedder.embed([text])[0]

        store: dict[str, Any] = {"collection_name": USER, "path": f"{vectors}-vectors"}
        if vectors == "qdrant":
            store |= {"embedding_model_dims": embedder.dimensions, "on_disk": True}
        config = {
            "embedder": {"provider": "langchain", "config": {"model": Same()}},
            "vector_store": {"provider": vectors, "config": store},
            "history_db_path": "history.db",
        }
        self._memory = Memory.from_config(config)
        self._positions: dict[str, int] = {}

    def add(self, position: int, text: str) -> None:
        self._memory.add(text, user_id=USER, infer=False)
        self._positions[text] = position

    def fill(self, first: int, texts: list[str]) -> None:
        """What `add` puts into the vector store, many at once: by `add` alone 100,000 texts take an hour.

        Leaves out the row of the change history, which no search reads. How fast mem0 stores is measured by `add`.
        """
        now = datetime.now(UTC).isoformat()
        payloads = [
            {
                "user_id": USER,
                "role": "user",
                "data": text,
                "hash": hashlib.md5(text.encode()).hexdigest(),
                "created_at": now,
                "updated_at": now,
                "text_lemmatized": text,
            }
            for text in texts
        ]
        ids = [str(uuid.uuid4()) for _ in texts]
        self._memory.vector_store.insert(vectors=self._embedder.embed(texts), ids=ids, payloads=payloads)
        self._positions.update((text, position) for position, text in enumerate(texts, first))

    def search(self, query: str, k: int) -> list[int]:
        found = self._memory.search(query, filters={"user_id": USER}, top_k=k, threshold=0.0)["results"]
        return [self._positions[item["memory"]] for item in found]

    def rebuild(self) -> bool:
        return False


if __name__ == "__main__":
    work(Mem0(sys.argv[2]))
