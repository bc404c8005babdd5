"""The vector index: which memory items are near a text. Chroma, embedded, derived from the ledger.

Owns the Chroma folder: opening it safely, following the ledger's outbox, rebuilding. Owns no item:
whatever is lost here is made again from `memory.ledger`, and every answer is checked against it.

- One collection per (tenant, kind): no query can reach another tenant's items, and none needs a
  metadata filter (several times slower).
- A folder that cannot be read is moved aside (`memory.chroma`) and the index starts empty.
- A build is a set of collections that one embedder made. `ready.json` names the build that answers; a new one
  is made beside it, and becomes the one that answers when that file is replaced. So another embedder, or a
  reindex, costs no answer, as long as the embedder of the old build can still be loaded.
- Deleted or torn while it is open, the folder is noticed at the next query; then nothing is answered (recall
  scans the ledger) until `reset` and a rebuild, which `memory.indexer` does in the background.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Protocol

from memory.chroma import ChromaConfig, Place, own, place_of
from memory.documents import Chunks
from memory.embed import Embedder
from memory.errors import IndexUnavailableError, NightschoolError, boundary
from memory.items import ItemText, OutboxRow
from memory.ledger import Ledger
from memory.records import IndexKind, index_kind

log = logging.getLogger(__name__)

HNSW = {"max_neighbors": 32, "ef_construction": 200, "ef_search": 200}
"""Chroma's own (16, 100, 100) find 98.1% of the five nearest among 100,000 questions that are much alike; these find
more than 99% in the same time."""

READY = "ready.json"


@dataclass(frozen=True)
class Build:
    """A set of collections, and the embedder that made their vectors."""

    name: str
    embedder: Embedder


class Followed(Protocol):
    """What the index follows: rows with a text, and the changes of them in order. `Ledger` and `Chunks` say how."""

    def memory_watermark(self) -> str: ...
    def outbox(self, limit: int) -> list[OutboxRow]: ...
    def changes(self, after: int, limit: int) -> list[OutboxRow]: ...
    def ack_outbox(self, seq_upto: int) -> None: ...
    def item_texts(self, ids: list[str]) -> list[ItemText]: ...
    def active_texts(self, after_seq: int, limit: int) -> list[ItemText]: ...
    def count_active(self) -> int: ...


class Index:
    """An open Chroma folder. Safe to share between threads; one at a time per folder."""

    def __init__(
        self, folder: Path, embedder: Embedder, place: Place, client: Any, lock: IO[str], moved_aside: Path | None
    ) -> None:
        self.embedder = embedder
        """What a rebuild is made with; queries go by the embedder of the build that answers."""
        self.moved_aside = moved_aside
        """Where the folder went that could not be opened; None when all was well."""
        self.fault: str | None = None
        """Why Chroma stopped answering; a `reset` is due."""
        self.wake: Callable[[], None] = _nobody
        """Tells whoever keeps the index (`memory.indexer`) that there is something to do."""
        self.writing = threading.RLock()
        self.rebuilding = threading.RLock()
        self._folder = folder
        self._place = place
        self._client = client
        self._lock = lock
        self._collections: dict[str, Any] = {}
        self._build: Build | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        embedder: Embedder,
        load: Callable[[str], Embedder] | None = None,
        chroma: ChromaConfig | None = None,
    ) -> Index:
        """Open or create the index in `folder`.

        `chroma`: a server to keep the vectors on; the folder then holds only what this process knows of them.
        `load`: gives an embedder by its name, so that an index made by another one answers until it is rebuilt.
        A broken folder is moved aside, logged, and reported in `moved_aside`; the index then asks for
        a rebuild. Raises `IndexUnavailableError` if another process owns the folder, or if Chroma
        cannot be used at all.
        """
        with _translated(f"the index {folder} cannot be opened"):
            import chromadb  # noqa: F401  # absent here, it would pass for a broken folder below

            folder.parent.mkdir(parents=True, exist_ok=True)
            place = place_of(folder, chroma or ChromaConfig())
            lock = own(folder)
            try:
                moved_aside = place.probe()
                client = place.connect()
                folder.mkdir(exist_ok=True)
                index = cls(folder, embedder, place, client, lock, moved_aside)
                index._build = _standing(folder, embedder, load)
                return index
            except BaseException:
                lock.close()
                raise

    @property
    def needs_rebuild(self) -> bool:
        """The index is new, was broken, or was made by another embedder: see `rebuild`."""
        return self._build is None or self._build.embedder is not self.embedder

    @property
    def is_whole(self) -> bool:
        """Nothing failed, and the folder is where it was: it can be written to as it is."""
        return self.fault is None and self._folder.is_dir()

    @property
    def state(self) -> str:
        """`ready`; `rebuilding` while another build is due or made; `broken` with the reason."""
        if self.fault is not None:
            return f"broken: {self.fault}"
        return "rebuilding" if self.needs_rebuild else "ready"

    def upsert(self, kind: IndexKind, tenant: str, items: list[tuple[str, str]], build: Build | None = None) -> None:
        """Add or replace (id, text) items; texts without any word are left out.

        `build`: one that is being made, instead of the one that answers.
        """
        said = {item_id: text for item_id, text in items if text.strip()}
        if not said:
            return
        into = build or self._answering()
        vectors = into.embedder.embed(list(said.values()))
        with self.writing, self._boundary():
            self._collection(into, kind, tenant, create=True).upsert(ids=list(said), embeddings=vectors)

    def delete(self, kind: IndexKind, tenant: str, ids: list[str], build: Build | None = None) -> None:
        """Take items out; those that are not in are skipped."""
        with self.writing, self._boundary():
            collection = self._collection(build or self._answering(), kind, tenant)
            if collection is None:
                return
            if present := collection.get(ids=ids, include=[])["ids"]:
                collection.delete(ids=present)

    def query(self, kind: IndexKind, tenant: str, text: str, k: int) -> list[tuple[str, float]]:
        """The `k` items nearest to `text`, nearest first, with their cosine similarity in -1..1.

        Raises `IndexUnavailableError` while the index can only be rebuilt, and whenever Chroma fails.
        """
        build = self._answering()
        if k <= 0 or not text.strip():
            return []
        vectors = build.embedder.embed([text])
        try:
            if not (self._folder / READY).exists():
                raise IndexUnavailableError(f"the index {self._folder} is gone from the disk")
            with _translated(f"the index {self._folder} failed"):
                return self._nearest(build, kind, tenant, vectors, k)
        except IndexUnavailableError as exc:
            if self._build is build:
                self._stop_answering(str(exc))
                raise
        return self.query(kind, tenant, text, k)  # it was replaced by a newer build in mid-query

    def _nearest(
        self, build: Build, kind: IndexKind, tenant: str, vectors: list[list[float]], k: int
    ) -> list[tuple[str, float]]:
        collection = self._collection(build, kind, tenant)
        if collection is None and self._build is not build:
            raise IndexUnavailableError(f"the index {self._folder} was replaced in mid-query")
        if collection is None:
            return []
        found = collection.query(query_embeddings=vectors, n_results=k, include=["distances"])
        return [(item_id, 1.0 - d) for item_id, d in zip(found["ids"][0], found["distances"][0], strict=True)]

    def _answering(self) -> Build:
        if self._build is None:
            raise IndexUnavailableError(f"the index {self._folder} has to be rebuilt: run the reindex command")
        return self._build

    def _stop_answering(self, why: str) -> None:
        self._build, self.fault = None, why
        log.warning("the index answers no more and is rebuilt, recall scans the ledger: %s", why)
        self.wake()

    def count(self) -> int:
        """How many items of all tenants and kinds are in the build that answers."""
        build = self._answering()
        with self._boundary():
            return sum(c.count() for c in self._client.list_collections() if c.name.startswith(f"{build.name}-"))

    def begin(self) -> Build:
        """A new, empty build beside the one that answers; what an earlier attempt left behind goes."""
        with self.writing:
            self._drop_others(self._build)
        maker = hashlib.sha256(json.dumps(_maker(self.embedder)).encode()).hexdigest()
        return Build(f"{maker[:8]}-{secrets.token_hex(3)}", self.embedder)

    def switch(self, build: Build) -> None:
        """From now on this build answers, also after a restart; the others are dropped."""
        with self.writing:
            with self._boundary():
                self._load(build)
                draft = self._folder / f"{READY}.part"
                draft.write_text(json.dumps({**_maker(build.embedder), "build": build.name}))
                draft.replace(self._folder / READY)
            self._build = build
            with suppress(IndexUnavailableError):  # the next `begin` tries again
                self._drop_others(build)
                self._place.wipe()

    def reset(self) -> None:
        """After a fault: put what is left of the folder aside and start with an empty one."""
        with self.writing, self._boundary():
            self._build = None
            self._collections.clear()
            with suppress(Exception):  # what it still held is lost already
                self._client.close()
            self.moved_aside = self._place.put_aside() or self.moved_aside
            self._client = self._place.connect()
            self._folder.mkdir(exist_ok=True)
            self.fault = None

    def close(self) -> None:
        """Let go of the folder."""
        with self.writing:
            self._build = None
            self.wake = _nobody
            self._collections.clear()
            try:
                self._client.close()
            finally:
                self._lock.close()

    def _load(self, build: Build) -> None:
        """Ask every collection once: only then has Chroma made its files and taken in all that was written, and the
        first recall finds it loaded."""
        asked = [[1.0] + [0.0] * (build.embedder.dimensions - 1)]
        for collection in self._client.list_collections():
            if collection.name.startswith(f"{build.name}-"):
                collection.query(query_embeddings=asked, n_results=1, include=[])

    def _drop_others(self, kept: Build | None) -> None:
        with self._boundary():
            for collection in self._client.list_collections():
                if kept is None or not collection.name.startswith(f"{kept.name}-"):
                    self._client.delete_collection(collection.name)
            self._collections.clear()
            self._place.sweep()

    def _collection(self, build: Build, kind: IndexKind, tenant: str, create: bool = False) -> Any:
        """The tenant's collection of this kind; None where nothing was ever added."""
        name = f"{build.name}-{kind}-{hashlib.sha256(tenant.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
        found = self._collections.get(name)
        if found is None:
            if create:
                configuration = {"hnsw": {"space": "cosine", **HNSW}}
                found = self._client.get_or_create_collection(
                    name, configuration=configuration, embedding_function=None
                )
            else:
                from chromadb.errors import NotFoundError

                try:
                    found = self._client.get_collection(name, embedding_function=None)
                except NotFoundError:
                    return None
            self._collections[name] = found
        return found

    @contextmanager
    def _boundary(self) -> Iterator[None]:
        """Whatever fails in here makes a `reset` due."""
        try:
            with _translated(f"the index {self._folder} failed"):
                yield
        except IndexUnavailableError as exc:
            self._build, self.fault = None, str(exc)
            raise


