"""Batches and their lines: what was asked for in bulk, how far it is, and every line's result.

A line's result and its run are one transaction: a line that is not `pending` has been run, once and for all.
Pages of lines are read and written; a whole batch never sits in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import Field
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from memory import rows
from memory.database import Database
from memory.errors import ConflictError
from memory.files import StoredFile, insert_file
from memory.journal import add_runs
from memory.records import Record, Task, Trajectory, new_id, now
from memory.responses import StoredResponse, insert_response
from memory.schema import batch_lines as lines_table
from memory.schema import batches as batches_table

PAGE = 1000
"""Lines read or written at once."""


class BatchStatus(StrEnum):
    """OpenAI's states of a batch."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset({BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLING}),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.FAILED, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.FAILED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED, BatchStatus.FAILED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}

ENDED = frozenset(status for status, onward in BATCH_TRANSITIONS.items() if not onward)


class LineStatus(StrEnum):
    """The life of a line."""

    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"


class BatchError(Record):
    """Why a batch failed; `line` counts the file's lines from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(Record):
    """A file of requests to one endpoint. Times are None until it came so far."""

    id: str = Field(default_factory=lambda: new_id("batch"))
    tenant: str
    caller: str
    """Name of the key that submitted it."""
    endpoint: str
    input_file_id: str
    completion_window: str = "24h"
    status: BatchStatus = BatchStatus.VALIDATING
    metadata: dict[str, str] | None = None
    errors: list[BatchError] = Field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    """The counts as they were at the end; while it runs `counted` knows."""
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime = Field(default_factory=lambda: now() + timedelta(hours=24))
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        return self.status in ENDED

    @property
    def overdue(self) -> bool:
        """Its completion window is over."""
        return now() >= self.expires_at


@dataclass(frozen=True)
class Line:
    """A line as it stands: `request` and `result` are JSON texts."""

    number: int
    custom_id: str
    request: str
    status: LineStatus = LineStatus.PENDING
    result: str | None = None


@dataclass(frozen=True)
class LineResult:
    """What a line came to. `run`, `response`: what is to be committed with it."""

    number: int
    status: LineStatus
    result: str
    run: tuple[Task, Trajectory] | None = None
    response: StoredResponse | None = None


def line_key(batch_id: str, line: int) -> str:
    """32 hex digits that name a line for ever: its task, run and reply are called after it."""
    return hashlib.sha256(f"{batch_id}/{line}".encode()).hexdigest()[:32]


def add(database: Database, batch: Batch) -> None:
    """Add a batch."""
    with database.writing() as connection:
        columns = {"tenant": batch.tenant, "status": batch.status.value}
        rows.add(connection, batches_table, batch, "batch", {"id": batch.id}, **columns)


def get(database: Database, batch_id: str, *, tenant: str | None = None) -> Batch:
    """The batch with its counts as they are now; with `tenant`, another tenant's is not found."""
    key = {"id": batch_id} if tenant is None else {"id": batch_id, "tenant": tenant}
    with database.reading() as connection:
        return _counted(connection, rows.find(connection, batches_table, Batch, "batch", key))


def status(database: Database, batch_id: str) -> BatchStatus:
    """Where a batch stands."""
    query = select(batches_table.c.status).where(batches_table.c.id == batch_id)
    with database.reading() as connection:
        return BatchStatus(connection.execute(query).scalar_one())


def page(database: Database, *, tenant: str, after: str | None = None, limit: int = 20) -> tuple[list[Batch], bool]:
    """A page of a tenant's batches, newest first, and whether more follow."""
    with database.reading() as connection:
        found, more = rows.page(
            connection, batches_table, Batch, {"tenant": tenant}, after=after, limit=limit, newest_first=True
        )
        return [_counted(connection, batch) for batch in found], more


def unfinished(database: Database) -> list[Batch]:
    """The batches of all tenants that have not ended, oldest first."""
    table = batches_table
    query = select(table.c.body).where(table.c.status.not_in([s.value for s in ENDED])).order_by(table.c.seq)
    with database.reading() as connection:
        return rows.read(connection, Batch, query)


def advance(database: Database, batch_id: str, to: BatchStatus, **fields: Any) -> Batch:
    """Move a batch along `BATCH_TRANSITIONS`, stamp the time and set further fields.

    To stay where it stands changes nothing. ConflictError for an illegal move.
    """
    with database.writing() as connection:
        return _advance(connection, batch_id, to, fields)


def add_lines(database: Database, batch_id: str, lines: Sequence[Line]) -> list[Line]:
    """Add lines in one transaction; returns those whose custom_id another line of the batch has already.

    A line number that is there already, from before a crash, is left alone.
    """
    table = lines_table
    with database.writing() as connection:
        there: set[int] = set()
        taken: dict[str, int] = {}
        for start in range(0, len(lines), rows.CHUNK):
            part = lines[start : start + rows.CHUNK]
            mine = table.c.batch_id == batch_id
            numbers = select(table.c.line).where(mine, table.c.line.in_([line.number for line in part]))
            there.update(connection.execute(numbers).scalars())
            names = select(table.c.custom_id, table.c.line).where(
                mine, table.c.custom_id.in_([line.custom_id for line in part])
            )
            taken.update((row.custom_id, row.line) for row in connection.execute(names))
        fresh: list[dict[str, Any]] = []
        doubles: list[Line] = []
        for line in lines:
            if taken.setdefault(line.custom_id, line.number) != line.number:
                doubles.append(line)
            elif line.number not in there:
                fresh.append(
                    {
                        "batch_id": batch_id,
                        "line": line.number,
                        "custom_id": line.custom_id,
                        "status": line.status.value,
                        "request": line.request,
                    }
                )
        if fresh:
            connection.execute(insert(table), fresh)
    return doubles


