"""Group commit: runs that end at the same moment share one transaction, so also one wait for the disk.

Owns the writer thread and the waiting of those who hand it runs. A run is acknowledged only after the commit
that holds it. The rules are the ledger's own: the same task or run twice is a no-op, another one under a used
id a ConflictError, for its writer alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from sqlalchemy import Connection, Table, insert, select
from sqlalchemy.exc import IntegrityError

from memory import rows
from memory.database import Database
from memory.errors import ConflictError, LedgerError, NightschoolError
from memory.records import Task, Trajectory
from memory.schema import tasks, trajectories

MAX_GROUP = 256
_Runs = Sequence[tuple[Task, Trajectory]]


@dataclass(frozen=True)
class _Entry:
    task: Task
    trajectory: Trajectory
    done: Future[None] = field(default_factory=Future)


class Journal:
    """The writer of finished runs. `record` may be called from any event loop, `write` from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: SimpleQueue[_Entry | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        self._guard = threading.Lock()
        self._closed = False

    async def record(self, task: Task, trajectory: Trajectory) -> None:
        """Returns once both are on disk. ConflictError, LedgerError.

        Cancelling the caller does not unwrite: the run may be in the ledger all the same.
        """
        await asyncio.wrap_future(self._hand_in(task, trajectory))

    def write(self, task: Task, trajectory: Trajectory) -> None:
        """`record` for threads."""
        self._hand_in(task, trajectory).result()

    def close(self) -> None:
        """Write what was handed in, then end the writer."""
        with self._guard:
            self._closed = True
            writer, self._writer = self._writer, None
        if writer is not None:
            self._waiting.put(None)
            writer.join()

    def _hand_in(self, task: Task, trajectory: Trajectory) -> Future[None]:
        entry = _Entry(task, trajectory)
        with self._guard:
            if self._closed:
                raise LedgerError("the ledger is closed")
            if self._writer is None:
                self._writer = threading.Thread(target=self._work, name="journal", daemon=True)
                self._writer.start()
            self._waiting.put(entry)
        return entry.done

    def _work(self) -> None:
        going_on = True
        while going_on:
            group = [self._waiting.get()]
            while len(group) < MAX_GROUP and not self._waiting.empty():
                group.append(self._waiting.get())
            going_on = None not in group
            self._commit([entry for entry in group if entry is not None])

    def _commit(self, group: list[_Entry]) -> None:
        """One transaction; when the database refuses it, one for each, so that none fails for another's sake."""
        if not group:
            return
        runs = [(entry.task, entry.trajectory) for entry in group]
        refused: Sequence[Exception | None]
        try:
            refused = self._add_new(runs) or self._add(runs)
        except Exception as exc:
            if len(group) > 1:
                for entry in group:
                    self._commit([entry])
                return
            refused = [exc] * len(group)
        for entry, why in zip(group, refused, strict=True):
            _tell(entry.done, why)

    def _add_new(self, runs: _Runs) -> list[None] | None:
        """Add runs whose ids are all new, as nearly all are: half the statements. None: nothing was added."""
        if not all(_belongs(run, task) for task, run in runs):
            return None
        try:
            with self._database.writing() as connection:
                try:
                    _insert(connection, [_task_row(task) for task, _ in runs], [_run_row(run) for _, run in runs])
                except IntegrityError:
                    raise _KnownError from None
        except _KnownError:
            return None
        return [None] * len(runs)

    def _add(self, runs: _Runs) -> list[NightschoolError | None]:
        with self._database.writing() as connection:
            return add_runs(connection, runs)


class _KnownError(Exception):
    """Undoes the transaction, without being an error of the database's."""


def _tell(done: Future[None], refused: Exception | None) -> None:
    if not done.set_running_or_notify_cancel():
        return
    if refused is None:
        done.set_result(None)
    else:
        done.set_exception(refused)


def add_runs(connection: Connection, runs: _Runs) -> list[NightschoolError | None]:
    """Add tasks and their runs with few statements; for each run None, or why it was refused.

    A task that is there already, asked again from elsewhere or at another time, is the same task.
    """
    refused: list[NightschoolError | None] = [None] * len(runs)
    known_tasks = _bodies(connection, tasks, [task.id for task, _ in runs])
    known_runs = _bodies(connection, trajectories, [run.id for _, run in runs])
    new_tasks: list[dict[str, Any]] = []
    new_runs: list[dict[str, Any]] = []
    for i, (task, run) in enumerate(runs):
        task_row, run_row = _task_row(task), _run_row(run)
        if not _same_task(known_tasks.get(task.id), task, task_row["body"]):
            refused[i] = ConflictError(f"task {task.id!r} is already in the ledger with other content: use a new id")
        elif not _belongs(run, task):
            refused[i] = ConflictError(f"trajectory {run.id!r} is not a run of task {task.id!r}")
        elif known_runs.get(run.id, run_row["body"]) != run_row["body"]:
            refused[i] = ConflictError(
                f"trajectory {run.id!r} is already in the ledger with other content: use a new id"
            )
        else:
            if task.id not in known_tasks:
                new_tasks.append(task_row)
                known_tasks[task.id] = task_row["body"]
            if run.id not in known_runs:
                new_runs.append(run_row)
                known_runs[run.id] = run_row["body"]
    _insert(connection, new_tasks, new_runs)
    return refused


def _insert(connection: Connection, new_tasks: list[dict[str, Any]], new_runs: list[dict[str, Any]]) -> None:
    if new_tasks:
        connection.execute(insert(tasks), new_tasks)
    if new_runs:
        connection.execute(insert(trajectories), new_runs)


def _task_row(task: Task) -> dict[str, Any]:
    return _row(task, tenant=task.tenant, fingerprint=task.fingerprint)


def _run_row(run: Trajectory) -> dict[str, Any]:
    return _row(run, **run_columns(run))


def run_columns(run: Trajectory) -> dict[str, Any]:
    """What of a run is queried, beside its record."""
    return {
        "task_id": run.task_id,
        "tenant": run.tenant,
        "workload": run.workload,
        "purpose": run.purpose.value,
        "conversation": run.conversation_id,
        "generation": run.generation,
        "success": run.outcome.success if run.outcome is not None else None,
    }


def _belongs(run: Trajectory, task: Task) -> bool:
    return run.task_id == task.id and run.tenant == task.tenant


def _bodies(connection: Connection, table: Table, ids: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in rows.chunks(ids):
        query = select(table.c.id, table.c.body).where(table.c.id.in_(part))
        found.update((row.id, row.body) for row in connection.execute(query))
    return found


def _row(record: Task | Trajectory, **columns: Any) -> dict[str, Any]:
    body = rows.dump(record)
    return {"id": record.id, "digest": rows.digest_of(body), "body": body, **columns}


def _same_task(stored: str | None, task: Task, body: str) -> bool:
    if stored is None or stored == body:
        return True
    return rows.load(Task, stored).asks_the_same(task)
