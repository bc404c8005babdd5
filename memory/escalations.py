"""Tasks that went to a teacher: what that may cost, what it did cost, and how often it was needed.

Owns the rows and the budget that is counted from them, so that it outlives a restart. Owns no decision which
task to escalate (`serve.escalation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import Connection, and_, case, func, select

from memory import rows
from memory.database import Database
from memory.records import DEFAULT_TENANT, Purpose, Record, new_id, now
from memory.schema import escalations, trajectories

WINDOW = 1000
"""The newest requests, of which a share may be escalated."""

DAY_S = 86_400

RESERVED_TOKENS = 1000
"""What an escalation counts for from its begin until its real number is known; also when the service dies meanwhile."""

SERVED = (Purpose.SERVE, Purpose.UNTAUGHT)


class Reason(StrEnum):
    """Why a task went to the teacher."""

    PREDICTED = "predicted"
    """Similar tasks failed before; the own model did not try."""
    FAILED = "failed"
    """The own model's answer failed its check, or there was none."""


class Status(StrEnum):
    """How an escalation stands."""

    BEGUN = "begun"
    ANSWERED = "answered"
    """The teacher gave an answer, right or wrong."""
    UNANSWERED = "unanswered"


class Escalation(Record):
    """One task handed to the teacher."""

    id: str = Field(default_factory=lambda: new_id("esc"))
    tenant: str = DEFAULT_TENANT
    task_id: str
    generation: int
    """The one that it was taken from."""
    reason: Reason
    expected: float | None = None
    """The predicted success, where there was a prediction."""
    teacher: str
    status: Status = Status.BEGUN
    success: bool | None = None
    """By the task's verifier; None when it was not judged."""
    tokens: int = RESERVED_TOKENS
    cost_usd: float | None = None
    """None: no price is known for this model."""
    seconds: float | None = None
    at: datetime = Field(default_factory=now)


@dataclass(frozen=True)
class Budget:
    """`share` of the newest requests, and tokens in any 24 hours (None: no such limit)."""

    share: float
    tokens_per_day: int | None = None


class HelpFigures(BaseModel):
    """How much of the teacher's help was needed."""

    requests: int
    """Served by a generation, or taken from it."""
    escalated: int
    """Answered by the teacher, before or after an own try."""
    rate: float | None
    """Of the requests; None without any."""
    predicted: int
    """Of the escalated: without an own try."""
    unanswered: int
    """The teacher was asked in vain."""
    succeeded: int
    """Of the escalated: the teacher's answer passed the task's verifier."""
    tokens: int
    cost_usd: float | None
    """Of those whose price is known; None when none is."""


class EscalationFigures(HelpFigures):
    """How much help one generation needed."""

    generation: int


def affordable(database: Database, budget: Budget) -> bool:
    """Whether one more may be begun now."""
    with database.reading() as connection:
        return _affordable(connection, budget)


def begin(database: Database, escalation: Escalation, budget: Budget) -> bool:
    """Count an escalation before it costs anything; False when the budget does not allow it (nothing is written)."""
    if not affordable(database, budget):
        return False
    with database.writing() as connection:
        if not _affordable(connection, budget):
            return False
        columns = {"task_id": escalation.task_id, "generation": escalation.generation, "reason": escalation.reason}
        columns |= {"at": int(escalation.at.timestamp()), "run_seq": _newest(connection), **_standing(escalation)}
        rows.add(connection, escalations, escalation, "escalation", {"id": escalation.id}, **columns)
    return True


def end(database: Database, ended: Escalation) -> None:
    """Say how a begun escalation went."""
    with database.writing() as connection:
        rows.put(connection, escalations, ended, {"id": ended.id}, **_standing(ended))


def all_escalations(database: Database, *, tenant: str | None = None) -> list[Escalation]:
    """Oldest first; None = all tenants."""
    with database.reading() as connection:
        found = rows.read(connection, Escalation, select(escalations.c.body).order_by(escalations.c.seq))
    return [one for one in found if tenant in (None, one.tenant)]


