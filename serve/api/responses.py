"""`/v1/responses`: OpenAI's newer shape over the same runs; a reply is stored before `completed` is said."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse

from agent.tools import check_tools
from agent.verify import check_verifier
from memory.errors import NightschoolError, NotFoundError
from memory.records import Trajectory
from memory.responses import StoredResponse, add_response, delete_response, get_response
from serve import promotion
from serve.api import openai_types as oai
from serve.api import response_types as shapes
from serve.api.auth import Caller, Scope, caller_of, key_of, requires
from serve.api.errors import FieldError, describe
from serve.api.feedback import said_in_metadata
from serve.api.response_types import Item, ResponseRequest
from serve.api.runs import (
    Keep,
    RunEvent,
    TextDelta,
    ToolCallDelta,
    Turnstile,
    Watched,
    answer,
    run_events,
    stored_run,
    trajectory_id,
)
from serve.api.sse import EventStream, begun, unless_gone
from serve.wiring import Services

log = logging.getLogger(__name__)
router = APIRouter(dependencies=[requires(Scope.CHAT)])


@dataclass(frozen=True)
class _Asked:
    """A checked request: its context as items, and the same as a run of chat."""

    body: ResponseRequest
    chat: oai.ChatCompletionRequest
    tenant: str
    key: str | None
    items: list[Item]
    conversation: str
    run_id: str
    response: dict[str, Any]
    """The reply as it begins."""


@router.post("/v1/responses")
async def create_response(
    body: ResponseRequest,
    request: Request,
    idempotency_key: str | None = Header(default=None, max_length=255),
) -> Any:
    """Answer, with or without events. Errors that come at once are HTTP's, later ones of a stream are events."""
    services: Services = request.app.state.services
    asked = await asyncio.to_thread(_asked, services, body, caller_of(request), idempotency_key)
    task = oai.task_of(asked.chat, asked.tenant, asked.key)
    check_tools(task.tools or [])
    check_verifier(task)
    known = stored_run(services, asked.run_id, task) if idempotency_key else None
    run = (services, request.app.state.turnstile, task, asked.chat, asked.run_id, idempotency_key is not None)
    if body.stream:
        fresh = _unwatched(run_events(*run, conversation_id=asked.conversation))
        return EventStream(_events(services, asked, _replayed(known) if known else await begun(fresh)))
    trajectory = known or await unless_gone(request, answer(*run, conversation_id=asked.conversation))
    if trajectory is None:
        return JSONResponse({}, 499)
    return JSONResponse(await asyncio.to_thread(_kept, services, asked, trajectory))


def _asked(services: Services, body: ResponseRequest, caller: Caller, key: str | None) -> _Asked:
    tenant = caller.tenant
    promotion.resolve(services.ledger, body.model)
    run_id = trajectory_id(f"responses {key}" if key else None, tenant)
    response = shapes.response_object(body, run_id, int(time.time()))
    items, conversation = body.items, response["id"]
    if body.previous_response_id is not None:
        try:
            before = get_response(services.ledger.database, body.previous_response_id, tenant=tenant)
        except NotFoundError as exc:
            said = f"previous_response_id: there is no stored response {body.previous_response_id!r}"
            raise FieldError(said, "previous_response_id", "previous_response_not_found") from exc
        items = [*before.items, *before.reply["output"], *items]
        conversation = before.conversation_id
    shapes.check_calls(items)
    chat = shapes.chat_request(body, items)
    said_in_metadata(services.ledger, body.metadata, caller)
    return _Asked(body, chat, tenant, key_of(caller.name), shapes.with_ids(items), conversation, run_id, response)


async def line_reply(
    services: Services, turnstile: Turnstile, body: ResponseRequest, caller: Caller, key: str, keep: Keep
) -> tuple[dict[str, Any], StoredResponse | None]:
    """The reply to a line of a batch, and what is to be stored with the run that `keep` is given.

    `key` names task, run and reply: they are the same at every attempt.
    """
    asked = await asyncio.to_thread(_asked, services, body, caller, key)
    task = oai.task_of(asked.chat, asked.tenant, asked.key)
    own_id = {"id": f"task_{key}"} if asked.chat.nightschool.task_id is None else {}
    task = task.model_copy(update={"source": "batch", **own_id})
    check_tools(task.tools or [])
    check_verifier(task)
    trajectory = await answer(
        services, turnstile, task, asked.chat, asked.run_id, False, keep, conversation_id=asked.conversation
    )
    stored = _stored(asked, trajectory)
    return stored.reply, stored if asked.body.store is not False else None


def _kept(services: Services, asked: _Asked, trajectory: Trajectory) -> dict[str, Any]:
    """The finished reply, in the ledger unless the client asked for it not to be stored."""
    stored = _stored(asked, trajectory)
    if asked.body.store is False:
        return stored.reply
    database = services.ledger.database
    try:
        return get_response(database, stored.id, tenant=asked.tenant).reply
    except NotFoundError:
        add_response(database, stored)
        return stored.reply


def _stored(asked: _Asked, trajectory: Trajectory) -> StoredResponse:
    reply = shapes.ended(asked.response, trajectory, int(time.time()))
    return StoredResponse(
        id=reply["id"],
        tenant=asked.tenant,
        trajectory_id=trajectory.id,
        conversation_id=asked.conversation,
        items=asked.items,
        reply=reply,
    )


async def _unwatched(happening: AsyncIterator[RunEvent]) -> AsyncIterator[RunEvent]:
    """A run's events without what the agent does on its way, which this API has no event for."""
    async with aclosing(happening) as events:  # type: ignore[type-var]
        async for event in events:
            if not isinstance(event, Watched):
                yield event


