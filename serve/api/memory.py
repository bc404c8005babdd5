"""`/v1/memory`: a tenant's principles and past runs, looked at, searched and changed by hand; out, in, and forgotten.

Everything is the caller's tenant's. `nightschool memory` does the same on the service's machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from memory import exchange, recalls, shelf, stats
from memory.database import Database
from memory.errors import ConflictError, NightschoolError
from memory.forget import Forgotten, forget
from memory.index import drain, rebuild
from memory.items import Item, kind_of
from memory.records import (
    DEFAULT_TENANT,
    DEFAULT_WORKLOAD,
    MemoryKind,
    MemoryStatus,
    Principle,
    PrincipleKind,
)
from memory.search import Hit, by_index, search
from memory.uplift import Exposure, Uplift, uplift
from serve.api.auth import Scope, caller_of, requires
from serve.api.errors import FieldError
from serve.api.files import listing
from serve.api.openai_types import RESPONSE_PREFIX
from serve.api.response_types import RESPONSE_ID, run_id_of
from serve.wiring import Services

log = logging.getLogger(__name__)
router = APIRouter(dependencies=[requires(Scope.MEMORY)])

LONGEST = 4000
"""Characters of a principle: it has to fit a prompt."""

LINES = "application/x-ndjson"
LINES_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {LINES: {"schema": {"type": "string"}}}},
}
"""What the import's OpenAPI document says: its body is no JSON, but lines of it."""

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST)]
Why = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


class NewPrinciple(BaseModel):
    """`POST /v1/memory/items`."""

    model_config = ConfigDict(extra="forbid")

    text: Words
    kind: PrincipleKind = PrincipleKind.GUIDING
    workload: Annotated[str, StringConstraints(min_length=1, max_length=200)] = DEFAULT_WORKLOAD
    pinned: bool = False


class Rewording(BaseModel):
    """`POST /v1/memory/items/{item_id}`."""

    model_config = ConfigDict(extra="forbid")

    text: Words
    why: Why = "by hand"


class Reason(BaseModel):
    """`POST /v1/memory/items/{item_id}/retire`, `…/restore`, `…/pin`, `…/unpin`."""

    model_config = ConfigDict(extra="forbid")

    why: Why = "by hand"


class SearchRequest(BaseModel):
    """`POST /v1/memory/search`."""

    model_config = ConfigDict(extra="forbid")

    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]
    type: MemoryKind | None = None
    workload: str | None = None
    limit: int = Field(default=10, ge=1, le=100)


class ReindexRequest(BaseModel):
    """`POST /v1/memory/reindex`."""

    model_config = ConfigDict(extra="forbid")

    anew: bool = True


class ForgetRequest(BaseModel):
    """`POST /v1/memory/forget`; the tenant is named so that nobody forgets everything by an empty body."""

    model_config = ConfigDict(extra="forbid")

    tenant: str
    user: Annotated[str, StringConstraints(min_length=1)] | None = None


@router.get("/v1/memory/items")
def list_items(
    request: Request,
    type: MemoryKind | None = None,
    status: MemoryStatus | None = None,
    workload: str | None = None,
    after: str | None = None,
    limit: int = Query(default=100, ge=1, le=1000),
) -> dict[str, Any]:
    """Items in the order they were added, those that retired or were merged included."""
    found = shelf.page(
        _services(request).ledger.database,
        tenant=caller_of(request).tenant,
        kind=type,
        status=status,
        workload=workload,
        after=after,
        limit=limit + 1,
    )
    return listing([item_object(item) for item in found[:limit]], len(found) > limit)


@router.post("/v1/memory/items")
def add_principle(body: NewPrinciple, request: Request) -> dict[str, Any]:
    """Write a principle by hand; it can be recalled at once."""
    services = _services(request)
    principle = Principle(tenant=caller_of(request).tenant, **body.model_dump())
    services.ledger.add_principle(principle)
    _follow(services)
    return item_object(principle)


@router.get("/v1/memory/items/{item_id}")
def retrieve_item(item_id: str, request: Request) -> dict[str, Any]:
    """One item with its judged runs, its uplift and its history."""
    return item_in_full(_services(request).ledger.database, item_id, caller_of(request).tenant)


@router.post("/v1/memory/items/{item_id}")
def edit_item(item_id: str, body: Rewording, request: Request) -> dict[str, Any]:
    """Give a principle other words; its evidence stays."""
    services = _services(request)
    database, why = services.ledger.database, _signed(request, body.why)
    changed = shelf.reword(database, item_id, body.text, why, tenant=caller_of(request).tenant)
    _follow(services)
    return item_object(changed)


@router.post("/v1/memory/items/{item_id}/pin")
def pin_item(item_id: str, body: Reason, request: Request) -> dict[str, Any]:
    """Keep an item, whatever its score and uplift come to."""
    return _pinned(item_id, True, body, request)


