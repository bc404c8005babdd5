"""`/v1/chat/completions`: a request is a task, its run a trajectory, written before the reply ends.

A stream has the answer as it is generated. A client that sends `X-Nightschool-Watch: 1`, or
`"nightschool": {"watch": true}`, also gets chunks with empty `choices` and a `nightschool` object that say
what the agent does on its way; others get standard chunks only:

    {"event": "recall", "recalled": [...]}       what memory put into the prompt, with the numbers that chose it
    {"event": "tool_call", "id", "name", "arguments"}    a call of the service's own tools
    {"event": "observation", "id", "content"}            what that tool answered
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse

from agent.tools import check_tools
from agent.verify import check_verifier
from memory.errors import NightschoolError
from memory.records import Trajectory
from serve import promotion
from serve.api import openai_types as oai
from serve.api.auth import Scope, caller_of, key_of, requires
from serve.api.errors import describe, error_body
from serve.api.feedback import said_in_metadata
from serve.api.runs import (
    RunEvent,
    TextDelta,
    ToolCallDelta,
    Turnstile,
    Watched,
    answer,
    run_events,
    stored_run,
    trajectory_id,
    unsaid,
)
from serve.api.sse import EventStream, begun, unless_gone
from serve.wiring import Services

log = logging.getLogger(__name__)

router = APIRouter(dependencies=[requires(Scope.CHAT)])


@router.post("/v1/chat/completions")
async def chat_completions(
    body: oai.ChatCompletionRequest,
    request: Request,
    idempotency_key: str | None = Header(default=None, max_length=255),
    x_nightschool_watch: str | None = Header(default=None),
) -> Any:
    services: Services = request.app.state.services
    turnstile: Turnstile = request.app.state.turnstile
    caller = caller_of(request)
    task = oai.task_of(body, caller.tenant, key_of(caller.name))
    check_tools(task.tools or [])
    check_verifier(task)
    promotion.resolve(services.ledger, body.model)
    if body.metadata:
        await asyncio.to_thread(said_in_metadata, services.ledger, body.metadata, caller)
    run_id = trajectory_id(idempotency_key, caller.tenant)
    stored = stored_run(services, run_id, task) if idempotency_key else None
    resumable = idempotency_key is not None
    run = (services, turnstile, task, body, run_id, resumable)
    if body.stream:
        watch = body.nightschool.watch or x_nightschool_watch in ("1", "true")
        chunks = _chunks(body, run_id, _replayed(stored) if stored else run_events(*run), watch)
        return EventStream(_with_errors(await begun(chunks)))
    trajectory = stored or await unless_gone(request, answer(*run))
    if trajectory is None:
        return JSONResponse({}, 499)
    return JSONResponse(oai.completion(trajectory, body.model))


async def _replayed(trajectory: Trajectory) -> AsyncIterator[RunEvent]:
    for event in unsaid(trajectory):
        yield event
    yield trajectory


async def _chunks(
    body: oai.ChatCompletionRequest, run_id: str, happening: AsyncIterator[RunEvent], watch: bool
) -> AsyncIterator[str]:
    """Server-sent events of one reply; the finish comes after the ledger's commit. Errors are raised."""
    created = int(time.time())
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def chunk(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> str:
        made = oai.chunk(run_id, created, body.model, delta, finish, more.pop("logprobs", None))
        return _event(made | ({"usage": None} if with_usage else {}) | more)

    began = False
    async with aclosing(happening) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Watched):
                if watch:
                    yield chunk(None, nightschool=event.event)
                continue
            if not began:
                began = True
                yield chunk({"role": "assistant", "content": None if isinstance(event, ToolCallDelta) else ""})
            if isinstance(event, TextDelta):
                yield chunk({"content": event.text})
            elif isinstance(event, ToolCallDelta):
                call = {"index": event.index, "id": event.id, "type": "function"}
                yield chunk({"tool_calls": [call | {"function": {"name": event.name, "arguments": ""}}]})
                yield chunk({"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]})
            else:
                logprobs = oai.logprobs_of(event)
                if logprobs is not None:
                    yield chunk({}, logprobs=logprobs)
                yield chunk({}, oai.finish_reason(event))
                if with_usage:
                    yield chunk(None, usage=oai.usage(event))
    yield "data: [DONE]\n\n"


async def _with_errors(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The chunks; an error, for which it is too late for a status, as an event that clients raise."""
    try:
        async with aclosing(chunks) as open_chunks:  # type: ignore[type-var]
            async for chunk in open_chunks:
                yield chunk
        return
    except NightschoolError as exc:
        error = describe(exc)[1]
    except Exception:
        log.exception("unexpected error in a stream")
        error = error_body("internal error; the service's log has the details", "server_error")
    yield _event(error)
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
