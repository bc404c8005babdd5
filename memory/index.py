"""The vector index: which memory items are near a text. Chroma, embedded, derived from the ledger.

Owns the Chroma folder: opening it safely, following the ledger's outbox, rebuilding. Owns no item:
whatever is lost here is made again from `memory.ledger`, and every answer is checked against it.

- One collection per (tenant, kind): no query can reach another tenant's items, and none needs a
  metadata filter (several times slower).
- One process owns the folder (a lock file): Chroma shows a second process stale data or worse.
- A torn folder can crash a process that opens it, so a child process tries first. A folder that fails
  is moved aside (`FOLDER.broken-…`) and the index starts empty.
- `ready.json` names the embedder that made the vectors and is written last; without it, or with
  another embedder's name in it, the index answers nothing until it is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from memory.embed import Embedder
from memory.errors import IndexUnavailableError, boundary
from memory.ledger import ItemText, Ledger
from memory.records import MemoryKind

log = logging.getLogger(__name__)

READY = "ready.json"
PROBE_SECONDS = 120.0
PROBE = """
import sys
import chromadb
from chromadb.config import Settings
client = chromadb.PersistentClient(sys.argv[1], settings=Settings(anonymized_telemetry=False))
for collection in client.list_collections():
    if collection.count():
        some = collection.get(limit=1, include=["embeddings"])
        collection.query(query_embeddings=some["embeddings"], n_results=1)
"""
"""Reads every collection as a query would: opening alone does not load the vectors."""


class Index:
    """An open Chroma folder. Safe to share between threads; one at a time per folder."""

    def __init__(self, folder: Path, embedder: Embedder, client: Any, lock: IO[str], moved_aside: Path | None) -> None:
        self.embedder = embedder
        self.moved_aside = moved_aside
        """Where the folder went that could not be opened; None when all was well."""
        self.writing = threading.RLock()
        self._folder = folder
        self._client = client
        self._lock = lock
        self._collections: dict[str, Any] = {}
        self._ready = _ready_for(folder, embedder)

    @classmethod
    def open(cls, folder: Path, embedder: Embedder) -> Index:
        """Open or create the index in `folder`.

        A broken folder is moved aside, logged, and reported in `moved_aside`; the index then asks for
        a rebuild. Raises `IndexUnavailableError` if another process owns the folder, or if Chroma
        cannot be used at all.
        """
        with _translated(f"the index {folder} cannot be opened"):
            import chromadb  # noqa: F401  # absent here, it would pass for a broken folder below

            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _own(folder)
            try:
                moved_aside = _move_aside_if_broken(folder)
                return cls(folder, embedder, _client(folder), lock, moved_aside)
            except BaseException:
                lock.close()
                raise

    @property
    def needs_rebuild(self) -> bool:
        """The index is new, was broken, or was made by another embedder: see `rebuild`."""
        return not self._ready

    def upsert(self, kind: MemoryKind, tenant: str, items: list[tuple[str, str]]) -> None:
        """Add or replace (id, text) items; texts without any word are left out."""
        said = {item_id: text for item_id, text in items if text.strip()}
        if not said:
            return
        vectors = self.embedder.embed(list(said.values()))
        with self.writing, self._boundary():
            self._collection(kind, tenant, create=True).upsert(ids=list(said), embeddings=vectors)

    def delete(self, kind: MemoryKind, tenant: str, ids: list[str]) -> None:
        """Take items out; those that are not in are skipped."""
        with self.writing, self._boundary():
            collection = self._collection(kind, tenant)
            if collection is None:
                return
            if present := collection.get(ids=ids, include=[])["ids"]:
                collection.delete(ids=present)

    def query(self, kind: MemoryKind, tenant: str, text: str, k: int) -> list[tuple[str, float]]:
        """The `k` items nearest to `text`, nearest first, with their cosine similarity in -1..1.

        Raises `IndexUnavailableError` while a rebuild is due, and whenever Chroma fails.
        """
        if not self._ready:
            raise IndexUnavailableError(f"the index {self._folder} has to be rebuilt: run the reindex command")
        if k <= 0 or not text.strip():
            return []
        vectors = self.embedder.embed([text])
        with self._boundary():
            collection = self._collection(kind, tenant)
            if collection is None:
                return []
            found = collection.query(query_embeddings=vectors, n_results=k, include=["distances"])
            return [(item_id, 1.0 - d) for item_id, d in zip(found["ids"][0], found["distances"][0], strict=True)]

    def count(self) -> int:
        """How many items of all tenants and kinds are in."""
        with self._boundary():
            return sum(collection.count() for collection in self._client.list_collections())

    def clear(self) -> None:
        """Forget everything; the index then asks for a rebuild."""
        with self.writing, self._boundary():
            self._ready = False
            (self._folder / READY).unlink(missing_ok=True)
            self._collections.clear()
            for collection in self._client.list_collections():
                self._client.delete_collection(collection.name)

    def mark_ready(self) -> None:
        """Say that the index holds what the ledger does: written whole or not at all."""
        with self.writing, self._boundary():
            draft = self._folder / f"{READY}.part"
            draft.write_text(json.dumps(_maker(self.embedder)))
            draft.replace(self._folder / READY)
            self._ready = True

    def close(self) -> None:
        """Let go of the folder."""
        with self.writing:
            self._ready = False
            self._collections.clear()
            try:
                self._client.close()
            finally:
                self._lock.close()

    def _collection(self, kind: MemoryKind, tenant: str, create: bool = False) -> Any:
        """The tenant's collection of this kind; None where nothing was ever added."""
        name = f"{kind}-{hashlib.sha256(tenant.encode('utf-8', 'surrogatepass')).hexdigest()[:40]}"
        if name not in self._collections:
            if create:
                configuration = {"hnsw": {"space": "cosine"}}
                made = self._client.get_or_create_collection(name, configuration=configuration, embedding_function=None)
            else:
                from chromadb.errors import NotFoundError

                try:
                    made = self._client.get_collection(name, embedding_function=None)
                except NotFoundError:
                    return None
            self._collections[name] = made
        return self._collections[name]

    def _boundary(self) -> AbstractContextManager[None]:
        return _translated(f"the index {self._folder} failed")


