"""The first tables: runs, feedback, memory items, generations, nights."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _seq() -> sa.Column[int]:
    return sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=nullable)


def _record() -> tuple[sa.Column[str], sa.Column[str]]:
    return _text("digest"), sa.Column("body", sa.Text, nullable=False)


def _create(table: str, *parts: sa.schema.SchemaItem) -> None:
    """A table with `seq` as its counted primary key."""
    op.create_table(
        table, _seq(), *parts, sa.PrimaryKeyConstraint("seq", name=f"pk_{table}"), sqlite_autoincrement=True
    )


def _unique(table: str, *columns: str) -> sa.UniqueConstraint:
    return sa.UniqueConstraint(*columns, name=f"uq_{table}_{'_'.join(columns)}")


def _foreign(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}")


def _index(table: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))


def upgrade() -> None:
    """Create everything."""
    _create_runs()
    _create_memory()
    _create_generations()
    _create_nights()


def _create_runs() -> None:
    _create("tasks", _text("id"), _text("tenant"), _text("fingerprint"), *_record(), _unique("tasks", "id"))
    _create(
        "trajectories",
        *(_text(name) for name in ("id", "task_id", "tenant", "workload", "purpose")),
        *_record(),
        _unique("trajectories", "id"),
        _foreign("trajectories", "task_id", "tasks.id"),
    )
    _index("trajectories", "task_id")
    _index("trajectories", "tenant", "workload", "seq")
    _index("trajectories", "purpose", "seq")
    _create(
        "feedback",
        *(_text(name) for name in ("id", "trajectory_id", "tenant")),
        *_record(),
        _unique("feedback", "id"),
        _foreign("feedback", "trajectory_id", "trajectories.id"),
    )
    _index("feedback", "trajectory_id")


def _create_memory() -> None:
    _create(
        "memory_items",
        *(_text(name) for name in ("id", "kind", "tenant", "status")),
        sa.Column("text", sa.Text, nullable=False),
        *_record(),
        _unique("memory_items", "id"),
    )
    _index("memory_items", "tenant", "kind", "status", "seq")
    op.create_table(
        "memory_item_origins",
        _text("item_id"),
        _text("origin"),
        sa.PrimaryKeyConstraint("item_id", "origin", name="pk_memory_item_origins"),
        _foreign("memory_item_origins", "item_id", "memory_items.id"),
    )
    op.create_table(
        "memory_item_uses",
        _text("item_id"),
        _text("use_key"),
        sa.Column("success", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("item_id", "use_key", name="pk_memory_item_uses"),
        _foreign("memory_item_uses", "item_id", "memory_items.id"),
    )
    _create(
        "memory_outbox",
        *(_text(name) for name in ("item_id", "kind", "op")),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("acked", sa.Boolean, nullable=False),
        _foreign("memory_outbox", "item_id", "memory_items.id"),
    )
    _index("memory_outbox", "acked", "seq")


def _create_generations() -> None:
    op.create_table(
        "generations",
        sa.Column("number", sa.Integer, autoincrement=False),
        _text("status"),
        *_record(),
        sa.PrimaryKeyConstraint("number", name="pk_generations"),
    )
    champion = sa.text("status = 'champion'")
    op.create_index(
        "uq_generations_champion",
        "generations",
        ["status"],
        unique=True,
        sqlite_where=champion,
        postgresql_where=champion,
    )
    _create(
        "promotions",
        _text("id"),
        sa.Column("from_generation", sa.Integer, nullable=False),
        sa.Column("to_generation", sa.Integer, nullable=False),
        *_record(),
        _unique("promotions", "id"),
        _foreign("promotions", "from_generation", "generations.number"),
        _foreign("promotions", "to_generation", "generations.number"),
    )


def _create_nights() -> None:
    _create("nights", _text("id"), _text("status"), *_record(), _unique("nights", "id"))
    _create(
        "night_stages",
        _text("night_id"),
        _text("stage"),
        *_record(),
        _unique("night_stages", "night_id", "stage"),
        _foreign("night_stages", "night_id", "nights.id"),
    )
    _create(
        "night_examples",
        _text("night_id"),
        _text("id"),
        *_record(),
        _unique("night_examples", "night_id", "id"),
        _foreign("night_examples", "night_id", "nights.id"),
    )
    _create(
        "evaluations",
        _text("id"),
        _text("night_id", nullable=True),
        sa.Column("generation", sa.Integer, nullable=False),
        _text("suite_hash"),
        *_record(),
        _unique("evaluations", "id"),
        _foreign("evaluations", "night_id", "nights.id"),
    )
    _index("evaluations", "night_id")
    _index("evaluations", "suite_hash", "generation")
