"""Documents that users gave the agent to read: records, chunks, and the outbox that the index follows them by.

A changed document takes its former self's place; both and their outbox rows are one transaction. Owns the rows.
Owns no reading of files (`memory.reading`), no vectors (`memory.index`) and no ranking (`memory.library`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field
from sqlalchemy import Connection, delete, func, insert, select, update

from memory import rows
from memory.database import Database
from memory.items import ItemText, OutboxRow
from memory.reading import Form, KnowledgeConfig, Reading, read
from memory.records import CHUNK, IndexKind, Record, new_id, now
from memory.schema import chunk_outbox, chunks, documents


class Document(Record):
    """A document of one tenant. `source` is its name: another content under it replaces this one."""

    id: str = Field(default_factory=lambda: new_id("doc"))
    tenant: str
    source: str
    workload: str | None = None
    """Only runs of this workload find it; None: all do."""
    form: Form
    title: str | None = None
    sha256: str
    bytes: int
    chunks: int
    added_by: str
    user: str | None = None
    """On whose behalf, as the client tells its own users apart."""
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)


class Chunk(Record):
    """A stretch of a document and its place there."""

    id: str
    document_id: str
    n: int
    """Its number in the document, from 0."""
    text: str
    heading: str | None = None
    page: int | None = None
    first_line: int | None = None
    last_line: int | None = None

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        parts = [f"page {self.page}"] if self.page is not None else []
        if self.first_line is not None:
            one = self.last_line in (None, self.first_line)
            parts.append(f"line {self.first_line}" if one else f"lines {self.first_line}-{self.last_line}")
        return ", ".join([*parts, *([f'"{self.heading}"'] if self.heading else [])]) or f"part {self.n + 1}"


class Fate(StrEnum):
    """What adding a document came to."""

    ADDED = "added"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Given:
    """A document as it comes in: its bytes' hash and size, whose it is and who brings it."""

    tenant: str
    source: str
    sha256: str
    bytes: int
    by: str
    workload: str | None = None
    user: str | None = None


def bring(
    database: Database,
    data: bytes,
    config: KnowledgeConfig,
    *,
    name: str,
    tenant: str,
    source: str,
    by: str,
    workload: str | None = None,
    user: str | None = None,
) -> tuple[Document, Fate]:
    """Read a file, whose form its `name` tells, and keep it; one that is known is not read again.

    Raises `ConfigError` for a file that cannot be read (`memory.reading.read`), and `LedgerError`.
    """
    given = Given(tenant, source, hashlib.sha256(data).hexdigest(), len(data), by, workload, user)
    with database.reading() as connection:
        same = _known(connection, given)
    return (same, Fate.UNCHANGED) if same is not None else add(database, given, read(data, name, config))


def add(database: Database, given: Given, reading: Reading) -> tuple[Document, Fate]:
    """Keep a document, in the place of the one of its source that has another content or workload.

    The same content for the same runs is kept once, under the name it came first by.
    """
    with database.writing() as connection:
        if (same := _known(connection, given)) is not None:
            return same, Fate.UNCHANGED
        key = {"tenant": given.tenant, "source": given.source}
        body = connection.execute(select(documents.c.body).where(*_mine(key))).scalar_one_or_none()
        former = rows.load(Document, body) if body is not None else None
        fields: dict[str, Any] = {**asdict(given), "added_by": given.by, "chunks": len(reading.pieces)}
        fields |= {"form": reading.form, "title": reading.title}
        del fields["by"]
        if former is not None:
            fields |= {"id": former.id, "created_at": former.created_at}
        document = Document.model_validate(fields)
        if former is None:
            columns = key | {"sha256": document.sha256}
            rows.add(connection, documents, document, "document", {"id": document.id}, **columns)
        else:
            rows.put(connection, documents, document, {"id": document.id}, sha256=document.sha256)
            _drop_chunks(connection, document)
        _add_chunks(connection, document, reading)
        return document, Fate.ADDED if former is None else Fate.REPLACED


