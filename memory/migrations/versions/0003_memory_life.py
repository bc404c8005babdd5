"""What items are worth (controls, generations), when they changed, what was forgotten, what went to a teacher."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Widen uses and outbox; create the lists of what was forgotten and what was escalated."""
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
    seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "documents",
        sa.Column("seq", seq, autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_documents"),
        sa.UniqueConstraint("id", name="uq_documents_id"),
        sa.UniqueConstraint("tenant", "source", name="uq_documents_tenant_source"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_documents_tenant_sha256", "documents", ["tenant", "sha256"])
    op.create_table(
        "document_chunks",
        sa.Column("seq", seq, autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("document_id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_document_chunks"),
        sa.UniqueConstraint("id", name="uq_document_chunks_id"),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name="fk_document_chunks_document_id"),
        sqlite_autoincrement=True,
    )
    for column in ("document_id", "tenant"):
        op.create_index(f"ix_document_chunks_{column}", "document_chunks", [column])
    op.create_table(
        "document_outbox",
        sa.Column("seq", seq, autoincrement=True),
        sa.Column("chunk_id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("op", sa.String, nullable=False),
        sa.Column("acked", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_document_outbox"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_document_outbox_chunk_id", "document_outbox", ["chunk_id"])
    op.create_index("ix_document_outbox_acked_seq", "document_outbox", ["acked", "seq"])
    op.create_table(
        "escalations",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("task_id", sa.String, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("run_seq", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("success", sa.Boolean, nullable=True),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_usd", sa.Float, nullable=True),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_escalations"),
        sa.UniqueConstraint("id", name="uq_escalations_id"),
        sqlite_autoincrement=True,
    )
    for column in ("task_id", "at", "run_seq"):
        op.create_index(f"ix_escalations_{column}", "escalations", [column])
    if op.get_bind().dialect.name == "postgresql":
        _keep_no_samples()


def _keep_no_samples() -> None:
    # PostgreSQL samples what columns hold for its planner, which asks nothing of these: words would outlive forgetting.
    texts = """
        SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()
        AND (data_type = 'text' OR column_name IN ('conversation', 'idempotency_key', 'custom_id'))
    """
    for table, column in op.get_bind().execute(sa.text(texts)).all():
        op.execute(f'ALTER TABLE "{table}" ALTER COLUMN "{column}" SET STATISTICS 0')
