"""Memory items in the ledger: principles and past runs, their use, status, origins and outbox.

Functions on an open connection; `memory.ledger.Ledger` gives them their transactions. Owns no
vectors: what has to reach the index is said by outbox rows, written with the change they announce.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from sqlalchemy import ColumnElement, Connection, bindparam, func, insert, select, update

from memory import rows, uses
from memory.database import Database
from memory.errors import ConflictError, NotFoundError
from memory.records import (
    MEMORY_TRANSITIONS,
    IndexKind,
    MemoryKind,
    MemoryStatus,
    PastRun,
    Principle,
    Task,
)
from memory.schema import item_origins, items, outbox, tasks, trajectories
from memory.uplift import Exposure

Item = Principle | PastRun

MODELS: dict[MemoryKind, type[Principle] | type[PastRun]] = {
    MemoryKind.PRINCIPLE: Principle,
    MemoryKind.RUN: PastRun,
}
_KINDS = {model: kind for kind, model in MODELS.items()}

RECALLABLE = frozenset({MemoryStatus.ACTIVE, MemoryStatus.INTERNALISED})
"""What the index holds: an internalised item is looked up, to count how runs go without it, and never shown."""

Model = TypeVar("Model", Principle, PastRun)

# What every recall and every new item asks is built once: that takes SQLAlchemy several times as long as running it.
_IDS = bindparam("ids", expanding=True)
_RECALLABLE_ONES = select(items.c.body).where(
    items.c.id.in_(_IDS),
    # SQLite would walk the tenant's whole index instead of looking up the ids: an expression keeps it from that
    # (14 ms became 0.1 ms at 30,000 items).
    func.coalesce(items.c.tenant, "") == bindparam("tenant"),
    func.coalesce(items.c.kind, "") == bindparam("kind"),
    func.coalesce(items.c.status, "").in_(sorted(RECALLABLE)),
)
_ORIGINS = select(item_origins.c.item_id, item_origins.c.origin).where(item_origins.c.item_id.in_(_IDS))
_SOURCES = select(trajectories.c.id, trajectories.c.task_id, trajectories.c.tenant).where(trajectories.c.id.in_(_IDS))
_FINGERPRINTS = select(tasks.c.fingerprint).where(tasks.c.id.in_(_IDS))


@dataclass(frozen=True)
class OutboxRow:
    """One change that the index has to follow: `op` is what it came to when it was written."""

    seq: int
    item_id: str
    kind: IndexKind
    op: Literal["upsert", "delete"]


@dataclass(frozen=True)
class ItemText:
    """What the index needs of an item; `active`: it is to be found."""

    seq: int
    id: str
    kind: IndexKind
    tenant: str
    text: str
    active: bool


@dataclass(frozen=True)
class Candidate:
    """A recallable item, what it was made from (task ids and task fingerprints), and how runs with it went."""

    item: Item
    origins: frozenset[str]
    exposure: Exposure = field(default_factory=Exposure)


@dataclass(frozen=True)
class Change:
    """One entry of an item's history; `at` in Unix seconds, None before they were noted."""

    seq: int
    op: Literal["upsert", "delete"]
    why: str
    at: int | None


def kind_of(item: Item) -> MemoryKind:
    """The kind of an item."""
    return MemoryKind.PRINCIPLE if isinstance(item, Principle) else MemoryKind.RUN


def question_fingerprint(question: str) -> str:
    """The fingerprint of a task that is nothing but this question."""
    return Task(id="", messages=[{"role": "user", "content": question}]).fingerprint


def add(connection: Connection, item: Item) -> None:
    """Add an item with its origins and its outbox row.

    Raises `ConflictError` for a used id, and when a source belongs to another tenant.
    """
    origins = _origins(connection, item)
    if insert_as_is(connection, item, "added") and origins:
        connection.execute(insert(item_origins), [{"item_id": item.id, "origin": origin} for origin in sorted(origins)])


def insert_as_is(connection: Connection, item: Item, why: str = "imported") -> bool:
    """The item and its outbox row; its origins are the caller's. Whether it was new; raises `ConflictError`."""
    text = (item.text if isinstance(item, Principle) else item.question).strip()
    columns = {"kind": kind_of(item), "tenant": item.tenant, "status": item.status, "text": text}
    new = rows.add(connection, items, item, "memory item", {"id": item.id}, **columns)
    if new:
        _announce(connection, item, why)
    return new


