"""Live outcomes, read for the watch: what verifiers and users said of served runs, and nothing else of them.

Reads runs and feedback from one sequence number to another. Owns no rule of what counts how much (`evals.live`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from memory import rows
from memory.database import Database
from memory.records import Feedback, Purpose, Trust
from memory.schema import feedback, tasks, trajectories

OPERATOR = "operator"
"""Authors that begin so are the service's own people; no key can claim such a name."""


@dataclass(frozen=True)
class LiveRun:
    """A served run that was judged."""

    id: str
    generation: int
    tenant: str
    workload: str
    fingerprint: str
    """The task's: what was asked."""
    started_at: datetime
    verified: bool | None
    """Full marks by the task's verifier; None when none judged it."""


@dataclass(frozen=True)
class LiveScore:
    """A user's score of a served run."""

    run: LiveRun
    voice: str
    operator: bool
    success: bool


def start_of(database: Database, runs: int) -> int:
    """The sequence number behind which the newest `runs` served runs lie; 0 when there are no more."""
    served = select(trajectories.c.seq).where(trajectories.c.purpose == Purpose.SERVE)
    query = served.order_by(trajectories.c.seq.desc()).offset(runs).limit(1)
    with database.reading() as connection:
        return connection.execute(query).scalar_one_or_none() or 0


def verified_runs(database: Database, after_seq: int, upto_seq: int) -> list[LiveRun]:
    """Served runs that a verifier judged, `after_seq` < seq <= `upto_seq`, oldest first."""
    query = (
        select(trajectories.c.body, tasks.c.fingerprint)
        .join(tasks, tasks.c.id == trajectories.c.task_id)
        .where(trajectories.c.purpose == Purpose.SERVE)
        .where(trajectories.c.seq > after_seq, trajectories.c.seq <= upto_seq)
        # Bodies are compact JSON, in whose texts every quote is escaped: only an outcome reads so.
        .where(trajectories.c.body.contains('"by":"verifier"', autoescape=True))
        .order_by(trajectories.c.seq)
    )
    with database.reading() as connection:
        return [run for run in (_run(*row) for row in _all(connection, query)) if run is not None]


def scores(database: Database, after_seq: int, upto_seq: int, runs_after: int) -> list[LiveScore]:
    """Scores that nobody rejected, `after_seq` < seq <= `upto_seq`, of runs behind `runs_after`, oldest first."""
    query = (
        select(feedback.c.body, trajectories.c.body, tasks.c.fingerprint)
        .join(trajectories, trajectories.c.id == feedback.c.trajectory_id)
        .join(tasks, tasks.c.id == trajectories.c.task_id)
        .where(trajectories.c.purpose == Purpose.SERVE, trajectories.c.seq > runs_after)
        .where(feedback.c.seq > after_seq, feedback.c.seq <= upto_seq)
        .where(feedback.c.body.contains('"kind":"score"', autoescape=True))
        .order_by(feedback.c.seq)
    )
    found: list[LiveScore] = []
    with database.reading() as connection:
        for said_body, run_body, fingerprint in _all(connection, query):
            said, run = rows.load(Feedback, said_body), _run(run_body, fingerprint)
            if run is not None and said.trust is not Trust.REJECTED and isinstance(said.value, int | float):
                operator = said.author.startswith(OPERATOR)
                found.append(LiveScore(run, said.voice, operator, success=said.value >= 0.5))
    return found


def _all(connection: Connection, query: Any) -> list[Any]:
    return list(connection.execute(query))


def _run(body: str, fingerprint: str) -> LiveRun | None:
    """None for a run that another model made than the generation it was asked of."""
    run = json.loads(body)
    if run["model"] != "base" and not run["model"].startswith(f"gen-{run['generation']}@"):
        return None
    outcome = run["outcome"] or {}
    return LiveRun(
        id=run["id"],
        generation=run["generation"],
        tenant=run["tenant"],
        workload=run["workload"],
        fingerprint=fingerprint,
        started_at=datetime.fromisoformat(run["started_at"]),
        verified=outcome["score"] >= 0.99 if outcome.get("by") == "verifier" else None,
    )
