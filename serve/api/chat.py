"""`/v1/chat/completions`: a request is a task, its run a trajectory, written before the reply ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse

from agent.tools import check_tools
from agent.verify import check_verifier
from memory.errors import NightschoolError
from memory.records import Trajectory
from serve import promotion
from serve.api import openai_types as oai
from serve.api.auth import Scope, caller_of, requires
from serve.api.errors import describe
from serve.api.feedback import said_in_metadata
from serve.api.runs import Turnstile, answer, stored_run, trajectory_id
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.CHAT)])
T = TypeVar("T")


@router.post("/v1/chat/completions")
async def chat_completions(
    body: oai.ChatCompletionRequest,
    request: Request,
    idempotency_key: str | None = Header(default=None, max_length=255),
) -> Any:
    services: Services = request.app.state.services
    turnstile: Turnstile = request.app.state.turnstile
    tenant = caller_of(request).tenant
    task = oai.task_of(body, tenant)
    check_tools(task.tools or [])
    check_verifier(task)
    promotion.resolve(services.ledger, body.model)
    await asyncio.to_thread(said_in_metadata, services.ledger, body.metadata, caller_of(request))
    run_id = trajectory_id(idempotency_key, tenant)
    stored = stored_run(services, run_id, task) if idempotency_key else None
    resumable = idempotency_key is not None
    work = _known(stored) if stored else answer(services, turnstile, task, body, run_id, resumable)
    if body.stream:
        events = _events(body, run_id, work)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    trajectory = await _unless_gone(request, work)
    if trajectory is None:
        return JSONResponse({}, 499)
    return JSONResponse(oai.completion(trajectory, body.model))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, cancelled within a second once the client has hung up (then None)."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=0.5)
            if done:
                return task.result()
            if await request.is_disconnected():
                return None
    finally:
        if not task.done():
            task.cancel()


async def _known(trajectory: Trajectory) -> Trajectory:
    return trajectory


async def _events(
    body: oai.ChatCompletionRequest, run_id: str, work: Coroutine[Any, Any, Trajectory]
) -> AsyncIterator[str]:
    """Server-sent events of one reply; the last comes after the ledger's commit."""
    created = int(time.time())
    usage_field = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}

    def event(delta: dict[str, Any] | None, finish: str | None = None) -> str:
        return f"data: {json.dumps(oai.chunk(run_id, created, body.model, delta, finish) | usage_field)}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        trajectory = await work
    except NightschoolError as exc:
        yield f"data: {json.dumps(describe(exc)[1])}\n\n"
        yield "data: [DONE]\n\n"
        return
    for piece in (trajectory.answer or "").splitlines(keepends=True):
        yield event({"content": piece})
    yield event({}, oai.finish_reason(trajectory))
    if usage_field:
        last = oai.chunk(run_id, created, body.model, None) | {"usage": oai.usage(trajectory)}
        yield f"data: {json.dumps(last)}\n\n"
    yield "data: [DONE]\n\n"
