"""One line of a batch: what a good one looks like, how it is run, and how its result is written.

Owns the endpoints that a batch may name (`ENDPOINTS`) and the JSON shapes of OpenAI's output and error files.
Owns neither the order of lines nor their storage (`serve.batch_run`, `memory.batches`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.tools import check_tools
from agent.verify import check_verifier
from memory.batches import Batch, BatchError, Line, LineResult, LineStatus, line_key
from memory.errors import (
    EngineError,
    IndexUnavailableError,
    LedgerError,
    ModelUnavailableError,
    NightschoolError,
    NotFoundError,
)
from memory.records import Task, Trajectory
from memory.responses import StoredResponse
from serve.api import openai_types as oai
from serve.api.auth import Caller, key_of
from serve.api.embeddings import EmbeddingRequest, embed
from serve.api.errors import BusyError, FieldError, describe, error_body, invalid_body
from serve.api.feedback import METADATA
from serve.api.response_types import ResponseRequest
from serve.api.responses import line_reply
from serve.api.runs import Turnstile, answer
from serve.wiring import Services

log = logging.getLogger(__name__)

MAX_LINES = 50_000
MAX_FILE_BYTES = 200_000_000
MAX_LINE_BYTES = 8_000_000
MAX_ID = 512
PASSING = (ModelUnavailableError, EngineError, BusyError, LedgerError, IndexUnavailableError)
"""Errors of the service's own parts: the line is as good as before, and waits."""


@dataclass(frozen=True)
class LineCall:
    """A line about to run. `key` names its task and run, the same at every attempt."""

    services: Services
    turnstile: Turnstile
    batch: Batch
    key: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LineReply:
    """An endpoint's reply, and what is to be committed with it."""

    body: dict[str, Any]
    run: tuple[Task, Trajectory] | None = None
    response: StoredResponse | None = None


async def chat_line(call: LineCall) -> LineReply:
    """A chat completion. NightschoolError or pydantic's ValidationError when there is none."""
    request = oai.ChatCompletionRequest.model_validate(call.body)
    _check_line(request.stream, request.metadata)
    given = request.nightschool
    named = given.model_copy(update={"task_id": given.task_id or f"task_{call.key}"})
    request = request.model_copy(update={"nightschool": named})
    task = oai.task_of(request, call.batch.tenant, key_of(call.batch.caller))
    task = task.model_copy(update={"source": "batch"})
    check_tools(task.tools or [])
    check_verifier(task)
    ran: list[tuple[Task, Trajectory]] = []

    async def keep(task: Task, trajectory: Trajectory) -> None:
        ran.append((task, trajectory))

    # No checkpoints: a killed run is cheaper to repeat than 50,000 runs are to save at every step.
    run_id = f"traj_{call.key}"
    trajectory = await answer(call.services, call.turnstile, task, request, run_id, resumable=False, keep=keep)
    return LineReply(oai.completion(trajectory, request.model), ran[0])


async def responses_line(call: LineCall) -> LineReply:
    """A reply of the Responses API, stored with its run."""
    request = ResponseRequest.model_validate(call.body)
    _check_line(request.stream, request.metadata)
    caller = Caller(key_id=call.batch.id, name=call.batch.caller, tenant=call.batch.tenant, scopes=frozenset())
    ran: list[tuple[Task, Trajectory]] = []

    async def keep(task: Task, trajectory: Trajectory) -> None:
        ran.append((task, trajectory))

    reply, stored = await line_reply(call.services, call.turnstile, request, caller, call.key, keep)
    return LineReply(reply, ran[0], stored)


def _check_line(stream: bool | None, metadata: Mapping[str, str] | None) -> None:
    if stream:
        raise FieldError("stream: a batch has no streams; leave it out", "stream")
    if any(key.startswith(METADATA) for key in metadata or {}):
        raise FieldError("metadata: a batch takes no feedback along; send it to /v1/feedback", "metadata")


async def embeddings_line(call: LineCall) -> LineReply:
    """Embeddings; they leave no run."""
    request = EmbeddingRequest.model_validate(call.body)
    async with call.turnstile.enter():
        return LineReply(await embed(call.services, request))


