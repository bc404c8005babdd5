"""Who calls: the key of a request, its tenant, and what it may do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, Request

from memory import keys
from memory.database import Database
from memory.errors import NightschoolError
from memory.keys import ApiKey, Scope, hash_of
from memory.records import DEFAULT_TENANT, now

__all__ = ["ANYBODY", "OPERATOR", "Caller", "Keyring", "Scope", "caller_of", "key_of", "requires", "signature"]

CACHE_S = 5.0
"""A key that is revoked behind the service's back (`nightschool keys revoke`) works this much longer at most."""

OPERATOR = "operator"
"""Signature of the command line on the service's own machine: a night trusts it without corroboration."""

ANONYMOUS = "anonymous"


class InvalidKeyError(NightschoolError):
    """The request carries no key, or one that is not valid (any more)."""


class InsufficientScopeError(NightschoolError):
    """The key may not be used for this."""


@dataclass(frozen=True)
class Caller:
    """The key behind a request: `name` signs feedback, `tenant` owns everything the request makes or reads."""

    key_id: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    operator: bool = False
    """The command line on the service's own machine: feedback by it is trusted."""
    requests_per_minute: int | None = None
    max_concurrent: int | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the key may be used for this."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


ANYBODY = Caller(key_id="none", name=ANONYMOUS, tenant=DEFAULT_TENANT, scopes=frozenset(Scope))
"""The caller of a service without keys."""

THE_OPERATOR = Caller(key_id=OPERATOR, name=OPERATOR, tenant=DEFAULT_TENANT, scopes=frozenset(Scope), operator=True)


def caller_of(request: Request) -> Caller:
    """Who made this request."""
    return getattr(request.state, "caller", ANYBODY)


def requires(scope: Scope) -> Any:
    """A route's dependency: the caller's key must carry the scope, or InsufficientScopeError (403)."""

    async def check(request: Request) -> None:
        caller = caller_of(request)
        if not caller.may(scope):
            raise InsufficientScopeError(f"the key {caller.name!r} has no scope {scope.value!r}, which this needs")

    return Depends(check)


def signature(caller: Caller, claimed: str | None) -> str:
    """Who a word is by: the key, and behind it the author that its holder names.

    Without keys it is whoever is claimed. The operator may pass on somebody else's word, unlike one's own not trusted.
    """
    if caller is ANYBODY or caller.operator:
        return claimed or caller.name
    return f"{caller.name}/{claimed}" if claimed else caller.name


def key_of(name: str) -> str | None:
    """The key that signs with this name; None for the operator and where there are no keys."""
    return None if name in (OPERATOR, ANONYMOUS) else name


class Keyring:
    """Callers by secret, looked up by hash in the ledger and remembered for `CACHE_S` seconds.

    `operator_token` opens everything; it is new at every start. Without `keys_on` everybody else is ANYBODY.
    Belongs to one event loop.
    """

    def __init__(self, database: Database, operator_token: str | None = None, *, keys_on: bool = True) -> None:
        self._database = database
        self._keys_on = keys_on
        self._operator = hash_of(operator_token) if operator_token else None
        self._known: dict[str, tuple[float, ApiKey]] = {}
        self._changes = 0

    async def caller(self, authorization: str | None) -> Caller:
        """Whose `Authorization` header this is. InvalidKeyError unless it is a valid `Bearer` key."""
        kind, _, secret = (authorization or "").partition(" ")
        secret = secret.strip() if kind.lower() == "bearer" else ""
        hashed = hash_of(secret)
        if secret and hashed == self._operator:
            return THE_OPERATOR
        if not self._keys_on:
            return ANYBODY
        if not secret:
            raise InvalidKeyError("no API key was given: send it as 'Authorization: Bearer sk-ns-…'")
        key = self._remembered(hashed) or await self._look_up(secret, hashed)
        if key is None:
            raise InvalidKeyError("this API key is not known here")
        if not key.usable(now()):
            what = "was revoked" if key.revoked_at else "has expired"
            raise InvalidKeyError(f"this API key {what}")
        return Caller(
            key_id=key.id,
            name=f"{'app' if key.vouches else 'key'}:{key.name}",
            tenant=key.tenant,
            scopes=frozenset(key.scopes),
            requests_per_minute=key.requests_per_minute,
            max_concurrent=key.max_concurrent,
        )

    async def change(self, act: Callable[[], Any]) -> Any:
        """Change stored keys; what was remembered of them is forgotten before this returns."""
        try:
            return await asyncio.to_thread(act)
        finally:
            self._changes += 1
            self._known.clear()

    def _remembered(self, hashed: str) -> ApiKey | None:
        until, key = self._known.get(hashed, (0.0, None))
        return key if time.monotonic() < until else None

    async def _look_up(self, secret: str, hashed: str) -> ApiKey | None:
        changes = self._changes
        key = await asyncio.to_thread(keys.find, self._database, secret)
        # A change that came between the look and this line may have revoked just this key.
        if key is not None and changes == self._changes:
            self._known[hashed] = (time.monotonic() + CACHE_S, key)
        return key