def lines(database: Database, batch_id: str, status: LineStatus, *, after: int = 0, limit: int = PAGE) -> list[Line]:
    """A page of the batch's lines of one status, by number, from behind the line `after`."""
    table = lines_table
    query = (
        select(table)
        .where(table.c.batch_id == batch_id, table.c.status == status.value, table.c.line > after)
        .order_by(table.c.line)
        .limit(limit)
    )
    with database.reading() as connection:
        found = connection.execute(query).all()
    return [Line(row.line, row.custom_id, row.request, LineStatus(row.status), row.result) for row in found]


def every_line(database: Database, batch_id: str, status: LineStatus) -> Iterator[Line]:
    """All lines of one status by number, read in pages. The status of those behind must not change meanwhile."""
    after = 0
    while found := lines(database, batch_id, status, after=after):
        yield from found
        after = found[-1].number


def finish_lines(
    database: Database, batch_id: str, results: Sequence[LineResult]
) -> list[tuple[LineResult, ConflictError]]:
    """Commit results and their runs, all in one transaction. A line that has its result already keeps it.

    Returns what was refused because its run contradicts the ledger; those lines are still pending.
    """
    table = lines_table
    refused: list[tuple[LineResult, ConflictError]] = []
    with database.writing() as connection:
        pending: set[int] = set()
        for start in range(0, len(results), rows.CHUNK):
            numbers = [result.number for result in results[start : start + rows.CHUNK]]
            query = select(table.c.line).where(
                table.c.batch_id == batch_id, table.c.status == LineStatus.PENDING.value, table.c.line.in_(numbers)
            )
            pending.update(connection.execute(query).scalars())
        wanted = [result for result in results if result.number in pending]
        ran = [(result, result.run) for result in wanted if result.run is not None]
        for (result, _), error in zip(ran, add_runs(connection, [run for _, run in ran]), strict=True):
            if isinstance(error, ConflictError):
                refused.append((result, error))
        bad = {result.number for result, _ in refused}
        good = [result for result in wanted if result.number not in bad]
        for result in good:
            if result.response is not None:
                insert_response(connection, result.response)
        if good:
            settle = update(table).where(table.c.batch_id == batch_id, table.c.line == bindparam("number"))
            connection.execute(
                settle.values(status=bindparam("to"), result=bindparam("text")),
                [{"number": each.number, "to": each.status.value, "text": each.result} for each in good],
            )
    return refused


def finish(database: Database, batch_id: str, to: BatchStatus, output: Sequence[StoredFile], **fields: Any) -> Batch:
    """End a batch: its files' records, its counts and its status, in one transaction. Once ended it stays so."""
    with database.writing() as connection:
        batch = _find(connection, batch_id)
        if batch.ended:
            return batch
        for stored in output:
            insert_file(connection, stored)
        counted = _counted(connection, batch)
        counts = {"total": counted.total, "completed": counted.completed, "failed": counted.failed}
        return _advance(connection, batch_id, to, counts | fields)


def fail(database: Database, batch_id: str, errors: list[BatchError]) -> Batch:
    """End a batch as failed; lines of one that never ran are dropped. Once ended it stays so."""
    table = lines_table
    with database.writing() as connection:
        batch = _find(connection, batch_id)
        if batch.ended:
            return batch
        if batch.in_progress_at is None:
            connection.execute(delete(table).where(table.c.batch_id == batch_id))
        batch = _counted(connection, batch)
        counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
        return _advance(connection, batch_id, BatchStatus.FAILED, counts | {"errors": errors})


def _advance(connection: Connection, batch_id: str, to: BatchStatus, fields: dict[str, Any]) -> Batch:
    batch = _find(connection, batch_id)
    if batch.status is to:
        return batch
    if to not in BATCH_TRANSITIONS[batch.status]:
        raise ConflictError(f"batch {batch_id} is {batch.status.value} and cannot become {to.value}")
    stamp = {f"{to.value}_at": now()}
    moved = Batch.model_validate(batch.model_dump() | stamp | fields | {"status": to})
    rows.put(connection, batches_table, moved, {"id": batch_id}, status=to.value)
    return moved


def _find(connection: Connection, batch_id: str) -> Batch:
    return rows.find(connection, batches_table, Batch, "batch", {"id": batch_id})


def _counted(connection: Connection, batch: Batch) -> Batch:
    """The batch with the counts of its lines; they are in the record once it has ended."""
    if batch.ended:
        return batch
    table = lines_table
    query = select(table.c.status, func.count()).where(table.c.batch_id == batch.id).group_by(table.c.status)
    counts = {LineStatus(status): number for status, number in connection.execute(query).all()}
    return batch.model_copy(
        update={
            "total": sum(counts.values()),
            "completed": counts.get(LineStatus.COMPLETED, 0),
            "failed": counts.get(LineStatus.FAILED, 0),
        }
    )
