"""Which generation made a run and whether it succeeded, beside the record: counted without reading what was said."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

# PostgreSQL refuses to read a record that holds U+0000 or half a character, whatever it is asked for. Four digits
# and no fewer: behind a backslash of the text's own, what stands in their place may be the end of the text.
READABLE = r"CAST(regexp_replace(body, '\\u(0000|d[89a-f][0-9a-f]{2})', '\\u0020', 'g') AS json)"

PLACES = {
    "sqlite": ("json_extract(body, '$.generation')", "json_extract(body, '$.outcome.score')"),
    "postgresql": (
        f"CAST({READABLE} ->> 'generation' AS integer)",
        f"CAST({READABLE} -> 'outcome' ->> 'score' AS double precision)",
    ),
}


def upgrade() -> None:
    """Add the columns, fill them from the records, and let the index that runs are counted by cover them."""
    op.add_column("trajectories", sa.Column("generation", sa.Integer, nullable=True))
    op.add_column("trajectories", sa.Column("success", sa.Boolean, nullable=True))
    generation, score = PLACES[op.get_bind().dialect.name]
    op.execute(f"UPDATE trajectories SET generation = {generation}, success = {score} >= 0.99")
    op.drop_index("ix_trajectories_purpose_seq", "trajectories")
    columns = ["purpose", "seq", "generation", "success"]
    op.create_index("ix_trajectories_purpose_seq_generation_success", "trajectories", columns)
    op.create_index("ix_memory_item_uses_use_key", "memory_item_uses", ["use_key"])
