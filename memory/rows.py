"""Records as rows: how a record becomes a JSON body and back, and the rule for writing one twice.

Owns what all tables have in common. Owns no table's own columns and no transactions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, Update, bindparam, insert, select, update

from memory.errors import ConflictError, NotFoundError
from memory.records import Record

R = TypeVar("R", bound=Record)

Key = dict[str, Any]
"""The columns, with their values, that name one row."""

CHUNK = 500
"""Values in one IN list, well under both databases' limits."""


def dump(record: Record) -> str:
    """A record's JSON body, keys in their own order, pure ASCII (so any text fits any database).

    NaN and infinite numbers become null (not measured) in free-form values; in a record's own numbers
    they raise `ValueError`.
    """
    return json.dumps(record.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)


def load(model: type[R], body: str) -> R:
    """The record of a body."""
    return model.model_validate(json.loads(body))


def digest_of(body: str) -> str:
    """sha256 (hex) of a body."""
    return hashlib.sha256(body.encode()).hexdigest()


def add(connection: Connection, table: Table, record: Record, what: str, key: Key, **columns: Any) -> bool:
    """Insert a record under the columns that name it, with the columns that are queried.

    Returns whether it was new. A record equal to the stored one, as it was added or as it is now, is
    left alone; another one under the same key raises `ConflictError`.
    """
    body = dump(record)
    digest = digest_of(body)
    stored = connection.execute(_select(table, ("digest", "body"), tuple(key)), _given(key)).one_or_none()
    if stored is None:
        connection.execute(insert(table), {"digest": digest, "body": body, **key, **columns})
        return True
    if digest == stored.digest or body == stored.body:
        return False
    raise ConflictError(f"{what} {_name(key)} is already in the ledger with other content: use a new id")


def find(connection: Connection, table: Table, model: type[R], what: str, key: Key) -> R:
    """The record whose columns equal `key`; raises `NotFoundError`."""
    body = connection.execute(_select(table, ("body",), tuple(key)), _given(key)).scalar_one_or_none()
    if body is None:
        raise NotFoundError(f"no {what} {_name(key)} in the ledger")
    return load(model, body)


def require(connection: Connection, table: Table, what: str, key: Key) -> None:
    """Raise `NotFoundError` unless there is such a row."""
    if connection.execute(_select(table, ("seq",), tuple(key)), _given(key)).one_or_none() is None:
        raise NotFoundError(f"no {what} {_name(key)} in the ledger")


def put(connection: Connection, table: Table, record: Record, key: Key, **columns: Any) -> None:
    """Replace the stored record, and columns that follow it."""
    connection.execute(_update(table, tuple(key)), {"body": dump(record), **columns, **_given(key)})


def read(connection: Connection, model: type[R], query: Select[Any], given: Key | None = None) -> list[R]:
    """The records of a query for bodies; `given` fills its parameters."""
    return [load(model, body) for body in connection.execute(query, given).scalars()]


def each(connection: Connection, model: type[R], query: Select[Any]) -> Iterator[R]:
    """`read` for more than a process should hold: few at a time."""
    for body in connection.execute(query.execution_options(yield_per=CHUNK)).scalars():
        yield load(model, body)


def page(
    connection: Connection,
    table: Table,
    model: type[R],
    key: Key,
    *,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> tuple[list[R], bool]:
    """At most `limit` records whose columns equal `key`, from behind the id `after`, and whether more follow.

    Raises `NotFoundError` when no such record has the id `after`.
    """
    query = select(table.c.body).where(*_equals(table, key))
    if after is not None:
        at = connection.execute(select(table.c.seq).where(*_equals(table, {**key, "id": after}))).scalar_one_or_none()
        if at is None:
            raise NotFoundError(f"after: there is no {after!r} in this list")
        query = query.where(table.c.seq < at if newest_first else table.c.seq > at)
    query = query.order_by(table.c.seq.desc() if newest_first else table.c.seq)
    found = read(connection, model, query.limit(limit + 1))
    return found[:limit], len(found) > limit


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """Distinct values in lists short enough for IN."""
    distinct = sorted(set(values))
    for start in range(0, len(distinct), CHUNK):
        yield distinct[start : start + CHUNK]


def unescaped(body: str) -> bytes:
    """A body with its strings one escape shallower: a reply that is kept as a JSON text inside one reads as itself."""
    return body.replace('\\"', '"').replace("\\\\", "\\").encode()


@cache
def _select(table: Table, columns: tuple[str, ...], named: tuple[str, ...]) -> Select[Any]:
    # Built once: building a statement takes SQLAlchemy several times as long as running it.
    return select(*(table.c[column] for column in columns)).where(*_is_named(table, named))


@cache
def _update(table: Table, named: tuple[str, ...]) -> Update:
    return update(table).where(*_is_named(table, named))


def _is_named(table: Table, named: tuple[str, ...]) -> list[ColumnElement[bool]]:
    return [table.c[name] == bindparam(f"of_{name}") for name in named]


def _given(key: Key) -> Key:
    return {f"of_{name}": value for name, value in key.items()}


def _equals(table: Table, key: Key) -> list[Any]:
    return [table.c[name] == value for name, value in key.items()]


def _name(key: Key) -> str:
    return ", ".join(repr(value) for value in key.values())