def drain(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Let the index follow the ledger's outbox; returns how many changes it followed.

    Changes are acknowledged once they are in, and what is written is how an item stands now, so a
    drain that dies is simply done again. An index that asks for a rebuild gets one first.
    """
    with index.rebuilding:
        if index.needs_rebuild:
            rebuild(ledger, index, batch)
    followed = 0
    with index.writing:
        for source in _followed(ledger):
            while changes := source.outbox(batch):
                _write(index, source.item_texts([change.item_id for change in changes]))
                source.ack_outbox(changes[-1].seq)
                followed += len(changes)
    return followed


def rebuild(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Make the index anew from the ledger's recallable items and documents; returns how many it holds.

    Meanwhile the old build, if there is one, answers and follows the outbox.
    """
    with index.rebuilding:
        if not index.is_whole:
            index.reset()
        build = index.begin()
        sources = _followed(ledger)
        upto = [int(source.memory_watermark() or 0) for source in sources]
        for source in sources:
            for page in _pages(source, batch):
                _write(index, page, build)
        # What changed meanwhile: most of it while others may write, the rest while nobody does.
        upto = [_catch_up(source, index, build, seq, batch) for source, seq in zip(sources, upto, strict=True)]
        with index.writing:
            for source, seq in zip(sources, upto, strict=True):
                if seq := _catch_up(source, index, build, seq, batch):
                    source.ack_outbox(seq)
            index.switch(build)
            return index.count()


def _followed(ledger: Ledger) -> tuple[Followed, ...]:
    return ledger, Chunks(ledger.database)


def _catch_up(source: Followed, index: Index, build: Build, after: int, batch: int) -> int:
    while changes := source.changes(after, batch):
        _write(index, source.item_texts([change.item_id for change in changes]), build)
        after = changes[-1].seq
    return after


def sync(ledger: Ledger, index: Index, batch: int = 256) -> int:
    """Bring the index up to date at start: drain, count, and rebuild if the numbers disagree.

    Returns how many items the index holds.
    """
    drain(ledger, index, batch)
    with index.writing:
        held, due = index.count(), sum(source.count_active() for source in _followed(ledger))
    if held == due:
        return held
    log.warning("the index holds %d items and the ledger %d: rebuilding it", held, due)
    return rebuild(ledger, index, batch)


def _pages(source: Followed, batch: int) -> Iterator[list[ItemText]]:
    after = 0
    while page := source.active_texts(after, batch):
        yield page
        after = page[-1].seq


def _write(index: Index, texts: Iterable[ItemText], build: Build | None = None) -> None:
    def place(item: ItemText) -> tuple[str, str, bool]:
        return item.tenant, item.kind, item.active and bool(item.text.strip())

    for (tenant, kind, active), group in groupby(sorted(texts, key=place), place):
        found = list(group)
        if active:
            index.upsert(index_kind(kind), tenant, [(item.id, item.text) for item in found], build)
        else:
            index.delete(index_kind(kind), tenant, [item.id for item in found], build)


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


def _standing(folder: Path, embedder: Embedder, load: Callable[[str], Embedder] | None) -> Build | None:
    """The build that was answering when the folder was closed; None when nothing can ask it any more."""
    try:
        made = json.loads((folder / READY).read_text())
        name = made.pop("build")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if made == _maker(embedder):
        return Build(name, embedder)
    if load is None:
        return None
    with suppress(NightschoolError):
        former = load(made["embedder"])
        if made == _maker(former):
            log.warning("the index was made by the embedder %r, which answers until it is rebuilt", former.name)
            return Build(name, former)
    return None


def _nobody() -> None:
    return None
