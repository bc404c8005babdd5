"""The ledger: the truth about everything that the system did, learned and serves.

Owns the one door to the database, and runs and feedback. The rules of memory items are in
`memory.items`, those of nights and generations in `memory.nights`; vectors are in `memory.index`.

Every write is one transaction that is on disk when the call returns. Writing the same record twice is
a no-op; another record under a used id raises `ConflictError`; an unknown id raises `NotFoundError`;
a database that cannot answer raises `LedgerError`. Calls may come from any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Connection, func, select

from memory import items, nights, rows
from memory.database import Database
from memory.items import Candidate, ItemText, OutboxRow
from memory.journal import Journal, add_runs, run_columns
from memory.night_records import Evaluation, Generation, GenerationStatus, Night, NightStatus, Promotion, StageRun
from memory.records import (
    Example,
    Feedback,
    IndexKind,
    MemoryKind,
    MemoryStatus,
    PastRun,
    Principle,
    Purpose,
    Task,
    Trajectory,
    Trust,
)
from memory.schema import feedback as feedback_table
from memory.schema import tasks as tasks_table
from memory.schema import trajectories as trajectories_table

SERVING_S = 1.0
"""How long another process's switch of the champion may go unseen."""

__all__ = ["Candidate", "ItemText", "Ledger", "OutboxRow"]


