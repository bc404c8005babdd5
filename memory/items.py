"""Memory items in the ledger: principles and past runs, their use, status, origins and outbox.

Functions on an open connection; `memory.ledger.Ledger` gives them their transactions. Owns no
vectors: what has to reach the index is said by outbox rows, written with the change they announce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from sqlalchemy import Connection, func, insert, select, update

from memory import rows
from memory.errors import ConflictError, NotFoundError
from memory.records import (
    MEMORY_TRANSITIONS,
    MemoryKind,
    MemoryStatus,
    PastRun,
    Principle,
    Task,
)
from memory.schema import item_origins, item_uses, items, outbox, tasks, trajectories

Item = Principle | PastRun

MODELS: dict[MemoryKind, type[Principle] | type[PastRun]] = {
    MemoryKind.PRINCIPLE: Principle,
    MemoryKind.RUN: PastRun,
}
_KINDS = {model: kind for kind, model in MODELS.items()}

Model = TypeVar("Model", Principle, PastRun)


@dataclass(frozen=True)
class OutboxRow:
    """One change that the index has to follow: `op` is what it came to when it was written."""

    seq: int
    item_id: str
    kind: MemoryKind
    op: Literal["upsert", "delete"]


@dataclass(frozen=True)
class ItemText:
    """What the index needs of an item."""

    seq: int
    id: str
    kind: MemoryKind
    tenant: str
    text: str
    active: bool


@dataclass(frozen=True)
class Candidate:
    """An active item with what it was made from: task ids and task fingerprints."""

    item: Item
    origins: frozenset[str]


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
    kind = kind_of(item)
    text = (item.text if isinstance(item, Principle) else item.question).strip()
    origins = _origins(connection, item)
    columns = {"kind": kind, "tenant": item.tenant, "status": item.status, "text": text}
    if not rows.add(connection, items, item, "memory item", {"id": item.id}, **columns):
        return
    if origins:
        connection.execute(insert(item_origins), [{"item_id": item.id, "origin": origin} for origin in sorted(origins)])
    _announce(connection, item, "added")


def _origins(connection: Connection, item: Item) -> set[str]:
    made_from: set[str] = set()
    origins: set[str] = set()
    for ids in rows.chunks(item.sources):
        query = select(trajectories.c.id, trajectories.c.task_id, trajectories.c.tenant)
        for source in connection.execute(query.where(trajectories.c.id.in_(ids))):
            if source.tenant != item.tenant:
                raise ConflictError(f"memory item {item.id!r} of tenant {item.tenant!r} has another's run as source")
            made_from.add(source.task_id)
    if isinstance(item, PastRun):
        made_from.add(item.task_id)
        origins.add(question_fingerprint(item.question))
    for ids in rows.chunks(made_from):
        origins.update(connection.execute(select(tasks.c.fingerprint).where(tasks.c.id.in_(ids))).scalars())
    return origins | made_from


def _announce(connection: Connection, item: Item, why: str) -> None:
    op = "upsert" if item.status is MemoryStatus.ACTIVE else "delete"
    connection.execute(insert(outbox).values(item_id=item.id, kind=kind_of(item), op=op, why=why, acked=False))


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
    item = _any_kind(connection, item_id)
    used = select(item_uses.c.success).where(item_uses.c.item_id == item_id, item_uses.c.use_key == use_key)
    if connection.execute(used).one_or_none() is not None:
        return
    connection.execute(insert(item_uses).values(item_id=item_id, use_key=use_key, success=success))
    counted = item.model_copy(update={"uses": item.uses + 1, "successes": item.successes + int(success)})
    rows.put(connection, items, counted, {"id": item_id})


def set_status(connection: Connection, item_id: str, status: MemoryStatus, why: str) -> None:
    """Move an item on; a move to where it stands is none. Raises `ConflictError` for an illegal move."""
    item = _any_kind(connection, item_id)
    if item.status is status:
        return
    if status not in MEMORY_TRANSITIONS[item.status]:
        raise ConflictError(f"memory item {item_id!r} is {item.status}: it cannot become {status}")
    moved = item.model_copy(update={"status": status})
    rows.put(connection, items, moved, {"id": item_id}, status=status)
    _announce(connection, moved, why)


def _any_kind(connection: Connection, item_id: str) -> Item:
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
    query = select(outbox).where(outbox.c.acked.is_(False)).order_by(outbox.c.seq).limit(limit)
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
    """A page of all tenants' active items: what an index is rebuilt from."""
    wanted = items.c.seq > after_seq, items.c.status == MemoryStatus.ACTIVE
    return _item_texts(connection, *wanted, limit=limit)


def tenant_texts(connection: Connection, kind: MemoryKind, tenant: str) -> list[ItemText]:
    """All active items of one tenant and kind: what an exact scan compares."""
    wanted = items.c.tenant == tenant, items.c.kind == kind, items.c.status == MemoryStatus.ACTIVE
    return _item_texts(connection, *wanted)


def _item_texts(connection: Connection, *wanted: object, limit: int | None = None) -> list[ItemText]:
    columns = items.c.seq, items.c.id, items.c.kind, items.c.tenant, items.c.text, items.c.status
    query = select(*columns).where(*wanted).order_by(items.c.seq).limit(limit)  # type: ignore[arg-type]
    return [
        ItemText(r.seq, r.id, MemoryKind(r.kind), r.tenant, r.text, r.status == MemoryStatus.ACTIVE)
        for r in connection.execute(query)
    ]


def candidates(connection: Connection, kind: MemoryKind, tenant: str, ids: list[str]) -> dict[str, Candidate]:
    """Those of the ids that are this tenant's active items of this kind."""
    wanted = items.c.id.in_(ids), items.c.tenant == tenant, items.c.kind == kind
    query = select(items.c.body).where(*wanted, items.c.status == MemoryStatus.ACTIVE)
    found = {item.id: item for item in rows.read(connection, MODELS[kind], query)}
    origins: dict[str, set[str]] = {item_id: set() for item_id in found}
    for row in connection.execute(select(item_origins).where(item_origins.c.item_id.in_(list(found)))):
        origins[row.item_id].add(row.origin)
    return {item_id: Candidate(item, frozenset(origins[item_id])) for item_id, item in found.items()}


def count_active(connection: Connection) -> int:
    """How many items an index should hold: active ones with a text."""
    query = select(func.count()).select_from(items)
    return connection.execute(query.where(items.c.status == MemoryStatus.ACTIVE, items.c.text != "")).scalar_one()