def page(database: Database, *, tenant: str, after: str | None = None, limit: int = 100) -> tuple[list[Document], bool]:
    """Documents in the order they were added, from behind the id `after`, and whether more follow. NotFoundError."""
    with database.reading() as connection:
        given: dict[str, Any] = {"after": after, "limit": limit, "newest_first": False}
        return rows.page(connection, documents, Document, {"tenant": tenant}, **given)


def get(database: Database, document_id: str, *, tenant: str) -> Document:
    """The document; NotFoundError for an unknown one and for another tenant's."""
    with database.reading() as connection:
        return rows.find(connection, documents, Document, "document", {"id": document_id, "tenant": tenant})


def chunks_of(database: Database, document_id: str, *, tenant: str) -> list[Chunk]:
    """A document's chunks in their order. NotFoundError as `get`."""
    with database.reading() as connection:
        rows.require(connection, documents, "document", {"id": document_id, "tenant": tenant})
        query = select(chunks.c.body).where(chunks.c.document_id == document_id).order_by(chunks.c.seq)
        return rows.read(connection, Chunk, query)


def remove(database: Database, document_id: str, *, tenant: str) -> Document:
    """Delete a document with its chunks. NotFoundError as `get`."""
    with database.writing() as connection:
        key = {"id": document_id, "tenant": tenant}
        document = rows.find(connection, documents, Document, "document", key)
        _drop_chunks(connection, document)
        connection.execute(delete(documents).where(documents.c.id == document_id))
        return document


def passages(database: Database, ids: Sequence[str], *, tenant: str) -> dict[str, tuple[Chunk, Document]]:
    """Those of the chunks that are this tenant's, each with its document."""
    found: dict[str, tuple[Chunk, Document]] = {}
    with database.reading() as connection:
        for part in rows.chunks(ids):
            joined = chunks.join(documents, chunks.c.document_id == documents.c.id)
            query = select(chunks.c.body, documents.c.body.label("document")).select_from(joined)
            of: dict[str, Document] = {}
            for row in connection.execute(query.where(chunks.c.id.in_(part), chunks.c.tenant == tenant)):
                document = of.setdefault(row.document, rows.load(Document, row.document))
                chunk = rows.load(Chunk, row.body)
                found[chunk.id] = chunk, document
    return found


def with_word(database: Database, word: str, *, tenant: str, limit: int) -> list[str]:
    """Ids of the tenant's chunks that hold the word, in any case; at most so many, the oldest."""
    query = select(chunks.c.id).where(chunks.c.tenant == tenant, chunks.c.text.icontains(word, autoescape=True))
    with database.reading() as connection:
        return list(connection.execute(query.order_by(chunks.c.seq).limit(limit)).scalars())


class Chunks:
    """The chunks as the index follows them: `memory.index.Followed`, as the ledger is for memory items."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def memory_watermark(self) -> str:
        """The newest change's number as text, "" before the first."""
        with self._database.reading() as connection:
            return str(connection.execute(select(func.max(chunk_outbox.c.seq))).scalar_one() or "")

    def outbox(self, limit: int) -> list[OutboxRow]:
        """The oldest changes that the index has not followed yet."""
        return self._changes(chunk_outbox.c.acked.is_(False), limit)

    def changes(self, after: int, limit: int) -> list[OutboxRow]:
        """Changes behind the seq `after`, followed or not."""
        return self._changes(chunk_outbox.c.seq > after, limit)

    def ack_outbox(self, seq_upto: int) -> None:
        """The index has followed all changes up to and including `seq_upto`."""
        with self._database.writing() as connection:
            waiting = chunk_outbox.c.seq <= seq_upto, chunk_outbox.c.acked.is_(False)
            connection.execute(update(chunk_outbox).where(*waiting).values(acked=True))

    def item_texts(self, ids: list[str]) -> list[ItemText]:
        """The present text of these chunks; one that is gone is not active."""
        found: list[ItemText] = []
        with self._database.reading() as connection:
            for part in rows.chunks(ids):
                here = _texts(connection, chunks.c.id.in_(part))
                gone = set(part) - {text.id for text in here}
                c = chunk_outbox.c
                query = select(c.chunk_id, c.tenant).where(c.chunk_id.in_(gone)).distinct()
                found += here
                found += [ItemText(0, r.chunk_id, CHUNK, r.tenant, "", False) for r in connection.execute(query)]
        return found

    def active_texts(self, after_seq: int, limit: int) -> list[ItemText]:
        """A page of all tenants' chunks: what the index is rebuilt from."""
        with self._database.reading() as connection:
            return _texts(connection, chunks.c.seq > after_seq, limit=limit)

    def tenant_texts(self, kind: IndexKind, tenant: str) -> list[ItemText]:
        """All chunks of one tenant: what an exact scan compares."""
        with self._database.reading() as connection:
            return _texts(connection, chunks.c.tenant == tenant)

    def count_active(self) -> int:
        """How many chunks the index should hold."""
        with self._database.reading() as connection:
            return connection.execute(select(func.count()).select_from(chunks)).scalar_one()

    def _changes(self, wanted: Any, limit: int) -> list[OutboxRow]:
        query = select(chunk_outbox).where(wanted).order_by(chunk_outbox.c.seq).limit(limit)
        with self._database.reading() as connection:
            return [OutboxRow(r.seq, r.chunk_id, CHUNK, r.op) for r in connection.execute(query)]