def _origins(connection: Connection, item: Item) -> set[str]:
    made_from: set[str] = set()
    origins: set[str] = set()
    for ids in rows.chunks(item.sources):
        for source in connection.execute(_SOURCES, {"ids": ids}):
            if source.tenant != item.tenant:
                raise ConflictError(f"memory item {item.id!r} of tenant {item.tenant!r} has another's run as source")
            made_from.add(source.task_id)
    if isinstance(item, PastRun):
        made_from.add(item.task_id)
        origins.add(question_fingerprint(item.question))
    for ids in rows.chunks(made_from):
        origins.update(connection.execute(_FINGERPRINTS, {"ids": ids}).scalars())
    return origins | made_from


def _announce(connection: Connection, item: Item, why: str) -> None:
    op = "upsert" if item.status in RECALLABLE else "delete"
    change = {"item_id": item.id, "kind": kind_of(item), "op": op, "why": why, "acked": False, "at": int(time.time())}
    connection.execute(insert(outbox), change)


def get(connection: Connection, model: type[Model], item_id: str) -> Model:
    """The principle or past run of that id; raises `NotFoundError`."""
    kind = _KINDS[model]
    return rows.find(connection, items, model, kind, {"id": item_id, "kind": kind})


def listing(connection: Connection, model: type[Model], tenant: str | None, status: MemoryStatus | None) -> list[Model]:
    """Principles or past runs in the order they were added; None leaves a filter out."""
    query = select(items.c.body).where(items.c.kind == _KINDS[model]).order_by(items.c.seq)
    if tenant is not None:
        query = query.where(items.c.tenant == tenant)
    if status is not None:
        query = query.where(items.c.status == status)
    return rows.read(connection, model, query)


def credit_use(connection: Connection, item_id: str, success: bool, use_key: str) -> None:
    """Count a use once per key; raises `NotFoundError`."""
    item = any_kind(connection, item_id)
    uses.count(connection, [uses.Use(item_id, use_key, success)], tenant=item.tenant)


def set_status(connection: Connection, item_id: str, status: MemoryStatus, why: str) -> None:
    """Move an item on; a move to where it stands is none. Raises `ConflictError` for an illegal move."""
    item = any_kind(connection, item_id)
    if item.status is status:
        return
    if status not in MEMORY_TRANSITIONS[item.status]:
        raise ConflictError(f"memory item {item_id!r} is {item.status}: it cannot become {status}")
    change(connection, item.model_copy(update={"status": status}), why)


def change(connection: Connection, item: Item, why: str) -> None:
    """Put an item in the place of its former self, with its outbox row. The caller knows that it may change so."""
    text = item.text if isinstance(item, Principle) else item.question
    rows.put(connection, items, item, {"id": item.id}, status=item.status, text=text.strip())
    _announce(connection, item, why)


def merge(connection: Connection, winner_id: str, loser_id: str, why: str) -> Item:
    """Let an item that says the same as another be absorbed by it: sources, origins and judged runs move over.

    The loser stays as a tombstone that names the winner. A repeated call changes nothing. Returns the winner.
    Raises `NotFoundError`, and `ConflictError` for items of other tenants or kinds, a pinned loser and a status
    that cannot be merged.
    """
    winner, loser = any_kind(connection, winner_id), any_kind(connection, loser_id)
    if loser.merged_into == winner_id:
        return winner
    _may_absorb(winner, loser)
    known = {row.origin for row in connection.execute(select(item_origins).where(item_origins.c.item_id == winner_id))}
    theirs = connection.execute(select(item_origins).where(item_origins.c.item_id == loser_id))
    if origins := [{"item_id": winner_id, "origin": row.origin} for row in theirs if row.origin not in known]:
        connection.execute(insert(item_origins), origins)
    more = uses.take_over(connection, winner, loser)
    grown = {
        "sources": sorted({*winner.sources, *loser.sources}),
        "uses": winner.uses + more.n,
        "successes": winner.successes + more.successes,
    }
    merged = winner.model_copy(update=grown)
    change(connection, merged, f"took over {loser_id}: {why}")
    absorbed = {"status": MemoryStatus.MERGED, "merged_into": winner_id}
    change(connection, loser.model_copy(update=absorbed), f"merged into {winner_id}: {why}")
    return merged


def _may_absorb(winner: Item, loser: Item) -> None:
    alike = winner.tenant == loser.tenant and type(winner) is type(loser)
    if isinstance(winner, Principle) and isinstance(loser, Principle):
        alike = alike and winner.kind is loser.kind
    if not alike or winner.id == loser.id:
        raise ConflictError(f"memory items {winner.id!r} and {loser.id!r} are not two of one tenant and kind")
    if loser.pinned:
        raise ConflictError(f"memory item {loser.id!r} is pinned: unpin it before it is merged")
    if MemoryStatus.MERGED not in MEMORY_TRANSITIONS[loser.status] or winner.status is MemoryStatus.MERGED:
        raise ConflictError(
            f"memory item {loser.id!r} ({loser.status}) cannot be merged into {winner.id!r} ({winner.status})"
        )


