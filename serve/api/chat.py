"""`/v1/chat/completions` and `/v1/models`: a request is a task, its run a trajectory, written before the reply ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse

from agent.run import run_task
from agent.tools import check_tools
from agent.verify import check_verifier
from memory import errors as our_errors
from memory.errors import ConflictError, NightschoolError, NotFoundError
from memory.recall import NoMemory
from memory.records import DEFAULT_TENANT, Purpose, StopReason, Task, Trajectory, new_id
from serve import promotion
from serve.api import openai_types as oai
from serve.api.errors import BusyError, describe
from serve.settings import ServerConfig
from serve.wiring import Services, keep_task

router = APIRouter()
T = TypeVar("T")


class Turnstile:
    """Lets `max_concurrent` runs in, keeps `max_waiting` waiting, turns further ones away with 429."""

    def __init__(self, config: ServerConfig) -> None:
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._limit = config.max_concurrent + config.max_waiting
        self.inside = 0

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        if self.inside >= self._limit:
            raise BusyError("too many requests are waiting; try again in a few seconds")
        self.inside += 1
        try:
            async with self._slots:
                yield
        finally:
            self.inside -= 1


def _trajectory_id(key: str | None, tenant: str) -> str:
    """A retried request names the same run: the id follows from its idempotency key."""
    return f"traj_{hashlib.sha256(f'{tenant}/{key}'.encode()).hexdigest()[:32]}" if key else new_id("traj")


async def answer(
    services: Services,
    turnstile: Turnstile,
    task: Task,
    request: oai.ChatCompletionRequest,
    run_id: str,
    resumable: bool,
) -> Trajectory:
    """Run the task on the asked-for generation and commit task and trajectory to the ledger.

    `resumable`: a run that is killed goes on at its last step when it is asked for again with the same id.
    A run that ended in an error of the engine or the request raises it; the ledger then has nothing of it.
    """
    with_agent, generation = promotion.resolve(services.ledger, request.model)
    deps, asked = services.deps, task
    if not resumable:
        deps = replace(deps, checkpointer=None)
    if not with_agent:
        deps = replace(deps, recaller=NoMemory(), checkpointer=None)
        task = task.model_copy(update={"tools": []})
    async with turnstile.enter(), services.residency.using(generation):
        trajectory = await run_task(
            task,
            promotion.model_ref(generation),
            deps,
            purpose=Purpose.SERVE,
            sampling=_sampling(request, with_agent, services),
            trajectory_id=run_id,
        )
    if trajectory.stop_reason is StopReason.ERROR:
        # Nothing was acknowledged, and a retry with the same key must run again: only the log keeps it.
        kind = getattr(our_errors, trajectory.error_type or "", our_errors.ModelError)
        raise kind(trajectory.error)
    await asyncio.to_thread(_commit, services, asked, trajectory)
    return trajectory


def _sampling(request: oai.ChatCompletionRequest, with_agent: bool, services: Services) -> dict[str, Any]:
    plain_default = {} if with_agent else {"max_tokens": services.settings.agent.max_run_tokens // 8}
    return plain_default | request.sampling


def _commit(services: Services, task: Task, trajectory: Trajectory) -> None:
    keep_task(services.ledger, task)
    services.ledger.add_trajectory(trajectory)


def _stored(services: Services, run_id: str, task: Task) -> Trajectory | None:
    try:
        trajectory = services.ledger.get_trajectory(run_id)
    except NotFoundError:
        return None
    if services.ledger.get_task(trajectory.task_id).fingerprint != task.fingerprint:
        raise ConflictError("this Idempotency-Key was used with another request body")
    return trajectory


@router.post("/v1/chat/completions")
async def chat_completions(
    body: oai.ChatCompletionRequest,
    request: Request,
    idempotency_key: str | None = Header(default=None, max_length=255),
) -> Any:
    services: Services = request.app.state.services
    turnstile: Turnstile = request.app.state.turnstile
    task = oai.task_of(body, DEFAULT_TENANT)
    check_tools(task.tools or [])
    check_verifier(task)
    promotion.resolve(services.ledger, body.model)
    run_id = _trajectory_id(idempotency_key, DEFAULT_TENANT)
    stored = _stored(services, run_id, task) if idempotency_key else None
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


def _model_object(services: Services, name: str) -> dict[str, Any]:
    _, generation = promotion.resolve(services.ledger, name)
    return {
        "id": name,
        "object": "model",
        "created": int(generation.created_at.timestamp()),
        "owned_by": "nightschool",
        "nightschool": {
            "generation": generation.number,
            "served_by": generation.served_name,
            "status": generation.status,
            "base_model": generation.base_model,
        },
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    services: Services = request.app.state.services
    names = promotion.model_names(services.ledger)
    return {"object": "list", "data": [_model_object(services, name) for name in names]}


@router.get("/v1/models/{name}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    return _model_object(request.app.state.services, name)
