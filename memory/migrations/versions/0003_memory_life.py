"""What items are worth (controls, generations), when they changed, and what was forgotten."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Widen uses and outbox; create the list of what was forgotten."""
    op.add_column("memory_item_uses", sa.Column("withheld", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("memory_item_uses", sa.Column("generation", sa.Integer, nullable=True))
    op.add_column("memory_outbox", sa.Column("at", sa.BigInteger, nullable=True))
    op.create_index("ix_memory_outbox_item_id_seq", "memory_outbox", ["item_id", "seq"])
    op.create_table(
        "forgotten",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_forgotten"),
        sa.UniqueConstraint("id", name="uq_forgotten_id"),
        sqlite_autoincrement=True,
    )
