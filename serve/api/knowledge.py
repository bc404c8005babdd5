"""`/v1/knowledge`: documents that the agent's `search_knowledge` reads, brought in, looked at, searched and removed.

Everything is the caller's tenant's. `nightschool knowledge` does the same on the service's machine.
"""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from memory import documents
from memory.documents import Chunk, Document
from memory.errors import ConfigError, NightschoolError
from memory.index import drain
from memory.library import Documents, Passage
from memory.search import by_index
from serve.api.auth import Scope, caller_of, requires
from serve.api.errors import FieldError
from serve.api.files import listing
from serve.api.upload import Form, read_form
from serve.wiring import Services

log = logging.getLogger(__name__)
router = APIRouter(dependencies=[requires(Scope.MEMORY)])

AT_ONCE = 2
"""Documents read at the same time: the threads that wait are the ones that recall needs."""

LONGEST_FIELD = 1000
FIELDS = ("source", "workload", "user")

DOCUMENT_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **{name: {"type": "string", "maxLength": LONGEST_FIELD} for name in FIELDS},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""What the OpenAPI document says of the form, which is read by hand."""


class KnowledgeSearch(BaseModel):
    """`POST /v1/knowledge/search`."""

    model_config = ConfigDict(extra="forbid")

    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]
    workload: str | None = None
    limit: int = Field(default=10, ge=1, le=100)


class DocumentBody(BaseModel):
    """A document; `outcome` says what bringing it in came to, `chunks` is their number."""

    id: str
    object: Literal["knowledge.document"]
    tenant: str
    source: str
    workload: str | None
    form: Literal["text", "markdown", "html", "pdf", "jsonl"]
    title: str | None
    sha256: str
    bytes: int
    chunks: int
    added_by: str
    user: str | None
    created_at: str
    updated_at: str
    outcome: Literal["added", "replaced", "unchanged"] | None = None


class PassageBody(BaseModel):
    """A stretch of a document and its place in it; `similarity` is None where only the words led to it."""

    id: str
    object: Literal["knowledge.passage"]
    document_id: str
    source: str
    title: str | None
    workload: str | None
    n: int
    text: str
    place: str
    page: int | None
    heading: str | None
    first_line: int | None
    last_line: int | None
    similarity: float | None = None


class DocumentInFull(DocumentBody):
    """A document with what was read of it."""

    passages: list[PassageBody]


@router.post("/v1/knowledge/documents", openapi_extra=DOCUMENT_FORM)
async def add_document(request: Request) -> dict[str, Any]:
    """Bring a document in, in the place of the one of the same source; the same content again changes nothing."""
    services, caller = _services(request), caller_of(request)
    held = io.BytesIO()
    form = await read_form(request, held)
    name, given = _named(form), _given(form)

    def bring() -> dict[str, Any]:
        try:
            document, fate = documents.bring(
                services.ledger.database,
                held.getvalue(),
                services.settings.knowledge,
                name=name,
                tenant=caller.tenant,
                source=given.get("source") or name,
                by=caller.name,
                workload=given.get("workload"),
                user=given.get("user"),
            )
        except ConfigError as exc:
            raise FieldError(f"file: {exc}", "file") from exc
        _follow(services)
        return document_object(document) | {"outcome": fate.value}

    async with _turn(request):
        return await asyncio.to_thread(bring)


@router.get("/v1/knowledge/documents")
def list_documents(
    request: Request, after: str | None = None, limit: int = Query(default=100, ge=1, le=1000)
) -> dict[str, Any]:
    """Documents in the order they were first added."""
    database, tenant = _services(request).ledger.database, caller_of(request).tenant
    found, more = documents.page(database, tenant=tenant, after=after, limit=limit)
    return listing([document_object(document) for document in found], more)


@router.get("/v1/knowledge/documents/{document_id}")
def retrieve_document(document_id: str, request: Request) -> dict[str, Any]:
    """One document with all of its passages."""
    database, tenant = _services(request).ledger.database, caller_of(request).tenant
    return document_in_full(documents.get(database, document_id, tenant=tenant), database)


@router.delete("/v1/knowledge/documents/{document_id}")
def remove_document(document_id: str, request: Request) -> dict[str, Any]:
    """Delete a document; no search finds it any more."""
    services = _services(request)
    documents.remove(services.ledger.database, document_id, tenant=caller_of(request).tenant)
    _follow(services)
    return {"id": document_id, "object": "knowledge.document", "deleted": True}


@router.post("/v1/knowledge/search")
def search_documents(body: KnowledgeSearch, request: Request) -> dict[str, Any]:
    """The passages that say most about a question, best first."""
    services = _services(request)
    library = Documents(
        services.ledger.database, by_index(services.ledger, services.index), services.settings.knowledge
    )
    found = library.search(body.query, tenant=caller_of(request).tenant, workload=body.workload, limit=body.limit)
    return {"object": "list", "data": [hit_object(passage) for passage in found]}


def document_object(document: Document) -> dict[str, Any]:
    """A document as JSON."""
    return {"object": "knowledge.document", **document.model_dump(mode="json", exclude={"schema_version"})}


def document_in_full(document: Document, database: Any) -> dict[str, Any]:
    """A document with its passages as JSON."""
    chunks = documents.chunks_of(database, document.id, tenant=document.tenant)
    return document_object(document) | {"passages": [passage_object(chunk, document) for chunk in chunks]}


def passage_object(chunk: Chunk, document: Document) -> dict[str, Any]:
    """A passage as JSON."""
    of_document = {"source": document.source, "title": document.title, "workload": document.workload}
    dumped = chunk.model_dump(mode="json", exclude={"schema_version"})
    return {"object": "knowledge.passage", **dumped, **of_document, "place": chunk.place}


def hit_object(passage: Passage) -> dict[str, Any]:
    """A passage that was searched for."""
    return passage_object(passage.chunk, passage.document) | {"similarity": passage.similarity}


def _turn(request: Request) -> asyncio.Semaphore:
    state = request.app.state
    if not hasattr(state, "reading"):
        state.reading = asyncio.Semaphore(AT_ONCE)
    return state.reading


def _named(form: Form) -> str:
    if form.filename is None:
        raise FieldError("file: missing from the form", "file")
    return _printable(form.filename)[:LONGEST_FIELD]


def _given(form: Form) -> dict[str, str]:
    for name, value in form.fields.items():
        if name not in FIELDS:
            raise FieldError(f"{name[:100]}: this field is not supported", name[:100])
        if len(value) > LONGEST_FIELD:
            raise FieldError(f"{name}: longer than {LONGEST_FIELD} characters", name)
    return {name: said for name, value in form.fields.items() if (said := _printable(value).strip())}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in text)


def _follow(services: Services) -> None:
    """Let the index follow what was just changed. When it cannot, its keeper sees to it."""
    try:
        drain(services.ledger, services.index)
    except NightschoolError as exc:
        log.warning("the index does not follow yet: %s", exc)
        services.index.wake()


def _services(request: Request) -> Services:
    return request.app.state.services