def drain(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Let the index follow the ledger's outbox; returns how many changes it followed.

    Changes are acknowledged once they are in, and what is written is how an item stands now, so a
    drain that dies is simply done again. An index that asks for a rebuild gets one.
    """
    if index.needs_rebuild:
        rebuild(ledger, index, batch)
    followed = 0
    with index.writing:
        while changes := ledger.outbox(batch):
            _write(index, ledger.item_texts([change.item_id for change in changes]))
            ledger.ack_outbox(changes[-1].seq)
            followed += len(changes)
    return followed


def rebuild(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Make the index anew from the ledger's active items; returns how many it holds.

    Meanwhile the index answers no query, and recall scans the ledger.
    """
    with index.writing:
        index.clear()
        upto = ledger.memory_watermark()
        for page in _pages(ledger, batch):
            _write(index, page)
        if upto:
            ledger.ack_outbox(int(upto))
        index.mark_ready()
        return index.count()


def sync(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Bring the index up to date at start: drain, count, and rebuild if the numbers disagree.

    Returns how many items the index holds.
    """
    drain(ledger, index, batch)
    held, due = index.count(), ledger.count_active()
    if held == due:
        return held
    log.warning("the index holds %d items and the ledger %d: rebuilding it", held, due)
    return rebuild(ledger, index, batch)


def _pages(ledger: Ledger, batch: int) -> Iterator[list[ItemText]]:
    after = 0
    while page := ledger.active_texts(after, batch):
        yield page
        after = page[-1].seq


def _write(index: Index, texts: Iterable[ItemText]) -> None:
    def place(item: ItemText) -> tuple[str, str, bool]:
        return item.tenant, item.kind, item.active

    for (tenant, kind, active), group in groupby(sorted(texts, key=place), place):
        found = list(group)
        if active:
            index.upsert(MemoryKind(kind), tenant, [(item.id, item.text) for item in found])
        else:
            index.delete(MemoryKind(kind), tenant, [item.id for item in found])


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        with boundary(IndexUnavailableError, what):
            yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        # A panic of Chroma's Rust core arrives as a BaseException of a class that cannot be imported.
        raise IndexUnavailableError(f"{what}: {exc}") from exc


def _maker(embedder: Embedder) -> dict[str, Any]:
    return {"embedder": embedder.name, "dimensions": embedder.dimensions}


def _ready_for(folder: Path, embedder: Embedder) -> bool:
    try:
        return json.loads((folder / READY).read_text()) == _maker(embedder)
    except (OSError, ValueError):
        return False


def _client(folder: Path) -> Any:
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))


def _own(folder: Path) -> IO[str]:
    """Take the folder's lock, which ends with the process; the lock file is beside the folder."""
    import fcntl

    lock = folder.with_name(f"{folder.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise IndexUnavailableError(
            f"the index {folder} is open already, here or in another process: close that one first"
        ) from exc
    return lock


def _move_aside_if_broken(folder: Path) -> Path | None:
    """Try the folder in a child process; returns where a broken one went."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    command = [sys.executable, "-c", PROBE, str(folder)]
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        reason = f"did not open within {PROBE_SECONDS:g} s"
    else:
        if child.returncode == 0:
            return None
        said = child.stderr.strip().splitlines()
        reason = f"exit code {child.returncode}" + (f", {said[-1]}" if said else "")
    aside = folder.with_name(f"{folder.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    folder.rename(aside)
    log.warning("the index %s is broken (%s): moved to %s, a new one is built from the ledger", folder, reason, aside)
    return aside