@router.post("/v1/memory/items/{item_id}/unpin")
def unpin_item(item_id: str, body: Reason, request: Request) -> dict[str, Any]:
    """Let an item's figures decide again."""
    return _pinned(item_id, False, body, request)


@router.post("/v1/memory/items/{item_id}/retire")
def retire_item(item_id: str, body: Reason, request: Request) -> dict[str, Any]:
    """Recall an item no more."""
    return _moved(item_id, MemoryStatus.RETIRED, body, request)


@router.post("/v1/memory/items/{item_id}/restore")
def restore_item(item_id: str, body: Reason, request: Request) -> dict[str, Any]:
    """Recall a retired or internalised item again."""
    return _moved(item_id, MemoryStatus.ACTIVE, body, request)


@router.post("/v1/memory/search")
def search_items(body: SearchRequest, request: Request) -> dict[str, Any]:
    """The recallable items nearest to a text, nearest first."""
    services = _services(request)
    hits = search(
        services.ledger,
        by_index(services.ledger, services.index),
        body.query,
        tenant=caller_of(request).tenant,
        kind=body.type,
        workload=body.workload,
        limit=body.limit,
    )
    return listing([hit_object(hit) for hit in hits], False)


@router.get("/v1/memory/export")
def export_items(request: Request, workload: str | None = None) -> StreamingResponse:
    """The memory of the tenant, all or a workload's, as JSON lines, which import takes again."""
    database, tenant = _services(request).ledger.database, caller_of(request).tenant
    lines = exchange.export_lines(database, tenant=tenant, workload=workload)
    # The first page is read before the reply begins, so that a refusal still is one.
    first = next(lines, None)
    return StreamingResponse(_ended([] if first is None else [first], lines), media_type=LINES)


@router.post("/v1/memory/import", openapi_extra=LINES_BODY)
async def import_items(request: Request) -> dict[str, Any]:
    """Add exported lines, all or none; items that are here already stay as they are."""
    services, tenant = _services(request), caller_of(request).tenant
    try:
        # Not `splitlines`: JSON may hold other line ends than this one as they are.
        lines = (await request.body()).decode().split("\n")
    except UnicodeDecodeError as exc:
        raise FieldError(f"the body is no UTF-8: {exc.reason} at byte {exc.start}", "body") from exc

    def store() -> exchange.Imported:
        done = exchange.import_lines(services.ledger.database, lines, tenant=tenant)
        _follow(services)
        return done

    done = await asyncio.to_thread(store)
    return {"object": "memory.import", "added": done.added, "known": done.known}


@router.get("/v1/memory/stats")
def memory_stats(request: Request, workload: str | None = None) -> dict[str, Any]:
    """What there is, what each item is worth, and what prompts cost from generation to generation."""
    services = _services(request)
    figures = stats_object(services.ledger.database, caller_of(request).tenant, workload)
    return figures | {"index": services.index.state.split(":")[0]}


@router.get("/v1/memory/recalled/{run_id}")
def recalled_in(run_id: str, request: Request) -> dict[str, Any]:
    """What memory put into a run's prompt, or withheld from it: why each item, at what cost, and whether it helped."""
    return recollection_object(_services(request).ledger.database, run_id, caller_of(request).tenant)


@router.post("/v1/memory/reindex", dependencies=[requires(Scope.OPERATE)])
def reindex(body: ReindexRequest, request: Request) -> dict[str, Any]:
    """Make the index of all tenants anew, or let it follow what was changed; the old one answers meanwhile."""
    services = _services(request)
    if not services.index.rebuilding.acquire(blocking=False):
        raise ConflictError("the index is being made anew already: wait for it")
    try:
        done = (rebuild if body.anew else drain)(services.ledger, services.index)
    finally:
        services.index.rebuilding.release()
    return {"object": "memory.index", "state": services.index.state.split(":")[0], "items": done}


@router.post("/v1/memory/forget", dependencies=[requires(Scope.ADMIN)])
def forget_data(body: ForgetRequest, request: Request) -> dict[str, Any]:
    """Delete all of a tenant's data, or of a user's in it, everywhere; says which generations had learned from it.

    An admin of the default tenant may do so for all tenants, one of another tenant for its own.
    """
    services, caller = _services(request), caller_of(request)
    if caller.tenant not in (DEFAULT_TENANT, body.tenant):
        raise FieldError(f"tenant: an admin of {caller.tenant!r} forgets that tenant's data only", "tenant")
    data_dir, database = services.settings.data_dir, services.ledger.database
    done = forget(database, data_dir, tenant=body.tenant, user=body.user, by=caller.name)
    try:
        rebuild(services.ledger, services.index)
    except NightschoolError as exc:
        # What is forgotten is out of the ledger, and with it out of every answer; the index is made anew for itself.
        log.warning("after forgetting, the index could not be made anew: %s", exc)
        services.index.wake()
    return forgotten_object(done)


