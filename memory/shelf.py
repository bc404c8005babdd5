"""A tenant's memory items, looked at and changed by hand: every function names the tenant, none reaches another's.

Each change is one transaction with its outbox row, so the index follows. Owns no rules of an item's life
(`memory.items`) and no ranking (`memory.recall`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from sqlalchemy import Connection, select

from memory import items, rows, uses
from memory.database import Database
from memory.errors import ConflictError, NotFoundError
from memory.items import Change, Item
from memory.records import MemoryKind, MemoryStatus, PastRun
from memory.schema import items as items_table
from memory.uplift import Exposure


def get(database: Database, item_id: str, *, tenant: str) -> Item:
    """The item; NotFoundError for an unknown one and for another tenant's."""
    with database.reading() as connection:
        return _find(connection, item_id, tenant)


def page(
    database: Database,
    *,
    tenant: str,
    kind: MemoryKind | None = None,
    status: MemoryStatus | None = None,
    workload: str | None = None,
    after: str | None = None,
    limit: int = 1000,
) -> list[Item]:
    """Items in the order they were added, from behind the id `after`. NotFoundError when there is no such item."""
    table = items_table
    query = select(table.c.kind, table.c.body).where(table.c.tenant == tenant).order_by(table.c.seq)
    if kind is not None:
        query = query.where(table.c.kind == kind)
    if status is not None:
        query = query.where(table.c.status == status)
    with database.reading() as connection:
        if after is not None:
            mine = table.c.id == after, table.c.tenant == tenant
            at = connection.execute(select(table.c.seq).where(*mine)).scalar_one_or_none()
            if at is None:
                raise NotFoundError(f"after: no memory item {after!r} in the ledger")
            query = query.where(table.c.seq > at)
        # A workload is inside the record: rows are read until there are enough of it.
        query = query.limit(limit) if workload is None else query.execution_options(yield_per=500)
        standing: Iterator[Item] = (
            rows.load(items.MODELS[MemoryKind(r.kind)], r.body) for r in connection.execute(query)
        )
        return list(islice((item for item in standing if workload in (None, item.workload)), limit))


def history(database: Database, item_id: str, *, tenant: str) -> list[Change]:
    """What happened to the item and why, oldest first. NotFoundError as `get`."""
    with database.reading() as connection:
        _find(connection, item_id, tenant)
        return items.history(connection, item_id)


def exposure(database: Database, item_id: str, *, tenant: str) -> Exposure:
    """The item's judged runs, with it and without. NotFoundError as `get`."""
    with database.reading() as connection:
        _find(connection, item_id, tenant)
        return sum(uses.exposures(connection, [item_id]).get(item_id, {}).values(), Exposure())


def set_status(database: Database, item_id: str, status: MemoryStatus, why: str, *, tenant: str) -> Item:
    """Retire an item, or bring it back. ConflictError for a move that its status does not allow; NotFoundError."""
    with database.writing() as connection:
        _find(connection, item_id, tenant)
        items.set_status(connection, item_id, status, why)
        return items.any_kind(connection, item_id)


def set_pinned(database: Database, item_id: str, pinned: bool, why: str, *, tenant: str) -> Item:
    """Pin an item, so that neither its score nor its uplift retires it, or unpin it. NotFoundError as `get`."""
    return _change(database, item_id, tenant, why, lambda item: item.model_copy(update={"pinned": pinned}))


def reword(database: Database, item_id: str, text: str, why: str, *, tenant: str) -> Item:
    """Give a principle other words; its triples, which spelled out the old ones, go. Its evidence stays.

    NotFoundError as `get`; ConflictError for a past run, which is what happened, and for blank text.
    """

    def reworded(item: Item) -> Item:
        if isinstance(item, PastRun) or not text.strip():
            raise ConflictError(
                f"memory item {item_id!r} cannot be reworded: only a principle can, and with some words"
            )
        same = text.strip() == item.text
        return item.model_copy(update={"text": text.strip(), "structure": item.structure if same else []})

    return _change(database, item_id, tenant, why, reworded)


def merge(database: Database, winner_id: str, loser_id: str, why: str, *, tenant: str) -> Item:
    """Let one item absorb another that says the same (`memory.items.merge`). NotFoundError, ConflictError."""
    with database.writing() as connection:
        _find(connection, winner_id, tenant)
        _find(connection, loser_id, tenant)
        return items.merge(connection, winner_id, loser_id, why)


def _change(database: Database, item_id: str, tenant: str, why: str, change: Callable[[Item], Item]) -> Item:
    with database.writing() as connection:
        standing = _find(connection, item_id, tenant)
        if standing.status is MemoryStatus.MERGED:
            raise ConflictError(f"memory item {item_id!r} was merged into {standing.merged_into!r}: change that one")
        changed = change(standing)
        if changed != standing:
            items.change(connection, changed, why)
        return changed


def _find(connection: Connection, item_id: str, tenant: str) -> Item:
    item = items.any_kind(connection, item_id)
    if item.tenant != tenant:
        raise NotFoundError(f"no memory item {item_id!r} in the ledger")
    return item
