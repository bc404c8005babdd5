"""`/v1/files`: uploads, on disk and in the ledger before the reply, and what batches wrote."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from memory import files
from memory.files import Draft, FilePurpose, StoredFile
from memory.records import now
from serve.api.auth import Scope, caller_of, requires
from serve.api.errors import FieldError
from serve.api.upload import Form, read_form
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.BATCH)])

MAX_FILENAME = 255
UPLOADABLE = [p for p in FilePurpose if p is not FilePurpose.BATCH_OUTPUT]
EXPIRY_S = (3600, 2_592_000)
"""OpenAI's bounds of `expires_after[seconds]`."""

UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [p.value for p in UPLOADABLE]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": EXPIRY_S[0],
                            "maximum": EXPIRY_S[1],
                        },
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""What the upload's OpenAPI document says: FastAPI cannot tell, since the form is read by hand."""


@router.post("/v1/files", openapi_extra=UPLOAD_FORM)
async def create_file(request: Request) -> dict[str, Any]:
    """Store an upload."""
    services: Services = request.app.state.services
    draft = await asyncio.to_thread(Draft, services.settings.files_dir, files.new_file_id())
    try:
        form = await read_form(request, draft)
        purpose, seconds = _purpose(form), _seconds(form)
        stored = await asyncio.to_thread(
            files.add,
            services.ledger.database,
            draft,
            tenant=caller_of(request).tenant,
            purpose=purpose,
            filename=_filename(form),
            expires_at=now() + timedelta(seconds=seconds) if seconds else None,
        )
    finally:
        draft.discard()
    return file_object(stored)


def _filename(form: Form) -> str:
    if form.filename is None:
        raise FieldError("file: missing from the form", "file")
    return "".join(c if c.isprintable() else "_" for c in form.filename)[:MAX_FILENAME]


def _purpose(form: Form) -> FilePurpose:
    unknown = form.fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    for name in sorted(unknown):
        raise FieldError(f"{name[:100]}: this field is not supported", name[:100])
    said = form.fields.get("purpose")
    if said not in UPLOADABLE:
        raise FieldError(f"purpose: expected one of {', '.join(UPLOADABLE)}, got {str(said)[:100]!r}", "purpose")
    return FilePurpose(said)


def _seconds(form: Form) -> int | None:
    anchor, said = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and said is None:
        return None
    if anchor != "created_at":
        raise FieldError("expires_after[anchor]: expected 'created_at'", "expires_after[anchor]")
    low, high = EXPIRY_S
    if said is None or not said.isascii() or not said.isdecimal() or len(said) > 9 or not low <= int(said) <= high:
        raise FieldError(f"expires_after[seconds]: expected {low} to {high}", "expires_after[seconds]")
    return int(said)


@router.get("/v1/files")
def list_files(
    request: Request,
    purpose: FilePurpose | None = None,
    after: str | None = None,
    limit: int = Query(default=10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The caller's files."""
    services: Services = request.app.state.services
    found, more = files.page(
        services.ledger.database,
        tenant=caller_of(request).tenant,
        purpose=purpose,
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )
    return listing([file_object(stored) for stored in found], more)


@router.get("/v1/files/{file_id}")
def retrieve_file(file_id: str, request: Request) -> dict[str, Any]:
    """One file."""
    return file_object(_stored(file_id, request))


@router.get("/v1/files/{file_id}/content")
def file_content(file_id: str, request: Request) -> StreamingResponse:
    """The bytes."""
    services: Services = request.app.state.services
    stored = _stored(file_id, request)
    headers = {
        "Content-Length": str(stored.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
    }
    chunks = files.read_chunks(services.settings.files_dir, stored)
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, request: Request) -> dict[str, Any]:
    """Delete a file. A batch that has taken it in goes on."""
    services: Services = request.app.state.services
    folder = services.settings.files_dir
    files.remove(services.ledger.database, folder, file_id, tenant=caller_of(request).tenant)
    return {"id": file_id, "object": "file", "deleted": True}


def _stored(file_id: str, request: Request) -> StoredFile:
    services: Services = request.app.state.services
    return files.get(services.ledger.database, file_id, tenant=caller_of(request).tenant)


def file_object(stored: StoredFile) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": int(stored.created_at.timestamp()),
        "expires_at": int(stored.expires_at.timestamp()) if stored.expires_at else None,
        "filename": stored.filename,
        "purpose": stored.purpose.value,
        "status": stored.status.value,
        "status_details": None,
    }


def listing(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """OpenAI's page of objects."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