def item_object(item: Item) -> dict[str, Any]:
    """An item as JSON; `kind` of a principle says whether it guides or warns."""
    dumped = item.model_dump(mode="json", exclude={"schema_version"})
    return {"object": "memory.item", "type": kind_of(item).value, **dumped, "text": _text(item), "score": item.score}


def hit_object(hit: Hit) -> dict[str, Any]:
    """An item that was searched for."""
    return item_object(hit.item) | {"similarity": hit.similarity}


def item_in_full(database: Database, item_id: str, tenant: str) -> dict[str, Any]:
    """An item with what is known of it. NotFoundError."""
    item = shelf.get(database, item_id, tenant=tenant)
    exposure = shelf.exposure(database, item_id, tenant=tenant)
    changes = shelf.history(database, item_id, tenant=tenant)
    history = [{"change": change.op, "why": change.why, "at": change.at} for change in changes]
    return item_object(item) | worth_object(exposure, uplift(exposure)) | {"history": history}


def worth_object(exposure: Exposure, measured: Uplift | None) -> dict[str, Any]:
    """Judged runs with and without an item, and the difference with its interval."""
    return {
        "shown": {"runs": exposure.shown.n, "successes": exposure.shown.successes},
        "withheld": {"runs": exposure.withheld.n, "successes": exposure.withheld.successes},
        "uplift": None if measured is None else {"value": measured.value, "low": measured.low, "high": measured.high},
    }


def stats_object(database: Database, tenant: str, workload: str | None) -> dict[str, Any]:
    """A tenant's figures as JSON, of all its workloads or of one."""
    counts = stats.counts(database, tenant=tenant, workload=workload)
    return {
        "object": "memory.stats",
        "counts": [{"type": k.value, "status": s.value, "items": n} for (k, s), n in sorted(counts.items())],
        "worths": [
            {"id": w.item.id, "type": kind_of(w.item).value, "text": _text(w.item), "status": w.item.status.value}
            | worth_object(w.exposure, w.uplift)
            for w in stats.worths(database, tenant=tenant, workload=workload)
        ],
        "prompts": [
            {
                "generation": cost.generation,
                "runs": cost.runs,
                "prompt_tokens": cost.prompt_tokens,
                "recalled": cost.recalled,
            }
            for cost in stats.prompt_costs(database, tenant=tenant, workload=workload)
        ],
    }


def recollection_object(database: Database, run_id: str, tenant: str) -> dict[str, Any]:
    """A run (by its id or its reply's) and its recalled items as JSON. NotFoundError."""
    name = run_id_of(run_id) if run_id.startswith(RESPONSE_ID) else run_id.removeprefix(RESPONSE_PREFIX)
    run, found = recalls.of_run(database, name, tenant=tenant)
    steps = [step.prompt_tokens for step in run.steps[run.inherited_steps :]]
    return {
        "object": "memory.recollection",
        "id": run.id,
        "generation": run.generation,
        "score": run.outcome.score if run.outcome else None,
        "prompt_tokens": None if None in steps else sum(step or 0 for step in steps),
        "recalled": [
            each.recalled.model_dump(mode="json", exclude={"schema_version"})
            | {
                "text": None if each.item is None else _text(each.item),
                "status": None if each.item is None else each.item.status.value,
                "success": each.success,
                "helps": each.helps,
                "worth": worth_object(each.exposure, each.uplift),
            }
            for each in found
        ],
    }


def forgotten_object(done: Forgotten) -> dict[str, Any]:
    """The tombstone as JSON."""
    return {"object": "memory.forgotten", **done.model_dump(mode="json", exclude={"schema_version"})}


def _text(item: Item) -> str:
    return item.text if isinstance(item, Principle) else item.question


def _pinned(item_id: str, pinned: bool, body: Reason, request: Request) -> dict[str, Any]:
    database, why = _services(request).ledger.database, _signed(request, body.why)
    return item_object(shelf.set_pinned(database, item_id, pinned, why, tenant=caller_of(request).tenant))


def _moved(item_id: str, status: MemoryStatus, body: Reason, request: Request) -> dict[str, Any]:
    services = _services(request)
    database, why = services.ledger.database, _signed(request, body.why)
    moved = shelf.set_status(database, item_id, status, why, tenant=caller_of(request).tenant)
    _follow(services)
    return item_object(moved)


def _signed(request: Request, why: str) -> str:
    return f"{caller_of(request).name}: {why}"


def _follow(services: Services) -> None:
    """Let the index follow what was just changed. When it cannot, its keeper sees to it."""
    try:
        drain(services.ledger, services.index)
    except NightschoolError as exc:
        log.warning("the index does not follow yet: %s", exc)
        services.index.wake()


def _ended(first: Iterable[str], rest: Iterator[str]) -> Iterator[str]:
    for part in (first, rest):
        for line in part:
            yield line + "\n"


def _services(request: Request) -> Services:
    return request.app.state.services