async def _replayed(trajectory: Trajectory) -> AsyncIterator[RunEvent]:
    yield trajectory


@dataclass
class _Events:
    """Server-sent events in OpenAI's order: every item is added, grows and is done before the next one begins."""

    run_id: str
    said: int = 0
    items: list[Item] = field(default_factory=list)
    """What was begun; the last one is open until `closed`."""
    open: bool = False

    def event(self, kind: str, **fields: Any) -> str:
        """One event, numbered."""
        data = {"type": f"response.{kind}", "sequence_number": self.said, **fields}
        self.said += 1
        return f"event: response.{kind}\ndata: {json.dumps(data)}\n\n"

    def text(self, piece: str) -> Iterator[str]:
        """A piece of the answer's text."""
        if not (self.open and self.items[-1]["type"] == "message"):
            yield from self._begun(shapes.message_item(self.run_id, len(self.items), "", "in_progress"))
            yield self.event("content_part.added", **self._part(), part=shapes.output_text(""))
            self.items[-1]["content"] = [shapes.output_text("")]
        if piece:
            self.items[-1]["content"][0]["text"] += piece
            yield self.event("output_text.delta", **self._part(), delta=piece, logprobs=[])

    def call(self, call_id: str, name: str, arguments: str) -> Iterator[str]:
        """A tool call, or the next piece of its arguments."""
        if not (self.open and self.items[-1].get("call_id") == call_id):
            yield from self._begun(shapes.call_item(self.run_id, len(self.items), call_id, name, "", "in_progress"))
        if arguments:
            self.items[-1]["arguments"] += arguments
            yield self.event("function_call_arguments.delta", **self._place(), delta=arguments)

    def closed(self, final: Item | None = None) -> Iterator[str]:
        """The open item is done, as it grew or as `final` has it."""
        if not self.open:
            return
        item = final or self.items[-1] | {"status": "completed"}
        self.items[-1], self.open = item, False
        if item["type"] == "message":
            part = item["content"][0]
            yield self.event("output_text.done", **self._part(), text=part["text"], logprobs=[])
            yield self.event("content_part.done", **self._part(), part=part)
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self.event("function_call_arguments.done", **self._place(), **said)
        yield self.event("output_item.done", output_index=len(self.items) - 1, item=item)

    def rest(self, output: list[Item]) -> Iterator[str]:
        """What of the finished output was not said yet."""
        if self.open:
            yield from self.closed(output[len(self.items) - 1])
        for item in output[len(self.items) :]:
            if item["type"] == "message":
                yield from self.text(item["content"][0]["text"])
            else:
                yield from self.call(item["call_id"], item["name"], item["arguments"])
            yield from self.closed(item)

    def _begun(self, item: Item) -> Iterator[str]:
        yield from self.closed()
        self.items.append(item)
        self.open = True
        yield self.event("output_item.added", output_index=len(self.items) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}


async def _events(services: Services, asked: _Asked, happening: AsyncIterator[RunEvent]) -> AsyncIterator[str]:
    """The reply as events; the last one comes after the ledger's commit."""
    events = _Events(asked.run_id)
    yield events.event("created", response=asked.response)
    yield events.event("in_progress", response=asked.response)
    try:
        async with aclosing(happening) as run:  # type: ignore[type-var]
            async for said in run:
                for line in _lines(events, said):
                    yield line
                if isinstance(said, Trajectory):
                    reply = await asyncio.to_thread(_kept, services, asked, said)
                    for line in events.rest(reply["output"]):
                        yield line
                    yield events.event(reply["status"], response=reply)
    except NightschoolError as exc:
        status, _ = describe(exc)
        yield events.event("failed", response=shapes.failed(asked.response, str(exc), status))
    except Exception:
        # The status line is long sent: this event is the only way left to tell the client.
        log.exception("unexpected error while streaming %s", asked.response["id"])
        message = "internal error; the service's log has the details"
        yield events.event("failed", response=shapes.failed(asked.response, message, 500))


def _lines(events: _Events, said: RunEvent) -> Iterator[str]:
    if isinstance(said, TextDelta):
        yield from events.text(said.text)
    elif isinstance(said, ToolCallDelta):
        yield from events.call(said.id, said.name, said.arguments)


@router.get("/v1/responses/{response_id}")
def retrieve_response(response_id: str, request: Request, stream: Literal["false"] = "false") -> dict[str, Any]:
    """A stored reply. `stream` is refused: what was streamed once is not streamed again."""
    services: Services = request.app.state.services
    return get_response(services.ledger.database, response_id, tenant=caller_of(request).tenant).reply


@router.delete("/v1/responses/{response_id}")
def forget_response(response_id: str, request: Request) -> dict[str, Any]:
    """Delete a stored reply; its run stays in the ledger."""
    services: Services = request.app.state.services
    delete_response(services.ledger.database, response_id, tenant=caller_of(request).tenant)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: int = Query(default=20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The items that led to a stored reply, those of earlier replies in its chain among them."""
    services: Services = request.app.state.services
    items = get_response(services.ledger.database, response_id, tenant=caller_of(request).tenant).items
    listed = items if order == "asc" else items[::-1]
    if after is not None:
        ids = [item["id"] for item in listed]
        if after not in ids:
            raise FieldError(f"after: {response_id!r} has no input item {after!r}", "after")
        listed = listed[ids.index(after) + 1 :]
    page = listed[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(listed) > limit,
    }
