"""A store of memories under load, in a process of its own: does what `bench recall` says on stdin, one JSON a line.

Owns the protocol and the clock, which are the same for every store; each store's own code is beside it or, for
ours, in `serve.benches.store`. Needs nothing but the standard library: it also runs in the peers' environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Store(Protocol):
    """What is measured. A text's position in the list of texts is its name."""

    def add(self, position: int, text: str) -> None:
        """Store one text; when this returns, a search finds it."""
        ...

    def fill(self, first: int, texts: list[str]) -> None:
        """Store many, the fastest way that the store offers."""
        ...

    def search(self, query: str, k: int) -> list[int]:
        """Positions of the `k` best, best first."""
        ...

    def rebuild(self) -> bool:
        """Make the index anew from what is kept; False for a store that cannot."""
        ...


def work(store: Store) -> None:
    """Answer every line of stdin with one on stdout; ends with stdin. The texts and queries are in the file argv[1]."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    texts, queries, stored = given["texts"], given["queries"], 0
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        deadline = time.perf_counter() + order.get("budget_s", 0.0)
        match order["do"]:
            case "fill":
                reply = _fill(store, texts, stored, order["upto"], deadline)
                stored = reply["stored"]
            case "add":
                reply = _add(store, texts, stored, order["upto"], deadline)
                stored = reply["stored"]
            case "search":
                reply = _search(store, queries, order["k"], deadline)
            case _:
                started = time.perf_counter()
                reply = {"rebuilt": store.rebuild(), "seconds": time.perf_counter() - started}
        _say(reply)


def _fill(store: Store, texts: list[str], stored: int, upto: int, deadline: float, batch: int = 250) -> dict[str, Any]:
    started = time.perf_counter()
    while stored < upto and time.perf_counter() < deadline:
        some = texts[stored : min(stored + batch, upto)]
        store.fill(stored, some)
        stored += len(some)
    return {"stored": stored, "seconds": time.perf_counter() - started}


def _add(store: Store, texts: list[str], stored: int, upto: int, deadline: float) -> dict[str, Any]:
    started = time.perf_counter()
    while stored < upto and time.perf_counter() < deadline:
        store.add(stored, texts[stored])
        stored += 1
    return {"stored": stored, "seconds": time.perf_counter() - started}


def _search(store: Store, queries: list[str], k: int, deadline: float) -> dict[str, Any]:
    store.search(queries[-1], k)  # what a first search loads is no query's latency
    found, ms = [], []
    worked = time.process_time()
    for query in queries:
        started = time.perf_counter()
        found.append(store.search(query, k))
        ms.append(1000 * (time.perf_counter() - started))
        if time.perf_counter() > deadline:
            break
    return {"found": found, "ms": ms, "cpu_ms": 1000 * (time.process_time() - worked)}


def _say(reply: dict[str, Any]) -> None:
    # Libraries print to stdout as they like; only lines that begin so are answers.
    sys.stdout.write(f"\n{ANSWER}{json.dumps(reply)}\n")
    sys.stdout.flush()


ANSWER = "#answer "
