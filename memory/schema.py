"""The ledger's tables, for SQLite and PostgreSQL alike.

Owns names, columns and indexes. Owns no queries (`memory.ledger` and its function modules) and no
changes over time (`memory.migrations`; a test compares the two).

Every record is kept as its JSON `body` plus the columns that are queried. `digest` is the hash of the
record as it was first added: what makes a repeated write recognisable after the record has moved on.
`seq` counts rows in commit order (one writer at a time, see `memory.database`) and is never reused.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Sequence = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts by itself only in a column of type INTEGER."""


def _seq() -> Column[int]:
    return Column("seq", Sequence, primary_key=True, autoincrement=True)


def _record() -> tuple[Column[str], Column[str]]:
    return Column("digest", String, nullable=False), Column("body", Text, nullable=False)


tasks = Table(
    "tasks",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("fingerprint", String, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)

trajectories = Table(
    "trajectories",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("task_id", String, ForeignKey("tasks.id"), nullable=False, index=True),
    Column("tenant", String, nullable=False),
    Column("workload", String, nullable=False),
    Column("purpose", String, nullable=False),
    *_record(),
    Column("conversation", String, nullable=True),
    Column("generation", Integer, nullable=True),
    Column("success", Boolean, nullable=True),
    Index(None, "tenant", "workload", "seq"),
    Index(None, "purpose", "seq", "generation", "success"),
    Index(None, "tenant", "conversation", "seq"),
    sqlite_autoincrement=True,
)
"""`success`: None for a run that had no outcome of its own. Behind a long body SQLite reads a column slowly: both are
counted from the index alone."""

feedback = Table(
    "feedback",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("trajectory_id", String, ForeignKey("trajectories.id"), nullable=False, index=True),
    Column("tenant", String, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)

items = Table(
    "memory_items",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("kind", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("status", String, nullable=False),
    Column("text", Text, nullable=False),
    *_record(),
    Index(None, "tenant", "kind", "status", "seq"),
    sqlite_autoincrement=True,
)
"""Principles and past runs; `text` is what the index embeds."""

item_origins = Table(
    "memory_item_origins",
    metadata,
    Column("item_id", String, ForeignKey("memory_items.id"), primary_key=True),
    Column("origin", String, primary_key=True),
)
"""What an item was made from: task ids and task fingerprints. Recall leaves items out by them."""

item_uses = Table(
    "memory_item_uses",
    metadata,
    Column("item_id", String, ForeignKey("memory_items.id"), primary_key=True),
    Column("use_key", String, primary_key=True, index=True),
    Column("success", Boolean, nullable=False),
    Column("withheld", Boolean, nullable=False, server_default=false()),
    Column("generation", Integer, nullable=True),
)
"""The judged runs of an item: shown ones are counted in its `uses` and `successes`, withheld ones are the control."""

outbox = Table(
    "memory_outbox",
    metadata,
    _seq(),
    Column("item_id", String, ForeignKey("memory_items.id"), nullable=False),
    Column("kind", String, nullable=False),
    Column("op", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("acked", Boolean, nullable=False),
    Column("at", BigInteger, nullable=True),
    Index(None, "acked", "seq"),
    Index(None, "item_id", "seq"),
    sqlite_autoincrement=True,
)
"""Every change of an item, in order, with its reason and Unix time: what the index follows, and the item's history.
Rows stay once acknowledged: the newest names the state."""

generations = Table(
    "generations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("status", String, nullable=False),
    *_record(),
)
Index(
    "uq_generations_champion",
    generations.c.status,
    unique=True,
    sqlite_where=text("status = 'champion'"),
    postgresql_where=text("status = 'champion'"),
)

promotions = Table(
    "promotions",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("from_generation", Integer, ForeignKey("generations.number"), nullable=False),
    Column("to_generation", Integer, ForeignKey("generations.number"), nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)

nights = Table(
    "nights",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("status", String, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)

stages = Table(
    "night_stages",
    metadata,
    _seq(),
    Column("night_id", String, ForeignKey("nights.id"), nullable=False),
    Column("stage", String, nullable=False),
    *_record(),
    UniqueConstraint("night_id", "stage"),
    sqlite_autoincrement=True,
)

examples = Table(
    "night_examples",
    metadata,
    _seq(),
    Column("night_id", String, ForeignKey("nights.id"), nullable=False),
    Column("id", String, nullable=False),
    *_record(),
    UniqueConstraint("night_id", "id"),
    sqlite_autoincrement=True,
)
"""What a night trained on. A replayed example has a row in each night that used it."""

evaluations = Table(
    "evaluations",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("night_id", String, ForeignKey("nights.id"), nullable=True, index=True),
    Column("generation", Integer, nullable=False),
    Column("suite_hash", String, nullable=False),
    *_record(),
    Index(None, "suite_hash", "generation"),
    sqlite_autoincrement=True,
)

api_keys = Table(
    "api_keys",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("secret_hash", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)
"""Keys by the sha256 of their secret; the secret itself is nowhere."""

replies = Table(
    "replies",
    metadata,
    _seq(),
    Column("tenant", String, nullable=False),
    Column("idempotency_key", String, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    *_record(),
    UniqueConstraint("tenant", "idempotency_key"),
    Index(None, "created_at"),
    sqlite_autoincrement=True,
)
"""What a POST with an Idempotency-Key was answered; `created_at` in Unix seconds, for expiry."""

files = Table(
    "files",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("purpose", String, nullable=False),
    *_record(),
    Index(None, "tenant", "seq"),
    sqlite_autoincrement=True,
)
"""Uploaded and produced files; the bytes lie in the data folder under the file's id."""

batches = Table(
    "batches",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("status", String, nullable=False),
    *_record(),
    Index(None, "tenant", "seq"),
    sqlite_autoincrement=True,
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String, ForeignKey("batches.id"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", String, nullable=False),
    Column("status", String, nullable=False),
    Column("request", Text, nullable=False),
    Column("result", Text, nullable=True),
    Index(None, "batch_id", "status", "line"),
    UniqueConstraint("batch_id", "custom_id"),
)
"""One line of a batch: `pending`, then `completed` or `failed` in the transaction that adds its trajectory."""

responses = Table(
    "responses",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("trajectory_id", String, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)
"""Stored replies of the Responses API, with the items that led to them."""

forgotten = Table(
    "forgotten",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("finished", Boolean, nullable=False),
    *_record(),
    sqlite_autoincrement=True,
)
"""What was deleted on somebody's wish: whose, how much, which generations had learned from it. Never the data."""

documents = Table(
    "documents",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("source", Text, nullable=False),
    Column("sha256", String, nullable=False),
    *_record(),
    UniqueConstraint("tenant", "source"),
    Index(None, "tenant", "sha256"),
    sqlite_autoincrement=True,
)

chunks = Table(
    "document_chunks",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("document_id", String, ForeignKey("documents.id"), nullable=False, index=True),
    Column("tenant", String, nullable=False, index=True),
    Column("text", Text, nullable=False),
    Column("body", Text, nullable=False),
    sqlite_autoincrement=True,
)
"""Stretches of documents; `text` is what the index embeds."""

chunk_outbox = Table(
    "document_outbox",
    metadata,
    _seq(),
    Column("chunk_id", String, nullable=False, index=True),
    Column("tenant", String, nullable=False),
    Column("op", String, nullable=False),
    Column("acked", Boolean, nullable=False),
    Index(None, "acked", "seq"),
    sqlite_autoincrement=True,
)
"""Every change of a chunk, in order, for the index to follow; a chunk that is gone has only these rows left."""

escalations = Table(
    "escalations",
    metadata,
    _seq(),
    Column("id", String, nullable=False, unique=True),
    Column("task_id", String, nullable=False, index=True),
    Column("generation", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("run_seq", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    Column("status", String, nullable=False),
    Column("success", Boolean, nullable=True),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_usd", Float, nullable=True),
    *_record(),
    Index(None, "at"),
    Index(None, "run_seq"),
    sqlite_autoincrement=True,
)
"""Tasks that went to a teacher: numbers and ids, no text. `run_seq`: the newest run's seq then, `at`: Unix time."""