ENDPOINTS: dict[str, Callable[[LineCall], Awaitable[LineReply]]] = {
    "/v1/chat/completions": chat_line,
    "/v1/responses": responses_line,
    "/v1/embeddings": embeddings_line,
}
"""What a batch may be sent to, by path."""


async def run_line(call: LineCall, line: Line) -> LineResult:
    """The line's result, good or bad. Raises only the `PASSING` errors, and cancellation."""
    try:
        reply = await ENDPOINTS[call.batch.endpoint](call)
    except PASSING:
        raise
    except ValidationError as exc:
        return failed_line(call.batch.id, line, 400, invalid_body(exc.errors()))
    except NightschoolError as exc:
        return failed_line(call.batch.id, line, *describe(exc))
    except Exception:
        log.exception("line %d of %s hit a bug", line.number, call.batch.id)
        body = error_body("internal error; the service's log has the details", "server_error")
        return failed_line(call.batch.id, line, 500, body)
    text = _result(call.batch.id, line, {"status_code": 200, "body": reply.body}, None)
    return LineResult(line.number, LineStatus.COMPLETED, text, reply.run, reply.response)


def failed_line(batch_id: str, line: Line, status: int, body: dict[str, Any]) -> LineResult:
    """The result of a line that was refused, with the reply that a request of its own would have got."""
    return LineResult(
        line.number, LineStatus.FAILED, _result(batch_id, line, {"status_code": status, "body": body}, None)
    )


def unrun_line(batch_id: str, line: Line, code: str, message: str) -> str:
    """The error file's line for one that was never run."""
    return _result(batch_id, line, None, {"code": code, "message": message})


def _result(batch_id: str, line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    key = line_key(batch_id, line.number)
    named = None if response is None else {"request_id": f"req_{key}", **response}
    return json.dumps({"id": f"batch_req_{key}", "custom_id": line.custom_id, "response": named, "error": error})


def read_lines(path: Path, endpoint: str) -> Iterator[Line | BatchError]:
    """Every line of a batch's input file as a line to run, or what is wrong with it. Blank lines are skipped.

    Reads line by line, and of a line no more than it may hold. NotFoundError when the file is gone.
    """
    count = 0
    for number, raw in _raw_lines(path):
        if raw is None:
            yield BatchError(code="line_too_long", message=f"a line may hold {MAX_LINE_BYTES} bytes", line=number)
        elif raw.strip():
            count += 1
            if count > MAX_LINES:
                yield BatchError(code="too_many_lines", message=f"a batch may hold {MAX_LINES} lines", line=number)
                return
            yield _read_line(number, raw, endpoint)
    if count == 0:
        yield BatchError(code="empty_file", message="the file holds no requests")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes) of every line; None for one that is too long to be read."""
    try:
        file = path.open("rb")
    except OSError as exc:
        raise NotFoundError(f"the input file cannot be read ({exc.strerror})") from exc
    with file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) <= MAX_LINE_BYTES:
                yield number, raw
                continue
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield number, None


def _read_line(number: int, raw: bytes, endpoint: str) -> Line | BatchError:
    def wrong(code: str, message: str, param: str | None = None) -> BatchError:
        return BatchError(code=code, message=message, line=number, param=param)

    try:
        value = json.loads(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
    except (ValueError, RecursionError):
        return wrong("invalid_json_line", "this line is not parseable as valid JSON")
    if not isinstance(value, dict):
        return wrong("invalid_json_line", "this line is no JSON object")
    for name in ("custom_id", "method", "url", "body"):
        if name not in value:
            return wrong("missing_required_parameter", f"missing required parameter: {name!r}", name)
    for name in value.keys() - {"custom_id", "method", "url", "body"}:
        return wrong("unknown_parameter", f"unknown parameter: {str(name)[:100]!r}", str(name)[:100])
    custom_id = value["custom_id"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID or not custom_id.isprintable():
        return wrong("invalid_custom_id", f"custom_id is a printable text of at most {MAX_ID} characters", "custom_id")
    if value["method"] != "POST":
        return wrong("invalid_method", "method must be 'POST'", "method")
    if value["url"] != endpoint:
        return wrong("mismatched_url", f"url must be the batch's endpoint {endpoint!r}", "url")
    if not isinstance(value["body"], dict):
        return wrong("invalid_body", "body must be a JSON object", "body")
    return Line(number, custom_id, json.dumps(value["body"]))