class Ledger:
    """The records of one installation, in SQLite or PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._journal = Journal(database)
        self._serving: tuple[float, Generation, Generation | None] | None = None
        self._switches = 0
        self._switching = threading.Lock()

    @classmethod
    def open(cls, url: str, *, wait_s: float = 15.0) -> Ledger:
        """Open, create or upgrade the ledger at `url` (`sqlite:////path/ledger.db`, `postgresql://…`).

        `wait_s`: seconds that a write waits for another writer. Raises `ConfigError`, `LedgerError`.
        """
        return cls(Database.open(url, wait_s))

    @property
    def database(self) -> Database:
        """The same database, for what has a room of its own (keys, files, batches, stored replies)."""
        return self._database

    def close(self) -> None:
        """Finish the writes that were handed in, and give the database's connections back."""
        self._journal.close()
        self._database.close()

    def add_task(self, task: Task) -> None:
        """Add a task."""
        with self._database.writing() as connection:
            insert_task(connection, task)

    def get_task(self, task_id: str, *, tenant: str | None = None) -> Task:
        """The task; with `tenant`, another tenant's is not found."""
        with self._database.reading() as connection:
            return rows.find(connection, tasks_table, Task, "task", _owned(task_id, tenant))

    def tasks(self, ids: Iterable[str]) -> dict[str, Task]:
        """Those of the tasks that are in the ledger, by id."""
        found: dict[str, Task] = {}
        with self._database.reading() as connection:
            for part in rows.chunks(ids):
                query = select(tasks_table.c.body).where(tasks_table.c.id.in_(part))
                found.update((task.id, task) for task in rows.read(connection, Task, query))
        return found

    def add_trajectory(self, trajectory: Trajectory) -> None:
        """Add a run; its task must be in the ledger, under the same tenant."""
        with self._database.writing() as connection:
            insert_trajectory(connection, trajectory)

    def add_run(self, task: Task, trajectory: Trajectory) -> None:
        """Add a run with its task, in one transaction (see `insert_run`)."""
        with self._database.writing() as connection:
            insert_run(connection, task, trajectory)

    async def record(self, task: Task, trajectory: Trajectory) -> None:
        """Add a finished run and its task, in one transaction with other runs that end now (`memory.journal`).

        A task that was asked before, by another way or at another time, is the same task. Cancelling the
        caller does not unwrite: the run may be in the ledger all the same.
        """
        await self._journal.record(task, trajectory)

    def get_trajectory(self, trajectory_id: str, *, tenant: str | None = None) -> Trajectory:
        """The run; with `tenant`, another tenant's is not found."""
        with self._database.reading() as connection:
            key = _owned(trajectory_id, tenant)
            return rows.find(connection, trajectories_table, Trajectory, "trajectory", key)

    def conversation(self, conversation_id: str, *, tenant: str) -> list[Trajectory]:
        """The runs of a conversation, oldest first; empty for an unknown one."""
        table = trajectories_table
        query = select(table.c.body).where(table.c.tenant == tenant, table.c.conversation == conversation_id)
        with self._database.reading() as connection:
            return rows.read(connection, Trajectory, query.order_by(table.c.seq))

    def trajectories(
        self,
        *,
        after_seq: int = 0,
        upto_seq: int | None = None,
        purpose: Purpose | Collection[Purpose] | None = None,
        tenant: str | None = None,
        workload: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Trajectory]:
        """Runs with `after_seq` < seq <= `upto_seq` (see `watermark`), oldest first; None = no such filter."""
        table = trajectories_table
        query = select(table.c.body).where(table.c.seq > after_seq)
        if upto_seq is not None:
            query = query.where(table.c.seq <= upto_seq)
        purposes = [purpose] if isinstance(purpose, Purpose) else purpose
        if purposes is not None:
            query = query.where(table.c.purpose.in_(purposes))
        wanted = {table.c.tenant: tenant, table.c.workload: workload}
        for column, value in wanted.items():
            if value is not None:
                query = query.where(column == value)
        query = query.order_by(table.c.seq.desc() if newest_first else table.c.seq).limit(limit)
        with self._database.reading() as connection:
            return rows.read(connection, Trajectory, query)

    def add_feedback(self, feedback: Feedback) -> None:
        """Add a user's word; its trajectory must be in the ledger, under the same tenant."""
        columns = {"trajectory_id": feedback.trajectory_id, "tenant": feedback.tenant}
        run = _owned(feedback.trajectory_id, feedback.tenant)
        with self._database.writing() as connection:
            rows.require(connection, trajectories_table, "trajectory", run)
            rows.add(connection, feedback_table, feedback, "feedback", {"id": feedback.id}, **columns)

    def feedback(
        self,
        *,
        trajectory_id: str | None = None,
        tenant: str | None = None,
        after_seq: int = 0,
        upto_seq: int | None = None,
    ) -> list[Feedback]:
        """Feedback with `after_seq` < seq <= `upto_seq`, oldest first; None = no such filter."""
        table = feedback_table
        query = select(table.c.body).where(table.c.seq > after_seq).order_by(table.c.seq)
        if upto_seq is not None:
            query = query.where(table.c.seq <= upto_seq)
        if trajectory_id is not None:
            query = query.where(table.c.trajectory_id == trajectory_id)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        with self._database.reading() as connection:
            return rows.read(connection, Feedback, query)

    def set_trust(self, feedback_id: str, trust: Trust, reason: str) -> None:
        """Say whether quarantined feedback may teach, and why. What was decided meanwhile stays as it is."""
        key = {"id": feedback_id}
        with self._database.writing() as connection:
            standing = rows.find(connection, feedback_table, Feedback, "feedback", key)
            if standing.trust is not Trust.QUARANTINED:
                return
            judged = standing.model_copy(update={"trust": trust, "trust_reason": reason})
            rows.put(connection, feedback_table, judged, key)

    def watermark(self) -> dict[str, int]:
        """The highest seq of `trajectory` and `feedback`, 0 for none: what a snapshot reads up to."""
        tables = {"trajectory": trajectories_table, "feedback": feedback_table}
        with self._database.reading() as connection:
            return {name: connection.execute(select(func.max(t.c.seq))).scalar_one() or 0 for name, t in tables.items()}

    def add_principle(self, principle: Principle) -> None:
        """Add a principle; its outbox row is written with it."""
        with self._database.writing() as connection:
            items.add(connection, principle)

    def get_principle(self, item_id: str) -> Principle:
        """The principle."""
        with self._database.reading() as connection:
            return items.get(connection, Principle, item_id)

    def principles(self, tenant: str | None = None, status: MemoryStatus | None = None) -> list[Principle]:
        """Principles in the order they were added; None = all tenants, all statuses."""
        with self._database.reading() as connection:
            return items.listing(connection, Principle, tenant, status)

    def add_past_run(self, run: PastRun) -> None:
        """Add a past run; its outbox row is written with it."""
        with self._database.writing() as connection:
            items.add(connection, run)

    def get_past_run(self, item_id: str) -> PastRun:
        """The past run."""
        with self._database.reading() as connection:
            return items.get(connection, PastRun, item_id)

    def past_runs(self, tenant: str | None = None, status: MemoryStatus | None = None) -> list[PastRun]:
        """Past runs in the order they were added; None = all tenants, all statuses."""
        with self._database.reading() as connection:
            return items.listing(connection, PastRun, tenant, status)

    def credit_use(self, item_id: str, success: bool, use_key: str) -> None:
        """Count one use of an item, and its success; the same key (a trajectory's id) counts once."""
        with self._database.writing() as connection:
            items.credit_use(connection, item_id, success, use_key)

    def set_memory_status(self, item_id: str, status: MemoryStatus, why: str) -> None:
        """Move an item along `MEMORY_TRANSITIONS`; `why` is kept with the change."""
        with self._database.writing() as connection:
            items.set_status(connection, item_id, status, why)

    def memory_watermark(self) -> str:
        """What memory holds: the newest change's number as text, "" before the first."""
        with self._database.reading() as connection:
            return str(items.newest_change(connection) or "")

    def outbox(self, limit: int) -> list[OutboxRow]:
        """The oldest changes that the index has not followed yet, at most `limit`."""
        with self._database.reading() as connection:
            return items.pending(connection, limit)

    def changes(self, after: int, limit: int) -> list[OutboxRow]:
        """The oldest changes behind the seq `after`, whether the index has followed them or not."""
        with self._database.reading() as connection:
            return items.changes(connection, after, limit)

    def ack_outbox(self, seq_upto: int) -> None:
        """Say that the index has followed all changes up to and including `seq_upto`."""
        with self._database.writing() as connection:
            items.acknowledge(connection, seq_upto)

    def item_texts(self, ids: list[str]) -> list[ItemText]:
        """The present text and standing of these items, of any tenant: what the index follows."""
        with self._database.reading() as connection:
            return items.texts(connection, ids)

    def active_texts(self, after_seq: int, limit: int) -> list[ItemText]:
        """A page of the active items of all tenants, in order: what the index is rebuilt from."""
        with self._database.reading() as connection:
            return items.active_texts(connection, after_seq, limit)

    def tenant_texts(self, kind: IndexKind, tenant: str) -> list[ItemText]:
        """All active items of a tenant and kind: what a scan without the index compares."""
        with self._database.reading() as connection:
            return items.tenant_texts(connection, kind, tenant)

    def candidates(self, kind: MemoryKind, tenant: str, ids: list[str]) -> dict[str, Candidate]:
        """Those of the ids that are this tenant's active items of this kind."""
        with self._database.reading() as connection:
            return items.candidates(connection, kind, tenant, ids)

    def count_active(self) -> int:
        """How many items of all tenants the index should hold."""
        with self._database.reading() as connection:
            return items.count_active(connection)

    def add_generation(self, generation: Generation) -> None:
        """Add a generation; as champion only while there is none (`ConflictError`)."""
        with self._database.writing() as connection:
            nights.add_generation(connection, generation)

    def generation(self, number: int) -> Generation:
        """The generation of that number."""
        with self._database.reading() as connection:
            return nights.generation(connection, number)

    def generations(self) -> list[Generation]:
        """All generations by number."""
        with self._database.reading() as connection:
            return nights.all_generations(connection)

    def next_generation_number(self) -> int:
        """One more than the highest number; 0 in an empty ledger."""
        with self._database.reading() as connection:
            return nights.next_generation_number(connection)

    def advance_generation(
        self, number: int, to: GenerationStatus, metrics: dict[str, Any] | None = None
    ) -> Generation:
        """Move a generation along `GENERATION_TRANSITIONS` and add to its metrics.

        To stay where it stands is allowed (metrics only). Raises `ConflictError` for an illegal move
        and for any into or out of champion: that is `promote`'s.
        """
        with self._database.writing() as connection:
            return nights.advance_generation(connection, number, to, metrics)

    def promote(
        self,
        to_generation: int,
        why: str,
        by: str,
        expected_from: int | None = None,
        evidence: dict[str, Any] | None = None,
        expected_status: GenerationStatus | None = None,
    ) -> Promotion:
        """Put a generation in the champion's place: log row and both statuses at once, or nothing.

        `expected_from`, `expected_status`: the champion that the decision was made against, and how the generation
        stood then; `ConflictError` if either is another by now. Repeating the last promotion returns it.
        """
        with self._database.writing() as connection:
            promotion = nights.promote(connection, to_generation, why, by, expected_from, evidence, expected_status)
        self._switched()
        return promotion

    def begin_canary(
        self, number: int, share: float, why: str, by: str, expected_from: int | None = None
    ) -> Generation:
        """Give a generation a share of the users (`nights.begin_canary`)."""
        with self._database.writing() as connection:
            begun = nights.begin_canary(connection, number, share, why, by, expected_from)
        self._switched()
        return begun

    def end_canary(
        self, why: str, by: str, expected: int | None = None, evidence: dict[str, Any] | None = None
    ) -> Promotion:
        """All users back to the champion (`nights.end_canary`)."""
        with self._database.writing() as connection:
            ended = nights.end_canary(connection, why, by, evidence, expected)
        self._switched()
        return ended

    def _switched(self) -> None:
        with self._switching:
            self._switches += 1
            self._serving = None

    def champion(self) -> Generation:
        """What is served; raises `NotFoundError` before the first start."""
        with self._database.reading() as connection:
            return nights.champion(connection)

    def serving(self) -> Generation:
        """`champion` for every request: remembered for a second, forgotten when this process switches."""
        return self._on_duty()[0]

    def canary(self) -> Generation | None:
        """The generation that serves a share of the users beside `serving`, if one does; remembered like it."""
        return self._on_duty()[1]

    def _on_duty(self) -> tuple[Generation, Generation | None]:
        known, now = self._serving, time.monotonic()
        if known is not None and now - known[0] < SERVING_S:
            return known[1:]
        switches = self._switches
        with self._database.reading() as connection:
            champion, canary = nights.champion(connection), nights.canary(connection)
        with self._switching:
            if switches == self._switches:  # else it is another by now, and the next request must not meet this one
                self._serving = now, champion, canary
        return champion, canary

    def promotions(self) -> list[Promotion]:
        """The log of what was served, oldest first."""
        with self._database.reading() as connection:
            return nights.all_promotions(connection)

    def add_night(self, night: Night) -> None:
        """Add a night; ConflictError while another one runs."""
        with self._database.writing() as connection:
            nights.add_night(connection, night)

    def night(self, night_id: str) -> Night:
        """The night of that id."""
        with self._database.reading() as connection:
            return nights.night(connection, night_id)

    def nights(self) -> list[Night]:
        """All nights, oldest first."""
        with self._database.reading() as connection:
            return nights.all_nights(connection)

    def end_night(
        self,
        night_id: str,
        status: NightStatus,
        reasons: list[str],
        candidate: int | None = None,
        report_path: str | None = None,
    ) -> Night:
        """End a night, once: the same status again is a no-op, another one a `ConflictError`."""
        with self._database.writing() as connection:
            ending = {"reasons": reasons, "candidate": candidate, "report_path": report_path}
            return nights.end_night(connection, night_id, status, **ending)

    def set_candidate(self, night_id: str, number: int) -> None:
        """Note which generation a running night is making."""
        with self._database.writing() as connection:
            nights.set_candidate(connection, night_id, number)

    def set_limits(self, night_id: str, limits: dict[str, Any]) -> None:
        """Note what a night's training may spend; what was noted first stays."""
        with self._database.writing() as connection:
            nights.set_limits(connection, night_id, limits)

    def record_stage(self, stage_run: StageRun) -> StageRun:
        """Keep a finished stage; a night's first output of a stage stays. Returns the one that is kept."""
        with self._database.writing() as connection:
            return nights.record_stage(connection, stage_run)

    def stage(self, night_id: str, stage: str) -> StageRun | None:
        """The finished stage of a night, or None: it is still to be done."""
        with self._database.reading() as connection:
            return nights.stage(connection, night_id, stage)

    def stages(self, night_id: str) -> list[StageRun]:
        """A night's finished stages, in the order they finished."""
        with self._database.reading() as connection:
            return nights.all_stages(connection, night_id)

    def set_examples(self, night_id: str, examples: Iterable[Example]) -> None:
        """Keep what a night trains on, all or nothing, in place of what was kept for it before."""
        with self._database.writing() as connection:
            nights.set_examples(connection, night_id, examples)

    def examples(self, night_id: str) -> list[Example]:
        """What a night trained on, in the order it was added."""
        with self._database.reading() as connection:
            return nights.all_examples(connection, night_id)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation; the night that it names must be in the ledger."""
        with self._database.writing() as connection:
            nights.add_evaluation(connection, evaluation)

    def evaluations(
        self, night_id: str | None = None, generation: int | None = None, suite_hash: str | None = None
    ) -> list[Evaluation]:
        """Evaluations, oldest first; None = no such filter."""
        with self._database.reading() as connection:
            return nights.find_evaluations(connection, night_id, generation, suite_hash)


def insert_run(connection: Connection, task: Task, trajectory: Trajectory) -> None:
    """A run with its task, which may be there already; `ConflictError` when its id stands for another task."""
    [refused] = add_runs(connection, [(task, trajectory)])
    if refused is not None:
        raise refused


def insert_task(connection: Connection, task: Task) -> None:
    """A task, within the caller's transaction."""
    columns = {"tenant": task.tenant, "fingerprint": task.fingerprint}
    rows.add(connection, tasks_table, task, "task", {"id": task.id}, **columns)


def insert_trajectory(connection: Connection, trajectory: Trajectory) -> None:
    """A run whose task is in the ledger, within the caller's transaction."""
    rows.require(connection, tasks_table, "task", _owned(trajectory.task_id, trajectory.tenant))
    key, columns = {"id": trajectory.id}, run_columns(trajectory)
    rows.add(connection, trajectories_table, trajectory, "trajectory", key, **columns)


def _owned(record_id: str, tenant: str | None) -> rows.Key:
    return {"id": record_id} if tenant is None else {"id": record_id, "tenant": tenant}
