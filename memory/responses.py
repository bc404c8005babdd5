"""Stored replies of the Responses API: the reply, and every item that led to it.

A reply keeps the whole context it was made from, not a link to the one before: deleting one leaves
those after it whole, and a context is never larger than the model's.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete

from memory import rows
from memory.database import Database
from memory.records import Record
from memory.schema import responses


class StoredResponse(Record):
    """One reply of the Responses API."""

    id: str
    tenant: str
    trajectory_id: str
    conversation_id: str
    """The id of the first response of its chain."""
    items: list[dict[str, Any]]
    """The input items that the model was shown, oldest first; earlier replies' output among them."""
    reply: dict[str, Any]
    """The `response` object as it was sent."""


def add_response(database: Database, response: StoredResponse) -> None:
    """Keep a reply; the same one again is left alone, another under its id raises `ConflictError`."""
    with database.writing() as connection:
        insert_response(connection, response)


def insert_response(connection: Connection, response: StoredResponse) -> None:
    """`add_response`, within the caller's transaction."""
    columns = {"tenant": response.tenant, "trajectory_id": response.trajectory_id}
    rows.add(connection, responses, response, "response", {"id": response.id}, **columns)


def get_response(database: Database, response_id: str, *, tenant: str) -> StoredResponse:
    """The reply; another tenant's, a deleted one and one that was never stored raise `NotFoundError`."""
    with database.reading() as connection:
        key = {"id": response_id, "tenant": tenant}
        return rows.find(connection, responses, StoredResponse, "response", key)


def delete_response(database: Database, response_id: str, *, tenant: str) -> None:
    """Forget a reply (its run stays in the ledger); raises `NotFoundError` as `get_response` does."""
    with database.writing() as connection:
        rows.require(connection, responses, "response", {"id": response_id, "tenant": tenant})
        connection.execute(delete(responses).where(responses.c.id == response_id))
