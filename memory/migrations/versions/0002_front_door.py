"""Keys, idempotent replies, files, batches, stored responses, conversations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _seq() -> sa.Column[int]:
    return sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True)


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False)


def _record() -> tuple[sa.Column[str], sa.Column[str]]:
    return _text("digest"), sa.Column("body", sa.Text, nullable=False)


def _create(table: str, *parts: sa.schema.SchemaItem) -> None:
    op.create_table(
        table, _seq(), *parts, sa.PrimaryKeyConstraint("seq", name=f"pk_{table}"), sqlite_autoincrement=True
    )


def _unique(table: str, *columns: str) -> sa.UniqueConstraint:
    return sa.UniqueConstraint(*columns, name=f"uq_{table}_{'_'.join(columns)}")


def _index(table: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))


def upgrade() -> None:
    """Create the front door's tables."""
    op.add_column("trajectories", sa.Column("conversation", sa.String, nullable=True))
    _index("trajectories", "tenant", "conversation", "seq")
    _create(
        "api_keys",
        *(_text(name) for name in ("id", "secret_hash", "tenant")),
        *_record(),
        _unique("api_keys", "id"),
        _unique("api_keys", "secret_hash"),
    )
    _create(
        "replies",
        _text("tenant"),
        _text("idempotency_key"),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        *_record(),
        _unique("replies", "tenant", "idempotency_key"),
    )
    _index("replies", "created_at")
    _create("files", *(_text(name) for name in ("id", "tenant", "purpose")), *_record(), _unique("files", "id"))
    _index("files", "tenant", "seq")
    _create("batches", *(_text(name) for name in ("id", "tenant", "status")), *_record(), _unique("batches", "id"))
    _index("batches", "tenant", "seq")
    op.create_table(
        "batch_lines",
        _text("batch_id"),
        sa.Column("line", sa.Integer, autoincrement=False),
        _text("custom_id"),
        _text("status"),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("result", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("batch_id", "line", name="pk_batch_lines"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_batch_lines_batch_id"),
        _unique("batch_lines", "batch_id", "custom_id"),
    )
    _index("batch_lines", "batch_id", "status", "line")
    _create(
        "responses",
        *(_text(name) for name in ("id", "tenant", "trajectory_id")),
        *_record(),
        _unique("responses", "id"),
    )