def of_user(connection: Connection, tenant: str, user: str | None) -> list[tuple[Document, list[Chunk]]]:
    """A tenant's documents with their chunks; with `user`, those that it brought or that were brought for it."""
    found: list[tuple[Document, list[Chunk]]] = []
    for document in rows.read(connection, Document, select(documents.c.body).where(documents.c.tenant == tenant)):
        if user is None or user in (document.user, document.added_by):
            query = select(chunks.c.body).where(chunks.c.document_id == document.id)
            found.append((document, rows.read(connection, Chunk, query)))
    return found


def _known(connection: Connection, given: Given) -> Document | None:
    query = select(documents.c.body).where(documents.c.tenant == given.tenant, documents.c.sha256 == given.sha256)
    same = [d for d in rows.read(connection, Document, query.order_by(documents.c.seq)) if d.workload == given.workload]
    own = next((d for d in same if d.source == given.source), None)
    if own is not None or not same:
        return own
    # A file that came to equal another one must not leave what it said before behind.
    named = select(documents.c.id).where(documents.c.tenant == given.tenant, documents.c.source == given.source)
    return same[0] if connection.execute(named).first() is None else None


def _mine(key: rows.Key) -> list[Any]:
    return [documents.c[name] == value for name, value in key.items()]


def _add_chunks(connection: Connection, document: Document, reading: Reading) -> None:
    new: list[dict[str, Any]] = []
    for n, piece in enumerate(reading.pieces):
        chunk = Chunk(id=new_id("chunk"), document_id=document.id, n=n, **asdict(piece))
        # Its headings say what it is about as much as its own words.
        text = f"{piece.heading}\n{piece.text}" if piece.heading else piece.text
        row = {"id": chunk.id, "document_id": document.id, "tenant": document.tenant, "text": text}
        new.append({**row, "body": rows.dump(chunk)})
    connection.execute(insert(chunks), new)
    _announce(connection, [row["id"] for row in new], document.tenant, "upsert")


def _drop_chunks(connection: Connection, document: Document) -> None:
    mine = chunks.c.document_id == document.id
    gone = list(connection.execute(select(chunks.c.id).where(mine)).scalars())
    connection.execute(delete(chunks).where(mine))
    _announce(connection, gone, document.tenant, "delete")


def _announce(connection: Connection, ids: Iterable[str], tenant: str, op: str) -> None:
    changes = [{"chunk_id": chunk_id, "tenant": tenant, "op": op, "acked": False} for chunk_id in ids]
    if changes:
        connection.execute(insert(chunk_outbox), changes)


def _texts(connection: Connection, wanted: Any, limit: int | None = None) -> list[ItemText]:
    query = select(chunks.c.seq, chunks.c.id, chunks.c.tenant, chunks.c.text).where(wanted)
    return [
        ItemText(r.seq, r.id, CHUNK, r.tenant, r.text, True)
        for r in connection.execute(query.order_by(chunks.c.seq).limit(limit))
    ]
