"""What a request with an Idempotency-Key was answered, so that a retry gets the same words.

Functions over `Ledger.database`. A key belongs to a tenant, stands for one request (its `fingerprint`) and is
forgotten after a while.
"""

from __future__ import annotations

import time

from sqlalchemy import delete, insert, select, update

from memory import rows
from memory.database import Database
from memory.records import Record
from memory.schema import replies


class Reply(Record):
    """The request that a key stands for and, once it is known, its answer."""

    fingerprint: str
    status: int | None = None
    """None: not answered yet, or answered in a way that is not kept (a stream, an error worth another try)."""
    content_type: str = ""
    body: str = ""


def claim(database: Database, tenant: str, key: str, fingerprint: str, keep_s: int) -> Reply:
    """What the key stands for, from now on this request if for nothing yet; on disk when this returns.

    The caller compares fingerprints. Keys older than `keep_s` seconds stand for nothing any more.
    """
    now = int(time.time())
    mine = (replies.c.tenant == tenant, replies.c.idempotency_key == key)
    with database.writing() as connection:
        connection.execute(delete(replies).where(replies.c.created_at <= now - keep_s))
        standing = rows.read(connection, Reply, select(replies.c.body).where(*mine))
        if standing:
            return standing[0]
        claimed = Reply(fingerprint=fingerprint)
        body = rows.dump(claimed)
        connection.execute(
            insert(replies).values(
                tenant=tenant, idempotency_key=key, created_at=now, digest=rows.digest_of(body), body=body
            )
        )
    return claimed


def keep(database: Database, tenant: str, key: str, reply: Reply) -> None:
    """Store the answer of a claimed key; on disk when this returns. The first answer stays."""
    mine = (replies.c.tenant == tenant, replies.c.idempotency_key == key)
    with database.writing() as connection:
        standing = rows.read(connection, Reply, select(replies.c.body).where(*mine))
        if standing and standing[0].status is None:
            connection.execute(update(replies).where(*mine).values(body=rows.dump(reply)))
