"""The OpenAPI document: what FastAPI reads off the routes, completed by what it cannot know.

Owns the shapes of successful replies (they are built as plain objects, so these models cost a request nothing;
`tests/serve/test_schema.py` holds replies to them), the errors every route may answer, and the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from evals.night_report import NightReport
from memory.escalations import EscalationFigures
from serve.api.dashboard import RunBody
from serve.api.knowledge import DocumentBody, DocumentInFull, PassageBody
from serve.api.memory_types import (
    ForgottenBody,
    MemoryDetail,
    MemoryHit,
    MemoryImport,
    MemoryIndex,
    MemoryItem,
    MemoryStats,
    Recollection,
)
from serve.diff import GenerationDiff
from serve.dry_run import Estimate
from serve.lineage import Lineage

T = TypeVar("T")
REF = "#/components/schemas/{model}"
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
EVENTS = {"text/event-stream": {"schema": _EVENT}}

ERRORS = {
    400: "The request is malformed, or asks for what is not supported; `param` names the field.",
    401: "No key, or one that is not valid.",
    403: "The key may not be used for this.",
    404: "There is no such model, object or route.",
    409: "It contradicts what is stored: a used id or Idempotency-Key, an illegal change of state.",
    413: "The body is larger than is accepted.",
    429: "The key's limits are used up, or too much is waiting; `Retry-After` says when to come back.",
    500: "A fault of the service; its log has the details.",
    503: "The engine is not ready; `Retry-After` says when to come back.",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether requests would be answered now."""

    status: Literal["ready", "not ready", "draining"]
    engine: str
    replicas: list[dict[str, Any]] = []
    """Of several engines (`engine.url`) each one's `url` and `status`."""
    champion: int
    night: str | None
    index: Literal["ready", "rebuilding", "broken"]
    """Of memory. Requests are answered all the same: recall scans the ledger until it is made again."""


class Page(BaseModel, Generic[T]):
    """A list with a cursor: go on with `after` = the last id."""

    object: Literal["list"]
    data: list[T]
    has_more: bool


class Plain(BaseModel, Generic[T]):
    """A whole list."""

    object: Literal["list"]
    data: list[T]


class Deleted(BaseModel):
    """An object that is gone."""

    id: str
    object: str
    deleted: Literal[True]


class Usage(BaseModel):
    """Tokens over all model calls of a run."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Called(BaseModel):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool that the client runs."""

    id: str
    type: Literal["function"]
    function: Called


