"""Runs, and what was said of them, found without reading the whole ledger: a night is about few runs of many.

Reads only, of all tenants. Owns no rule of what may teach (`distill`), nor the order of what it finds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, func, select

from memory import rows
from memory.database import Database
from memory.records import Feedback, FeedbackKind, Purpose, Trajectory, Trust
from memory.schema import feedback, tasks, trajectories

_STREAMED = {"yield_per": rows.CHUNK}
"""So that no more rows than these are in the process at once."""


@dataclass(frozen=True)
class Counted:
    """How many runs there are, and how many of them got full marks by themselves."""

    runs: int
    successes: int


def count(database: Database, *purposes: Purpose) -> Counted:
    """The runs of these purposes."""
    c = trajectories.c
    won = func.sum(case((c.success, 1), else_=0))
    with database.reading() as connection:
        runs, successes = connection.execute(select(func.count(), won).where(c.purpose.in_(purposes))).one()
    return Counted(runs, int(successes or 0))


def count_feedback(database: Database) -> int:
    """How often somebody said something."""
    with database.reading() as connection:
        return connection.execute(select(func.count()).select_from(feedback)).scalar_one()


def task_ids(database: Database, *purposes: Purpose) -> list[str]:
    """The tasks that were run for one of these purposes."""
    c = trajectories.c
    with database.reading() as connection:
        return list(connection.execute(select(c.task_id).where(c.purpose.in_(purposes)).distinct()).scalars())


def run_ids(
    database: Database,
    purposes: Collection[Purpose],
    *,
    after_seq: int = 0,
    upto_seq: int,
    since: datetime | None = None,
) -> set[str]:
    """The runs of these purposes with `after_seq` < seq <= `upto_seq`; `since`: those that ended then or later."""
    c = trajectories.c
    wanted = (c.purpose.in_(purposes), *_between(c.seq, after_seq, upto_seq))
    with database.reading() as connection:
        if since is None:
            return set(connection.execute(select(c.id).where(*wanted)).scalars())
        bodies = connection.execute(select(c.body).where(*wanted).execution_options(**_STREAMED)).scalars()
        return {run.id for run in map(outline, bodies) if run.ended_at >= since}


def by_id(
    database: Database, ids: Iterable[str], purposes: Collection[Purpose], *, upto_seq: int, outlined: bool = False
) -> dict[str, Trajectory]:
    """Those of the ids that are runs of these purposes up to `upto_seq`; `outlined`: see `outline`."""
    c = trajectories.c
    found: dict[str, Trajectory] = {}
    with database.reading() as connection:
        for part in rows.chunks(ids):
            # Asked for them by purpose and place as well, SQLite goes through all runs of the purpose.
            for row in connection.execute(select(c.id, c.purpose, c.seq, c.body).where(c.id.in_(part))):
                if row.purpose in purposes and row.seq <= upto_seq:
                    found[row.id] = outline(row.body) if outlined else rows.load(Trajectory, row.body)
    return found


def newest(
    database: Database,
    purposes: Collection[Purpose],
    *,
    limit: int,
    tenant: str | None = None,
    upto_seq: int | None = None,
) -> list[Trajectory]:
    """The newest runs of these purposes, newest first, outlined; None = all tenants, no end."""
    c = trajectories.c
    # Their places first: to sort long rows takes long.
    places = select(c.seq).where(c.purpose.in_(purposes))
    if tenant is not None:
        places = places.where(c.tenant == tenant)
    if upto_seq is not None:
        places = places.where(c.seq <= upto_seq)
    places = places.order_by(c.seq.desc()).limit(limit)
    query = select(c.body).where(c.seq.in_(places)).order_by(c.seq.desc()).execution_options(**_STREAMED)
    with database.reading() as connection:
        return [outline(body) for body in connection.execute(query).scalars()]


def outline(body: str) -> Trajectory:
    """A run without its messages and model calls, which are most of it and which nobody needs to judge it."""
    return Trajectory.model_validate({**json.loads(body), "messages": [], "steps": []})


def spoken_of(database: Database, *, after_seq: int = 0, upto_seq: int, since: datetime | None = None) -> set[str]:
    """The runs that feedback with `after_seq` < seq <= `upto_seq` is about; `since`: feedback that was given then or
    later."""
    c = feedback.c
    wanted = _between(c.seq, after_seq, upto_seq)
    with database.reading() as connection:
        if since is None:
            return set(connection.execute(select(c.trajectory_id).where(*wanted).distinct()).scalars())
        said = rows.each(connection, Feedback, select(c.body).where(*wanted))
        return {one.trajectory_id for one in said if one.created_at >= since}


def spoken_of_questions(
    database: Database, fingerprints: Collection[str], kind: FeedbackKind, *, upto_seq: int
) -> set[str]:
    """The runs that feedback of this kind is about and whose tasks ask one of these questions."""
    if not fingerprints:
        return set()
    # All of them in one pass, as short rows: each of many questions would read all feedback again.
    query = (
        select(trajectories.c.id, tasks.c.fingerprint)
        .join(feedback, feedback.c.trajectory_id == trajectories.c.id)
        .join(tasks, tasks.c.id == trajectories.c.task_id)
        .where(feedback.c.seq <= upto_seq, _says("kind", kind))
    )
    wanted = set(fingerprints)
    with database.reading() as connection:
        found = connection.execute(query.execution_options(**_STREAMED))
        return {row.id for row in found if row.fingerprint in wanted}


def feedback_on(database: Database, ids: Iterable[str], *, upto_seq: int | None = None) -> list[Feedback]:
    """What was said of these runs, up to `upto_seq`."""
    also = [feedback.c.seq <= upto_seq] if upto_seq is not None else []
    with database.reading() as connection:
        return _said(connection, feedback.c.trajectory_id, ids, *also)


def feedback_by_id(database: Database, ids: Iterable[str]) -> list[Feedback]:
    """Those of the ids that are feedback."""
    with database.reading() as connection:
        return _said(connection, feedback.c.id, ids)


def undecided(database: Database, *, upto_seq: int) -> list[Feedback]:
    """The feedback up to `upto_seq` of which nobody has said yet whether it may teach."""
    query = select(feedback.c.body).where(feedback.c.seq <= upto_seq, _says("trust", Trust.QUARANTINED))
    with database.reading() as connection:
        return [one for one in rows.read(connection, Feedback, query) if one.trust is Trust.QUARANTINED]


def _said(connection: Connection, column: Any, values: Iterable[str], *also: ColumnElement[bool]) -> list[Feedback]:
    found: list[Feedback] = []
    for part in rows.chunks(values):
        found += rows.read(connection, Feedback, select(feedback.c.body).where(column.in_(part), *also))
    return found


def _says(field: str, value: str) -> ColumnElement[bool]:
    # Bodies are compact JSON, in whose texts every quote is escaped. A free-form value may read so too: it is a sieve.
    return feedback.c.body.contains(f'"{field}":"{value}"', autoescape=True)


def _between(seq: Any, after: int, upto: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return seq > after, seq <= upto
