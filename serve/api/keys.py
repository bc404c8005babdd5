"""`/v1/keys`: API keys made, listed and revoked from afar. `nightschool keys` does the same on the service's machine.

An admin key of the default tenant administers all tenants, one of another tenant its own.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime, timedelta
from typing import Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memory import keys
from memory.errors import ConfigError, NotFoundError
from memory.keys import ApiKey, Scope
from memory.records import DEFAULT_TENANT, now
from serve.api.auth import Caller, Keyring, caller_of, requires
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.ADMIN)])
DEFAULT_SCOPES = [Scope.CHAT, Scope.FEEDBACK]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class KeyRequest(BaseModel):
    """`POST /v1/keys`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    tenant: str | None = None
    scopes: list[Scope] = Field(default_factory=lambda: list(DEFAULT_SCOPES), min_length=1)
    expires_in: str | None = None
    requests_per_minute: int | None = None
    max_concurrent: int | None = None
    vouches: bool = False


def new_key(**given: Any) -> ApiKey:
    """An ApiKey of what a person gave. ConfigError that names what is wrong."""
    try:
        return ApiKey.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from exc


def expiry(expires_in: str | None) -> datetime | None:
    """`90s`, `30m`, `12h`, `30d`, `4w` from now as a time. ConfigError for anything else."""
    if expires_in is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", expires_in)
    if found is None:
        raise ConfigError(f"expires_in: expected a time such as 12h, 30d or 4w, got {expires_in!r}")
    return now() + timedelta(seconds=int(found[1]) * _UNITS[found[2]])


def key_object(key: ApiKey, secret: str | None = None) -> dict[str, Any]:
    """A key as JSON; its secret only in the reply that made it."""
    return {"object": "api_key", **key.model_dump(mode="json", exclude={"schema_version"})} | (
        {"secret": secret} if secret else {}
    )


@router.post("/v1/keys")
async def create_key(
    body: KeyRequest, request: Request, idempotency_key: str | None = Header(default=None)
) -> JSONResponse:
    """Make a key; the reply is the only place where its secret is ever seen.

    A retry with the same Idempotency-Key is a ConflictError: a stored reply would be a stored secret.
    """
    caller, keyring = caller_of(request), _keyring(request)
    tenant = body.tenant or caller.tenant
    if not _administers(caller, tenant):
        raise ConfigError(f"tenant: an admin of {caller.tenant!r} makes keys for that tenant only")
    named = hashlib.sha256(f"{caller.tenant}/{idempotency_key}".encode()).hexdigest()[:32] if idempotency_key else None
    key = new_key(
        id=f"key_{named}" if named else None,
        name=body.name,
        tenant=tenant,
        scopes=body.scopes,
        expires_at=expiry(body.expires_in),
        requests_per_minute=body.requests_per_minute,
        max_concurrent=body.max_concurrent,
        vouches=body.vouches,
    )
    secret = await keyring.change(lambda: keys.mint(_services(request).ledger.database, key))
    return JSONResponse(key_object(key, secret), headers={"Cache-Control": "no-store"})


@router.get("/v1/keys")
def list_keys(request: Request) -> dict[str, Any]:
    """Keys in the order they were made, revoked ones included; never a secret."""
    caller = caller_of(request)
    tenants = None if caller.tenant == DEFAULT_TENANT else [caller.tenant]
    found = keys.all_keys(_services(request).ledger.database, tenants)
    return {"object": "list", "data": [key_object(key) for key in found], "has_more": False}


@router.delete("/v1/keys/{key_id}")
async def revoke_key(key_id: str, request: Request) -> dict[str, Any]:
    """End a key, at once."""
    caller, database = caller_of(request), _services(request).ledger.database

    def revoke() -> ApiKey:
        owner = next((key.tenant for key in keys.all_keys(database) if key.id == key_id), None)
        if owner is None or not _administers(caller, owner):
            raise NotFoundError(f"no key {key_id!r} in the ledger")
        return keys.revoke(database, key_id)

    return key_object(await _keyring(request).change(revoke))


def _administers(caller: Caller, tenant: str) -> bool:
    return caller.tenant in (DEFAULT_TENANT, tenant)


def _services(request: Request) -> Services:
    return request.app.state.services


def _keyring(request: Request) -> Keyring:
    return request.app.state.keyring