class ReplyMessage(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    """The one answer."""

    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """OpenAI's `chat.completion`; ours under `nightschool`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    nightschool: dict[str, Any]


class ModelCard(BaseModel):
    """OpenAI's `model`; the generation behind it under `nightschool`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    nightschool: dict[str, Any]


class Embedding(BaseModel):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: dict[str, int]


class ResponseBody(BaseModel):
    """OpenAI's `response`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    metadata: dict[str, str]
    previous_response_id: str | None
    usage: dict[str, Any] | None


class FileBody(BaseModel):
    """OpenAI's `file`."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str


class RequestCounts(BaseModel):
    """A batch's lines."""

    total: int
    completed: int
    failed: int


class BatchBody(BaseModel):
    """OpenAI's `batch`."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    request_counts: RequestCounts | None = None


class JobBody(BaseModel):
    """OpenAI's `fine_tuning.job`: a night."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    training_file: str
    trained_tokens: int | None
    error: dict[str, Any] | None
    nightschool: dict[str, Any]


class Item(BaseModel):
    """An object of a list that has a kind of its own."""

    object: str


class GenerationBody(BaseModel):
    """A model that was trained, or the base model."""

    object: Literal["generation"]
    number: int
    parent: int | None
    base_model: str
    status: Literal["candidate", "champion", "retired", "rejected"]
    served_by: str
    escalation: EscalationFigures | None = None


class PromotionBody(BaseModel):
    """A switch of what is served."""

    id: str
    from_generation: int
    to_generation: int
    why: str
    by: str


class KeyBody(BaseModel):
    """A key, without its secret unless it was just made."""

    id: str
    object: Literal["api_key"]
    name: str
    tenant: str
    scopes: list[str]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    secret: str | None = None


class Record(BaseModel):
    """A stored record as it is."""

    id: str


REPLIES: dict[tuple[str, str], type[BaseModel]] = {
    ("get", "/healthz"): Health,
    ("get", "/readyz"): Readiness,
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("get", "/v1/models"): Plain[ModelCard],
    ("get", "/v1/models/{model}"): ModelCard,
    ("post", "/v1/embeddings"): Embeddings,
    ("post", "/v1/responses"): ResponseBody,
    ("get", "/v1/responses/{response_id}"): ResponseBody,
    ("delete", "/v1/responses/{response_id}"): Deleted,
    ("get", "/v1/responses/{response_id}/input_items"): Page[dict[str, Any]],
    ("post", "/v1/files"): FileBody,
    ("get", "/v1/files"): Page[FileBody],
    ("get", "/v1/files/{file_id}"): FileBody,
    ("delete", "/v1/files/{file_id}"): Deleted,
    ("post", "/v1/batches"): BatchBody,
    ("get", "/v1/batches"): Page[BatchBody],
    ("get", "/v1/batches/{batch_id}"): BatchBody,
    ("post", "/v1/batches/{batch_id}/cancel"): BatchBody,
    ("post", "/v1/fine_tuning/jobs"): JobBody,
    ("post", "/v1/fine_tuning/jobs/estimate"): Estimate,
    ("get", "/v1/fine_tuning/jobs"): Page[JobBody],
    ("get", "/v1/fine_tuning/jobs/{job_id}"): JobBody,
    ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"): JobBody,
    ("get", "/v1/fine_tuning/jobs/{job_id}/events"): Page[Item],
    ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Page[Item],
    ("get", "/v1/nights/{night_id}/report"): NightReport,
    ("get", "/v1/runs"): Plain[RunBody],
    ("get", "/v1/generations"): Plain[GenerationBody],
    ("post", "/v1/generations/{number}/promote"): PromotionBody,
    ("post", "/v1/generations/rollback"): PromotionBody,
    ("get", "/v1/watch"): Plain[Item],
    ("get", "/v1/generations/{number}/diff/{other}"): GenerationDiff,
    ("get", "/v1/lineage/{record_id}"): Lineage,
    ("get", "/v1/evaluations"): Page[Record],
    ("post", "/v1/evaluations"): Plain[Record],
    ("get", "/v1/feedback"): Page[Record],
    ("post", "/v1/keys"): KeyBody,
    ("get", "/v1/keys"): Page[KeyBody],
    ("delete", "/v1/keys/{key_id}"): KeyBody,
    ("post", "/v1/feedback"): Record,
    ("post", "/v1/feedback/{feedback_id}/trust"): Record,
    ("get", "/v1/memory/items"): Page[MemoryItem],
    ("post", "/v1/memory/items"): MemoryItem,
    ("get", "/v1/memory/items/{item_id}"): MemoryDetail,
    ("post", "/v1/memory/items/{item_id}"): MemoryItem,
    ("post", "/v1/memory/items/{item_id}/pin"): MemoryItem,
    ("post", "/v1/memory/items/{item_id}/unpin"): MemoryItem,
    ("post", "/v1/memory/items/{item_id}/retire"): MemoryItem,
    ("post", "/v1/memory/items/{item_id}/restore"): MemoryItem,
    ("post", "/v1/memory/search"): Page[MemoryHit],
    ("post", "/v1/memory/import"): MemoryImport,
    ("get", "/v1/memory/stats"): MemoryStats,
    ("get", "/v1/memory/recalled/{run_id}"): Recollection,
    ("post", "/v1/memory/reindex"): MemoryIndex,
    ("post", "/v1/memory/forget"): ForgottenBody,
    ("post", "/v1/knowledge/documents"): DocumentBody,
    ("get", "/v1/knowledge/documents"): Page[DocumentBody],
    ("get", "/v1/knowledge/documents/{document_id}"): DocumentInFull,
    ("delete", "/v1/knowledge/documents/{document_id}"): Deleted,
    ("post", "/v1/knowledge/search"): Plain[PassageBody],
}
"""The body of a 200, where FastAPI's own reading says only "any JSON"."""

_ASKED = [{"role": "user", "content": "What is 17 * 3?"}]
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/chat/completions"): {
        "the agent": {"model": "nightschool", "messages": _ASKED},
        "the plain model, streamed": {"model": "champion", "messages": _ASKED, "stream": True},
        "a scored task": {"model": "nightschool", "messages": _ASKED, "nightschool": {"reference": "51"}},
    },
    ("post", "/v1/responses"): {
        "a text": {"model": "nightschool", "input": "What is 17 * 3?"},
        "streamed": {"model": "nightschool", "input": "What is 17 * 3?", "stream": True},
    },
    ("post", "/v1/embeddings"): {"two texts": {"model": "embedder", "input": ["one", "two"]}},
    ("post", "/v1/fine_tuning/jobs"): {"a night now": {"model": "nightschool"}},
    ("post", "/v1/memory/items"): {"a rule": {"text": "Check the sum backwards before you answer."}},
    ("post", "/v1/memory/search"): {"what is near": {"query": "adding up numbers"}},
    ("post", "/v1/knowledge/search"): {"what documents say": {"query": "how long a guarantee lasts"}},
    ("post", "/v1/keys"): {"a key for a client": {"name": "ada", "scopes": ["chat", "feedback"], "expires_in": "30d"}},
}
"""Requests that are answered with 200."""

