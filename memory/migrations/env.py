"""Alembic's entry: runs the revisions on the connection that `memory.database.migrate` hands over.

Owns no connection and no transaction: the caller's write transaction holds all revisions or none.
"""

from __future__ import annotations

from alembic import context

from memory.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
