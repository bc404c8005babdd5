"""What was made from whom: the queries that go from a run or a user's word to the examples that name it.

Owns no tables. Every read names the tenant whose records may be seen.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import or_, select

from memory import rows
from memory.database import Database
from memory.records import Example, Feedback, Purpose, Trajectory
from memory.schema import examples as examples_table
from memory.schema import feedback as feedback_table
from memory.schema import trajectories


def get_feedback(database: Database, feedback_id: str, *, tenant: str) -> Feedback:
    """The user's word; an unknown one and another tenant's raise `NotFoundError`."""
    with database.reading() as connection:
        return rows.find(connection, feedback_table, Feedback, "feedback", {"id": feedback_id, "tenant": tenant})


def feedback_by_id(database: Database, ids: Iterable[str], *, tenant: str) -> dict[str, Feedback]:
    """Those of the ids that are this tenant's feedback."""
    found: dict[str, Feedback] = {}
    table = feedback_table
    with database.reading() as connection:
        for part in rows.chunks(ids):
            query = select(table.c.body).where(table.c.id.in_(part), table.c.tenant == tenant)
            found.update((said.id, said) for said in rows.read(connection, Feedback, query))
    return found


def runs_of_tenant(database: Database, ids: Iterable[str], *, tenant: str) -> set[str]:
    """Those of the ids that are this tenant's runs."""
    found: set[str] = set()
    table = trajectories
    with database.reading() as connection:
        for part in rows.chunks(ids):
            query = select(table.c.id).where(table.c.id.in_(part), table.c.tenant == tenant)
            found.update(connection.execute(query).scalars())
    return found


def teachers_of(database: Database, ids: Iterable[str], *, tenant: str) -> dict[str, str]:
    """Those of the ids that are a teacher's runs for this tenant, with the teacher's name (`teacher:NAME`)."""
    found: dict[str, str] = {}
    table = trajectories
    with database.reading() as connection:
        for part in rows.chunks(ids):
            wanted = table.c.id.in_(part), table.c.tenant == tenant, table.c.purpose == Purpose.TEACHER.value
            taught = rows.read(connection, Trajectory, select(table.c.body).where(*wanted))
            found.update((run.id, run.model) for run in taught)
    return found


def examples_naming(database: Database, ids: Iterable[str], *, tenant: str) -> list[tuple[str, Example]]:
    """(night id, example) of the tenant's examples that have one of the ids among their sources, in order."""
    wanted = set(ids)
    if not wanted:
        return []
    table = examples_table
    # The text is only a sieve, so that the database reads the bodies and not we: an id may also be quoted elsewhere.
    sieve = or_(*(table.c.body.contains(f'"{id}"', autoescape=True) for id in sorted(wanted)))
    query = select(table.c.night_id, table.c.body).where(sieve).order_by(table.c.seq)
    with database.reading() as connection:
        found = [(night_id, rows.load(Example, body)) for night_id, body in connection.execute(query)]
    return [(night_id, e) for night_id, e in found if e.tenant == tenant and wanted & set(e.sources)]
