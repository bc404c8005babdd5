"""LangMem as `bench recall` measures it: its two tools over LangGraph's in-memory store, as its documentation has it.

Run by the Python of the peers' environment. The embedder is ours, the same as everybody's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.peers.worker import work
from memory.embed import load_embedder


class LangMem:
    """What is stored lives in this process only, so there is nothing to rebuild from."""

    def __init__(self) -> None:
        from langgraph.store.memory import InMemoryStore
        from langmem import (  # pyright: ignore[reportMissingImports]
            create_manage_memory_tool,
            create_search_memory_tool,
        )

        embedder = load_embedder("wordllama", Path("embedder"))
        index: Any = {"dims": embedder.dimensions, "embed": embedder.embed, "fields": ["content"]}
        store = InMemoryStore(index=index)
        self._manage = create_manage_memory_tool(namespace=("memories", "bench"), store=store)
        self._search = create_search_memory_tool(
            namespace=("memories", "bench"), store=store, response_format="content_and_artifact"
        )
        self._positions: dict[str, int] = {}

    def add(self, position: int, text: str) -> None:
        self._manage.func(content=text, action="create")
        self._positions[text] = position

    def fill(self, first: int, texts: list[str]) -> None:
        for position, text in enumerate(texts, first):
            self.add(position, text)

    def search(self, query: str, k: int) -> list[int]:
        _, found = self._search.func(query=query, limit=k)
        return [self._positions[item.value["content"]] for item in found]

    def rebuild(self) -> bool:
        return False


if __name__ == "__main__":
    work(LangMem())
