"""`/v1/batches`: many requests as one job, on its way before the reply (`serve.batch_run`)."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from memory import batches, files
from memory.batches import Batch, BatchError, BatchStatus
from memory.errors import NotFoundError
from memory.files import FilePurpose
from serve import batch_run
from serve.api.auth import Caller, Scope, caller_of, requires
from serve.api.errors import FieldError
from serve.api.files import listing
from serve.batch_lines import ENDPOINTS, MAX_FILE_BYTES
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.BATCH)])

TIMES = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchRequest(BaseModel):
    """`POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=100)
    endpoint: str = Field(max_length=100)
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(default=None, max_length=16)


@router.post("/v1/batches")
async def create_batch(body: BatchRequest, request: Request) -> dict[str, Any]:
    """Begin a batch."""
    return batch_object(await asyncio.to_thread(_submitted, request.app.state.services, caller_of(request), body))


def _submitted(services: Services, caller: Caller, body: BatchRequest) -> Batch:
    if body.endpoint not in ENDPOINTS:
        raise FieldError(f"endpoint: expected one of {', '.join(ENDPOINTS)}, got {body.endpoint!r}", "endpoint")
    for key, value in (body.metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise FieldError("metadata: keys have at most 64 characters, values 512", "metadata")
    try:
        stored = files.get(services.ledger.database, body.input_file_id, tenant=caller.tenant)
    except NotFoundError as exc:
        raise FieldError(f"input_file_id: there is no file {body.input_file_id!r}", "input_file_id") from exc
    if stored.purpose is not FilePurpose.BATCH:
        raise FieldError(f"input_file_id: the file's purpose is {stored.purpose.value!r}, not 'batch'", "input_file_id")
    if stored.bytes > MAX_FILE_BYTES:
        raise FieldError(f"input_file_id: larger than {MAX_FILE_BYTES // 1_000_000} MB", "input_file_id")
    batch = Batch(
        tenant=caller.tenant,
        caller=caller.name,
        endpoint=body.endpoint,
        input_file_id=stored.id,
        metadata=body.metadata,
    )
    batch_run.submit(services, batch)
    return batch


@router.get("/v1/batches")
def list_batches(
    request: Request, after: str | None = None, limit: int = Query(default=20, ge=1, le=100)
) -> dict[str, Any]:
    """The caller's batches, newest first."""
    services: Services = request.app.state.services
    found, more = batches.page(services.ledger.database, tenant=caller_of(request).tenant, after=after, limit=limit)
    return listing([batch_object(batch) for batch in found], more)


@router.get("/v1/batches/{batch_id}")
def retrieve_batch(batch_id: str, request: Request) -> dict[str, Any]:
    """One batch, with its counts as they are now."""
    services: Services = request.app.state.services
    return batch_object(batches.get(services.ledger.database, batch_id, tenant=caller_of(request).tenant))


@router.post("/v1/batches/{batch_id}/cancel")
def cancel_batch(batch_id: str, request: Request) -> dict[str, Any]:
    """Ask a batch to stop: the lines that run are finished, no further ones begin. 409 when it is too late."""
    database = request.app.state.services.ledger.database
    tenant = caller_of(request).tenant
    batch = batches.get(database, batch_id, tenant=tenant)
    if batch.status is not BatchStatus.CANCELLED:
        batches.advance(database, batch_id, BatchStatus.CANCELLING)
    return batch_object(batches.get(database, batch_id, tenant=tenant))


def batch_object(batch: Batch) -> dict[str, Any]:
    """OpenAI's `batch`."""
    errors = {"object": "list", "data": [_error(error) for error in batch.errors]} if batch.errors else None
    at = {name: getattr(batch, name) for name in TIMES}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        **{name: int(moment.timestamp()) if moment else None for name, moment in at.items()},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }


def _error(error: BatchError) -> dict[str, Any]:
    return {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
