"""The ledger's changes over time, as Alembic revisions run by `memory.database.migrate`."""