def figures(database: Database, *, after: int = 0, upto: int | None = None) -> list[EscalationFigures]:
    """For each generation that something was taken from, by number; empty without any escalation.

    `after` and `upto`: the day between two nights' lines, as seqs of runs.
    """
    c = escalations.c
    # Begun behind a line is what saw the line's run as the newest one.
    within = [c.run_seq >= after, *([c.run_seq < upto] if upto is not None else [])]
    answered = c.status == Status.ANSWERED
    untried = and_(c.reason == Reason.PREDICTED, c.status != Status.UNANSWERED)
    query = select(
        c.generation,
        func.sum(case((answered, 1), else_=0)).label("escalated"),
        func.sum(case((and_(answered, c.reason == Reason.PREDICTED), 1), else_=0)).label("predicted"),
        func.sum(case((c.status == Status.UNANSWERED, 1), else_=0)).label("unanswered"),
        func.sum(case((untried, 1), else_=0)).label("untried"),
        func.sum(case((c.success, 1), else_=0)).label("succeeded"),
        func.sum(c.tokens).label("tokens"),
        func.sum(c.cost_usd).label("cost"),
    )
    with database.reading() as connection:
        found = connection.execute(query.where(*within).group_by(c.generation).order_by(c.generation)).all()
        own = _own_requests(connection, after, upto) if found else {}
    return [
        EscalationFigures(
            generation=row.generation,
            requests=(requests := own.get(row.generation, 0) + int(row.untried)),
            escalated=int(row.escalated),
            rate=int(row.escalated) / requests if requests else None,
            predicted=int(row.predicted),
            unanswered=int(row.unanswered),
            succeeded=int(row.succeeded),
            tokens=int(row.tokens),
            cost_usd=row.cost,
        )
        for row in found
    ]


def own_requests(database: Database, *, after: int, upto: int) -> dict[int, int]:
    """Generation -> the requests of a day that it answered itself, or tried to."""
    with database.reading() as connection:
        return _own_requests(connection, after, upto)


def _standing(escalation: Escalation) -> dict[str, Any]:
    return escalation.model_dump(include={"status", "success", "tokens", "cost_usd"})


def _newest(connection: Connection) -> int:
    return connection.execute(select(func.max(trajectories.c.seq))).scalar_one() or 0


def _affordable(connection: Connection, budget: Budget) -> bool:
    c = escalations.c
    if budget.tokens_per_day is not None:
        since = int(now().timestamp()) - DAY_S
        spent = connection.execute(select(func.sum(c.tokens)).where(c.at > since)).scalar_one() or 0
        if spent + RESERVED_TOKENS > budget.tokens_per_day:
            return False
    newest = select(trajectories.c.seq).where(trajectories.c.purpose.in_(SERVED))
    window = newest.order_by(trajectories.c.seq.desc()).limit(WINDOW).subquery()
    oldest, own = connection.execute(select(func.min(window.c.seq), func.count()).select_from(window)).one()
    untried = and_(c.reason == Reason.PREDICTED, c.status != Status.UNANSWERED)
    counts = select(func.count(), func.sum(case((untried, 1), else_=0)))
    begun, unseen = connection.execute(counts.where(c.run_seq >= (oldest if own == WINDOW else 0))).one()
    # One more: the request that asks now is in neither table.
    return begun + 1 <= budget.share * (own + (unseen or 0) + 1)


def _own_requests(connection: Connection, after: int, upto: int | None) -> dict[int, int]:
    c = trajectories.c
    query = select(c.generation, func.count().label("n")).where(c.purpose.in_(SERVED), c.seq > after)
    if upto is not None:
        query = query.where(c.seq <= upto)
    return {row.generation: row.n for row in connection.execute(query.group_by(c.generation))}
