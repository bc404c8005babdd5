"""Who calls: the key of a request, its tenant, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastapi import Depends, Request

from memory.records import DEFAULT_TENANT


class Scope(StrEnum):
    """What a key may be used for. `admin` includes all."""

    CHAT = "chat"
    BATCH = "batch"
    FEEDBACK = "feedback"
    MEMORY = "memory"
    OPERATE = "operate"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """The key behind a request: `name` signs feedback, `tenant` owns everything the request makes or reads."""

    key_id: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    operator: bool = False
    """The command line on the service's own machine: feedback by it is trusted."""


ANYBODY = Caller(key_id="none", name="anonymous", tenant=DEFAULT_TENANT, scopes=frozenset(Scope))
"""The caller of a service without keys."""


def caller_of(request: Request) -> Caller:
    """Who made this request."""
    return getattr(request.state, "caller", ANYBODY)


def requires(scope: Scope) -> Any:
    """A route's dependency: the caller's key must carry the scope."""

    def check(request: Request) -> None:
        caller_of(request)

    return Depends(check)