PAGES = {("get", "/v1/nights/{night_id}/report")}
TEXTS = {("get", "/metrics")}
LINES = {("get", "/v1/memory/export")}
OCTETS = {("get", "/v1/files/{file_id}/content")}
STREAMS = {("post", "/v1/chat/completions"), ("post", "/v1/responses")}


def install(app: FastAPI) -> None:
    """Let the app serve the completed document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(generate())
        return app.openapi_schema

    app.openapi = openapi


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The document with replies, errors and the key; changed in place."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    models = {*REPLIES.values(), Error}
    references, described = models_json_schema([(model, "serialization") for model in models], ref_template=REF)
    schemas |= described.get("$defs", {})
    reference = {model: schema for (model, _), schema in references.items()}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    refusal = {"application/json": {"schema": reference[Error]}}
    for method, path, operation in _operations(document):
        replies = operation["responses"]
        replies.pop("422", None)  # a body that does not fit is a 400 in OpenAI's shape
        if (method, path) in REPLIES:
            replies["200"]["content"] = {"application/json": {"schema": reference[REPLIES[method, path]]}}
        if (method, path) in PAGES:
            replies["200"]["content"] |= {"text/html": {"schema": {"type": "string"}}}
        if (method, path) in TEXTS:
            replies["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
            replies |= {code: {"description": ERRORS[int(code)], "content": refusal} for code in ("401", "403")}
        if (method, path) in LINES:
            replies["200"]["content"] = {"application/x-ndjson": {"schema": {"type": "string"}}}
        if (method, path) in OCTETS:
            replies["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string"}}}
        if (method, path) in EXAMPLES:
            named = {name: {"value": value} for name, value in EXAMPLES[method, path].items()}
            operation["requestBody"]["content"]["application/json"]["examples"] = named
        if (method, path) in STREAMS:
            replies["200"]["content"] |= EVENTS
        if path.startswith("/v1/"):
            operation["security"] = [{"key": []}]
            for status, meaning in ERRORS.items():
                replies[str(status)] = {"description": meaning, "content": refusal}
        elif path == "/readyz":
            replies["503"] = {**replies["200"], "description": "Not ready, and why"}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation
