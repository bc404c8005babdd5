"""A tenant's memory as lines of JSON, out and in again: nothing is lost on the way, and twice in is once in.

A line holds an item, what it was made from, and its judged runs. Owns the form. Owns no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Connection, insert, select

from memory import items, shelf
from memory.database import Database
from memory.errors import ConfigError, NightschoolError
from memory.items import Item
from memory.records import MemoryKind, content_hash
from memory.schema import item_origins, item_uses
from memory.schema import items as items_table

PAGE = 500


class _Use(BaseModel):
    model_config = ConfigDict(extra="forbid")

    use_key: str
    success: bool
    withheld: bool = False
    generation: int | None = None


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["principle", "run"]
    item: dict[str, Any]
    origins: list[str] = Field(default_factory=list[str])
    uses: list[_Use] = Field(default_factory=list[_Use])


@dataclass(frozen=True)
class Imported:
    """How many lines were new, and how many were there already."""

    added: int
    known: int


def export_lines(database: Database, *, tenant: str, workload: str | None = None) -> Iterator[str]:
    """A tenant's items, all or a workload's, one JSON line each without its newline, in the order they were added."""
    after: str | None = None
    while page := shelf.page(database, tenant=tenant, workload=workload, after=after, limit=PAGE):
        after = page[-1].id
        with database.reading() as connection:
            for item in page:
                yield _line(connection, item).model_dump_json()


def import_lines(database: Database, lines: Iterable[str], *, tenant: str) -> Imported:
    """Add the items of exported lines to a tenant, all or none; those that it has already stay as they are.

    Another tenant's items arrive under ids of this one. Raises `ConfigError`, naming the line, for one that is no
    export, and `LedgerError`.
    """
    added = known = 0
    with database.writing() as connection:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                given = _Line.model_validate(json.loads(line))
                model = items.MODELS[MemoryKind(given.kind)]
                new = _add(connection, model.model_validate(given.item), given, tenant)
            except (ValidationError, ValueError, RecursionError, NightschoolError) as exc:
                reason = " ".join(str(exc).split())[:200]
                raise ConfigError(f"line {number} is no exported memory item: {reason}") from exc
            added, known = added + new, known + (not new)
    return Imported(added, known)


def _line(connection: Connection, item: Item) -> _Line:
    of = item_origins.c.item_id == item.id
    origins = connection.execute(select(item_origins.c.origin).where(of).order_by(item_origins.c.origin)).scalars()
    c = item_uses.c
    query = select(c.use_key, c.success, c.withheld, c.generation).where(c.item_id == item.id).order_by(c.use_key)
    return _Line(
        kind=items.kind_of(item).value,
        item=item.model_dump(mode="json"),
        origins=list(origins),
        uses=[_Use.model_validate(dict(row)) for row in connection.execute(query).mappings()],
    )


def _add(connection: Connection, item: Item, given: _Line, tenant: str) -> bool:
    here = _belonging_to(item, tenant)
    if connection.execute(select(items_table.c.seq).where(items_table.c.id == here.id)).one_or_none() is not None:
        if items.any_kind(connection, here.id).tenant == tenant:
            return False
        # The id is taken elsewhere, which is nobody's business here.
        here = here.model_copy(update={"id": _renamed(here.id, tenant)})
        if connection.execute(select(items_table.c.seq).where(items_table.c.id == here.id)).one_or_none() is not None:
            return False
    items.insert_as_is(connection, here)
    if given.origins:
        said = [{"item_id": here.id, "origin": origin} for origin in sorted(set(given.origins))]
        connection.execute(insert(item_origins), said)
    if given.uses:
        runs = {use.use_key: use.model_dump() for use in given.uses}
        connection.execute(insert(item_uses), [{"item_id": here.id, **use} for use in runs.values()])
    return True


def _belonging_to(item: Item, tenant: str) -> Item:
    if item.tenant == tenant:
        return item
    merged_into = _renamed(item.merged_into, tenant) if item.merged_into else None
    moved = {"tenant": tenant, "id": _renamed(item.id, tenant), "merged_into": merged_into}
    return item.model_copy(update=moved)


def _renamed(item_id: str, tenant: str) -> str:
    prefix = item_id.partition("_")[0]
    return f"{prefix}_{content_hash([tenant, item_id])[:32]}"
