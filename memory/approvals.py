"""An operator's word on feedback: it may teach, or it may not (any more), whatever a night says of it.

Owns the change and its trace: a comment on the same run, signed by who decided. Owns no rule (`distill.credit`), which
leaves alone what was decided.
"""

from __future__ import annotations

from memory import rows
from memory.database import Database
from memory.records import Feedback, FeedbackKind, Trust
from memory.schema import feedback as feedback_table


def decide(database: Database, feedback_id: str, trust: Trust, reason: str, *, tenant: str, by: str) -> Feedback:
    """Trust or reject a word, in one transaction with the comment that says who did and why; the word as it is now.

    NotFoundError for an unknown one and for another tenant's.
    """
    with database.writing() as connection:
        key = {"id": feedback_id, "tenant": tenant}
        standing = rows.find(connection, feedback_table, Feedback, "feedback", key)
        decided = standing.model_copy(update={"trust": trust, "trust_reason": f"{by}: {reason}"})
        rows.put(connection, feedback_table, decided, key)
        # A night reads what was said since the last one: by the comment it comes back to a run that lies behind.
        told = Feedback(
            trajectory_id=standing.trajectory_id,
            tenant=tenant,
            kind=FeedbackKind.COMMENT,
            value=f"{trust.value} {feedback_id}: {reason}",
            author=by,
        )
        columns = {"trajectory_id": told.trajectory_id, "tenant": tenant}
        rows.add(connection, feedback_table, told, "feedback", {"id": told.id}, **columns)
    return decided