def history(connection: Connection, item_id: str) -> list[Change]:
    """What happened to an item and why, oldest first."""
    query = select(outbox).where(outbox.c.item_id == item_id).order_by(outbox.c.seq)
    return [Change(r.seq, r.op, r.why, r.at) for r in connection.execute(query)]


def any_kind(connection: Connection, item_id: str) -> Item:
    """The item of that id, whatever it is; raises `NotFoundError`."""
    found = connection.execute(select(items.c.kind).where(items.c.id == item_id)).scalar_one_or_none()
    if found is None:
        raise NotFoundError(f"no memory item {item_id!r} in the ledger")
    if found == MemoryKind.PRINCIPLE:
        return get(connection, Principle, item_id)
    return get(connection, PastRun, item_id)


def newest_change(connection: Connection) -> int:
    """The newest outbox row's seq, 0 when there is none."""
    return connection.execute(select(func.max(outbox.c.seq))).scalar_one() or 0


def pending(connection: Connection, limit: int) -> list[OutboxRow]:
    """The oldest changes that the index has not followed yet."""
    return _changes(connection, outbox.c.acked.is_(False), limit)


def changes(connection: Connection, after: int, limit: int) -> list[OutboxRow]:
    """Changes behind the seq `after`, followed or not."""
    return _changes(connection, outbox.c.seq > after, limit)


def _changes(connection: Connection, wanted: ColumnElement[bool], limit: int) -> list[OutboxRow]:
    query = select(outbox).where(wanted).order_by(outbox.c.seq).limit(limit)
    return [OutboxRow(r.seq, r.item_id, MemoryKind(r.kind), r.op) for r in connection.execute(query)]


def acknowledge(connection: Connection, seq_upto: int) -> None:
    """Mark changes up to and including `seq_upto` as followed."""
    pending_ones = outbox.c.seq <= seq_upto, outbox.c.acked.is_(False)
    connection.execute(update(outbox).where(*pending_ones).values(acked=True))


def texts(connection: Connection, ids: list[str]) -> list[ItemText]:
    """The present text and standing of these items."""
    found: list[ItemText] = []
    for part in rows.chunks(ids):
        found += _item_texts(connection, items.c.id.in_(part))
    return found


def active_texts(connection: Connection, after_seq: int, limit: int) -> list[ItemText]:
    """A page of all tenants' recallable items: what an index is rebuilt from."""
    wanted = items.c.seq > after_seq, items.c.status.in_(RECALLABLE)
    return _item_texts(connection, *wanted, limit=limit)


def tenant_texts(connection: Connection, kind: IndexKind, tenant: str) -> list[ItemText]:
    """All recallable items of one tenant and kind: what an exact scan compares."""
    wanted = items.c.tenant == tenant, items.c.kind == kind, items.c.status.in_(RECALLABLE)
    return _item_texts(connection, *wanted)


def _item_texts(connection: Connection, *wanted: object, limit: int | None = None) -> list[ItemText]:
    columns = items.c.seq, items.c.id, items.c.kind, items.c.tenant, items.c.text, items.c.status
    query = select(*columns).where(*wanted).order_by(items.c.seq).limit(limit)  # type: ignore[arg-type]
    return [
        ItemText(r.seq, r.id, MemoryKind(r.kind), r.tenant, r.text, r.status in RECALLABLE)
        for r in connection.execute(query)
    ]


def candidates(connection: Connection, kind: MemoryKind, tenant: str, ids: list[str]) -> dict[str, Candidate]:
    """Those of the ids that are this tenant's recallable items of this kind."""
    given = {"ids": ids, "tenant": tenant, "kind": kind}
    found = {item.id: item for item in rows.read(connection, MODELS[kind], _RECALLABLE_ONES, given)}
    origins: dict[str, set[str]] = {item_id: set() for item_id in found}
    for item_id, origin in connection.execute(_ORIGINS, {"ids": list(found)}):
        origins[item_id].add(origin)
    measured = {id: sum(by.values(), Exposure()) for id, by in uses.exposures(connection, list(found)).items()}
    return {
        item_id: Candidate(item, frozenset(origins[item_id]), measured.get(item_id, Exposure()))
        for item_id, item in found.items()
    }


def tenants(database: Database) -> list[str]:
    """Who has items: for what an operator does to all of them in turn."""
    with database.reading() as connection:
        return list(connection.execute(select(items.c.tenant).distinct().order_by(items.c.tenant)).scalars())


def count_active(connection: Connection) -> int:
    """How many items an index should hold: recallable ones with a text."""
    query = select(func.count()).select_from(items)
    return connection.execute(query.where(items.c.status.in_(RECALLABLE), items.c.text != "")).scalar_one()
