"""The judged runs of memory items: each counted once, and again rightly when its judgement changes.

Functions on an open connection. A run counts for the item that its item was merged into. Owns the rows of
uses and the counts on items that follow from them; what they are worth is in `memory.uplift`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, case, func, insert, select, update

from memory import rows
from memory.records import MemoryKind, PastRun, Principle
from memory.schema import item_uses, items
from memory.uplift import Count, Exposure

Item = Principle | PastRun

MODELS: dict[str, type[Principle] | type[PastRun]] = {MemoryKind.PRINCIPLE: Principle, MemoryKind.RUN: PastRun}

_COUNTED = (
    select(
        *(per := (item_uses.c.item_id, item_uses.c.generation, item_uses.c.withheld)),
        func.count().label("n"),
        func.sum(case((item_uses.c.success, 1), else_=0)).label("won"),
    )
    .where(item_uses.c.item_id.in_(bindparam("ids", expanding=True)))
    .group_by(*per)
)
"""Built once, since every recall asks it."""


@dataclass(frozen=True)
class Use:
    """One judged run, named by `key` (its trajectory's id), in which an item was shown or withheld."""

    item_id: str
    key: str
    success: bool
    withheld: bool = False
    generation: int | None = None


def count(connection: Connection, uses: Iterable[Use], *, tenant: str) -> int:
    """Count runs for a tenant's items; how many counts are new or changed.

    The same run again changes nothing, or only its success. Items that are not the tenant's, or are gone,
    are passed over: a run may have been shown what was forgotten since.
    """
    given = list(uses)
    known = _with_winners(connection, {use.item_id for use in given}, tenant)
    wanted: dict[tuple[str, str], Use] = {}
    for use in given:
        winner = _winner(known, use.item_id)
        if winner is not None:
            wanted.setdefault((winner, use.key), use)
    return _store(connection, known, wanted)


def _store(connection: Connection, known: dict[str, Item], wanted: dict[tuple[str, str], Use]) -> int:
    standing: dict[tuple[str, str], tuple[bool, bool]] = {}
    for keys in rows.chunks(key for _, key in wanted):
        columns = item_uses.c.item_id, item_uses.c.use_key, item_uses.c.success, item_uses.c.withheld
        for row in connection.execute(select(*columns).where(item_uses.c.use_key.in_(keys))):
            standing[row.item_id, row.use_key] = row.success, row.withheld
    changed = 0
    new: list[dict[str, object]] = []
    counts: dict[str, Count] = {}
    for (item_id, key), use in wanted.items():
        before = standing.get((item_id, key))
        if before is None:
            row = {"item_id": item_id, "use_key": key, "success": use.success}
            new.append({**row, "withheld": use.withheld, "generation": use.generation})
            more = Count() if use.withheld else Count(1, int(use.success))
        elif before[0] != use.success:
            mine = item_uses.c.item_id == item_id, item_uses.c.use_key == key
            connection.execute(update(item_uses).where(*mine).values(success=use.success))
            more = Count() if before[1] else Count(0, int(use.success) - int(before[0]))
        else:
            continue
        changed += 1
        counts[item_id] = counts.get(item_id, Count()) + more
    if new:
        connection.execute(insert(item_uses), new)
    for item_id, more in counts.items():
        if more != Count():
            item = known[item_id]
            after = {"uses": item.uses + more.n, "successes": item.successes + more.successes}
            rows.put(connection, items, item.model_copy(update=after), {"id": item_id})
    return changed


def take_over(connection: Connection, winner: Item, loser: Item) -> Count:
    """Move the loser's runs to the winner; returns what the winner's own counts grow by.

    A run that was shown both counts once. Uses without rows of their own (imported ones) move as numbers.
    """

    def of(item_id: str) -> dict[str, tuple[bool, bool]]:
        columns = item_uses.c.use_key, item_uses.c.success, item_uses.c.withheld
        found = connection.execute(select(*columns).where(item_uses.c.item_id == item_id))
        return {row.use_key: (row.success, row.withheld) for row in found}

    mine, theirs = of(winner.id), of(loser.id)
    new = {key: use for key, use in theirs.items() if key not in mine}
    for keys in rows.chunks(new):
        query = select(item_uses).where(item_uses.c.item_id == loser.id, item_uses.c.use_key.in_(keys))
        moved = [{**row, "item_id": winner.id} for row in connection.execute(query).mappings()]
        connection.execute(insert(item_uses), moved)
    shown = [success for success, withheld in theirs.values() if not withheld]
    counted = [success for success, withheld in new.values() if not withheld]
    return Count(
        max(0, loser.uses - len(shown)) + len(counted),
        max(0, loser.successes - sum(shown)) + sum(counted),
    )


def exposures(connection: Connection, item_ids: Sequence[str]) -> dict[str, dict[int | None, Exposure]]:
    """Item id -> generation -> its judged runs; None for runs whose generation was not noted."""
    found: dict[str, dict[int | None, Exposure]] = {}
    for ids in rows.chunks(item_ids):
        for row in connection.execute(_COUNTED, {"ids": ids}):
            counted = Count(row.n, int(row.won))
            more = Exposure(withheld=counted) if row.withheld else Exposure(shown=counted)
            by_generation = found.setdefault(row.item_id, {})
            by_generation[row.generation] = by_generation.get(row.generation, Exposure()) + more
    return found


def _with_winners(connection: Connection, ids: set[str], tenant: str) -> dict[str, Item]:
    """The tenant's items of these ids, and the items that they were merged into."""
    known: dict[str, Item] = {}
    while ids:
        for part in rows.chunks(ids):
            query = select(items.c.kind, items.c.body).where(items.c.id.in_(part), items.c.tenant == tenant)
            for row in connection.execute(query):
                item: Item = rows.load(MODELS[row.kind], row.body)
                known[item.id] = item
        ids = {i.merged_into for i in known.values() if i.merged_into is not None and i.merged_into not in known} - ids
    return known


def _winner(known: dict[str, Item], item_id: str) -> str | None:
    seen: set[str] = set()
    item = known.get(item_id)
    while item is not None and item.merged_into is not None and item.id not in seen:
        seen.add(item.id)
        item = known.get(item.merged_into)
    return item.id if item is not None else None
