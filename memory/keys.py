"""API keys: who may use the service, for what, and how much. Only the sha256 of a secret is kept.

Functions over `Ledger.database`. A secret is shown once, by `mint`, and is found again only by whoever has it:
the lookup is by hash, so how long it takes says nothing about any stored secret.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from pydantic import Field, field_validator
from sqlalchemy import func, select

from memory import rows
from memory.database import Database
from memory.errors import ConflictError
from memory.records import DEFAULT_TENANT, Record, new_id, now
from memory.schema import api_keys

SECRET_PREFIX = "sk-ns-"
SECRET_BYTES = 32


class Scope(StrEnum):
    """What a key may be used for. `admin` includes all."""

    CHAT = "chat"
    BATCH = "batch"
    FEEDBACK = "feedback"
    MEMORY = "memory"
    OPERATE = "operate"
    ADMIN = "admin"


class ApiKey(Record):
    """What is known of a key, all but its secret."""

    id: str = Field(default_factory=lambda: new_id("key"))
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@ \-]{0,99}$")
    """Signs the key's feedback. Without `/` and `:`, so that no name can be mistaken for another signature."""
    tenant: str = Field(default=DEFAULT_TENANT, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@\-]{0,99}$")
    scopes: list[Scope] = Field(min_length=1)
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    """None = no limit."""
    max_concurrent: int | None = Field(default=None, ge=1, le=100_000)
    """Requests of the key at once; None = no limit."""
    vouches: bool = False
    """Its holder is an application that knows its users: each author it names has a voice of their own."""

    @field_validator("scopes")
    @classmethod
    def _each_scope_once(cls, scopes: list[Scope]) -> list[Scope]:
        return sorted(set(scopes))

    def usable(self, at: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)


def hash_of(secret: str) -> str:
    """What is stored of a secret. A plain sha256 is enough: nobody guesses 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def mint(database: Database, key: ApiKey) -> str:
    """Add the key; returns its secret, which is nowhere else. ConflictError for a used id."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    with database.writing() as connection:
        columns = {"secret_hash": hash_of(secret), "tenant": key.tenant}
        if not rows.add(connection, api_keys, key, "key", {"id": key.id}, **columns):
            raise ConflictError(f"key {key.id!r} has a secret already: make another key")
    return secret


def mint_first(database: Database) -> str | None:
    """The secret of a new admin key when there has never been a key; None otherwise."""
    with database.reading() as connection:
        known = connection.execute(select(func.count()).select_from(api_keys)).scalar_one()
    return None if known else mint(database, ApiKey(name="admin", scopes=[Scope.ADMIN]))


def find(database: Database, secret: str) -> ApiKey | None:
    """The key of a secret, usable or not; None for a secret that was never minted."""
    query = select(api_keys.c.body).where(api_keys.c.secret_hash == hash_of(secret))
    with database.reading() as connection:
        found = rows.read(connection, ApiKey, query)
    return found[0] if found else None


def all_keys(database: Database, tenants: Iterable[str] | None = None) -> list[ApiKey]:
    """Keys in the order they were made, revoked ones included; None = of all tenants."""
    query = select(api_keys.c.body).order_by(api_keys.c.seq)
    if tenants is not None:
        query = query.where(api_keys.c.tenant.in_(list(tenants)))
    with database.reading() as connection:
        return rows.read(connection, ApiKey, query)


def revoke(database: Database, key_id: str) -> ApiKey:
    """End a key for good; the first time stays. NotFoundError for an unknown id."""
    named = {"id": key_id}
    with database.writing() as connection:
        standing = rows.find(connection, api_keys, ApiKey, "key", named)
        if standing.revoked_at is not None:
            return standing
        revoked = standing.model_copy(update={"revoked_at": now()})
        rows.put(connection, api_keys, revoked, named)
    return revoked
