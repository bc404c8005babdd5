"""`/v1/feedback`: a user's word on a run, committed before the reply. It teaches only once a night trusts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill.runs import corrected_run
from memory import approvals
from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.records import Feedback, FeedbackKind, Message, Trajectory, Trust, content_hash
from serve.api.auth import OPERATOR, Caller, InsufficientScopeError, Scope, caller_of, requires, signature
from serve.api.errors import FieldError
from serve.api.openai_types import RESPONSE_PREFIX
from serve.api.response_types import RESPONSE_ID, run_id_of
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.FEEDBACK)])
MAX_TEXT = 20_000
MAX_RUN = 200_000
"""Characters of a correction's messages, as JSON."""

METADATA = "feedback_"
"""Prefix of the keys in a chat request's `metadata` that hold a word on an earlier reply."""

_JSON_KINDS = (FeedbackKind.SCORE, FeedbackKind.PREFERENCE)
_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


class About(BaseModel):
    """The run that is meant: by the id of its reply, its own, or its conversation's (then the last run of it)."""

    model_config = ConfigDict(extra="forbid")

    response_id: str | None = Field(default=None, max_length=200)
    trajectory_id: str | None = Field(default=None, max_length=200)
    conversation_id: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _names_one_run(self) -> About:
        if sum(name is not None for name in (self.response_id, self.trajectory_id, self.conversation_id)) != 1:
            raise ValueError("give exactly one of response_id, trajectory_id and conversation_id")
        return self


class FeedbackRequest(About):
    """One word of feedback."""

    kind: FeedbackKind
    value: Any
    author: str | None = Field(default=None, min_length=1, max_length=200)

    @field_validator("author")
    @classmethod
    def _operators_are_not_self_made(cls, author: str | None) -> str | None:
        if author is not None and author.casefold().startswith((OPERATOR, "key:")):
            raise ValueError(f"author names that begin with {OPERATOR!r} or 'key:' are reserved for the service's own")
        return author


class TrustRequest(BaseModel):
    """`POST /v1/feedback/{feedback_id}/trust`: what becomes of a word, and why."""

    model_config = ConfigDict(extra="forbid")

    trust: Literal["trusted", "rejected"]
    reason: str = Field(min_length=1, max_length=1000)


def runs_of(ledger: Ledger, about: About, tenant: str) -> list[Trajectory]:
    """The runs that are meant, oldest first; NotFoundError when the tenant has none."""
    if about.conversation_id is not None:
        runs = ledger.conversation(about.conversation_id, tenant=tenant)
        if not runs:
            raise NotFoundError(f"there is no conversation {about.conversation_id!r}")
        return runs
    return [_run(ledger, str(about.response_id or about.trajectory_id), tenant)]


def _run(ledger: Ledger, name: str, tenant: str) -> Trajectory:
    run_id = run_id_of(name) if name.startswith(RESPONSE_ID) else name.removeprefix(RESPONSE_PREFIX)
    try:
        return ledger.get_trajectory(run_id, tenant=tenant)
    except NotFoundError as exc:
        raise NotFoundError(f"there is no response or trajectory {name!r}") from exc


def store_feedback(ledger: Ledger, said: FeedbackRequest, *, tenant: str, author: str) -> Feedback:
    """Check and commit. The same word by the same author on the same run is one row, however often sent.

    FieldError for a value that does not fit its kind, NotFoundError for a run that the tenant does not have.
    """
    run = runs_of(ledger, said, tenant)[-1]
    value = checked_value(ledger, run, said.kind, said.value)
    identity = content_hash([tenant, run.id, said.kind, value, author])
    feedback = Feedback(
        id=f"fb_{identity[:32]}",
        trajectory_id=run.id,
        tenant=tenant,
        kind=said.kind,
        value=value,
        author=author,
    )
    try:
        ledger.add_feedback(feedback)
    except ConflictError:
        return next(known for known in ledger.feedback(trajectory_id=run.id, tenant=tenant) if known.id == feedback.id)
    return feedback


def checked_value(ledger: Ledger, run: Trajectory, kind: FeedbackKind, value: Any) -> Any:
    """The value as stored; FieldError, saying what is expected, when it does not fit the kind."""
    match kind:
        case FeedbackKind.SCORE:
            if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
                raise _unfit(f"a score is a number from 0 to 1 or a boolean, got {_shown(value)}")
            return float(value)
        case FeedbackKind.PREFERENCE:
            return {"over": _worse(ledger, run, value).id}
        case FeedbackKind.CORRECTION if isinstance(value, list):
            return _better_run(ledger, run, value)
        case FeedbackKind.CORRECTION:
            return _text(value, "a correction is the better answer as a text, or a list of OpenAI messages,")
        case FeedbackKind.HINT | FeedbackKind.COMMENT:
            return _text(value, f"a {kind.value} is a text")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise _unfit(f"{what} of at most {MAX_TEXT} characters, got {_shown(value)}")
    return value


def _worse(ledger: Ledger, run: Trajectory, value: Any) -> Trajectory:
    if not isinstance(value, dict) or set(value) != {"over"} or not isinstance(value["over"], str):
        raise _unfit('a preference is {"over": the id of the worse response}')
    worse = _run(ledger, value["over"], run.tenant)
    if worse.id == run.id:
        raise _unfit("a preference is between two responses; these are one")
    return worse


def _better_run(ledger: Ledger, run: Trajectory, messages: list[Any]) -> list[Message]:
    for i, message in enumerate(messages):
        _check_message(message, f"[{i}]")
    offered = [*run.tools, *(tool["function"]["name"] for tool in run.client_tools)]
    try:
        if len(json.dumps(messages)) > MAX_RUN:
            raise _unfit(f"the messages of a correction are at most {MAX_RUN} characters of JSON")
        corrected_run(messages, ledger.get_task(run.task_id, tenant=run.tenant), offered)
    except (ValueError, RecursionError) as exc:
        raise _unfit(f"not a whole better run: {exc}") from exc
    return messages


def _check_message(message: Any, where: str) -> None:
    """FieldError, naming the place, unless it has a chat message's shape."""
    if not isinstance(message, dict):
        raise _unfit(f"{where} expected an OpenAI message, got {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _unfit(f"{where}.role: expected one of {', '.join(_ROLES)}, got {_shown(role)}")
    unknown = {name for name, held in message.items() if held not in (None, [])} - _FIELDS
    if unknown:
        raise _unfit(f"{where}.{min(unknown)}: this field is not supported")
    parts = content if isinstance(content, list) else []
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise _unfit(f"{where}.content: only text parts are understood")
    calls = message.get("tool_calls")
    if not isinstance(content, str | list) and not (role == "assistant" and content is None and calls):
        raise _unfit(f"{where}.content: expected a text or text parts, got {_shown(content)}")
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise _unfit(f"{where}.tool_calls: expected a list, on an assistant message")
    for n, call in enumerate(calls or []):
        function = call.get("function") if isinstance(call, dict) else None
        names = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise _unfit(f'{where}.tool_calls[{n}]: expected {{"function": {{"name", "arguments"}}}} with texts')


def _unfit(message: str) -> FieldError:
    return FieldError(f"value: {message}", "value")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def said_in_metadata(ledger: Ledger, metadata: Mapping[str, str] | None, caller: Caller) -> Feedback | None:
    """Store the feedback that a chat request brings along for an earlier reply; None when it brings none.

    Keys: `feedback_response_id`, `feedback_conversation_id` or `feedback_trajectory_id`, `feedback_kind` and
    `feedback_value` (a text, or JSON where the kind needs more). FieldError for a malformed one.
    """
    fields = ("response_id", "conversation_id", "trajectory_id", "kind", "value")
    given = {name: metadata[METADATA + name] for name in fields if metadata and METADATA + name in metadata}
    if not given:
        return None
    if not caller.may(Scope.FEEDBACK):
        raise InsufficientScopeError(f"metadata: the key {caller.name!r} has no scope {Scope.FEEDBACK.value!r}")
    try:
        said = FeedbackRequest.model_validate(given)
        said.value = _read(said.kind, said.value)
        return store_feedback(ledger, said, tenant=caller.tenant, author=signature(caller, None))
    except ValidationError as exc:
        first = exc.errors()[0]
        name = METADATA + str(first["loc"][0]) if first["loc"] else METADATA + "*"
        what = first["msg"].removeprefix("Value error, ")
        raise FieldError(f"metadata.{name}: {what}", "metadata") from exc
    except FieldError as exc:
        raise FieldError(f"metadata.{METADATA}{exc}", "metadata") from exc
    except NotFoundError as exc:
        # 404 would say that the chat route or its model is not there.
        raise FieldError(f"metadata: {exc}", "metadata") from exc


def _read(kind: FeedbackKind, value: str) -> Any:
    """A metadata value, which is always a text: JSON where the kind wants no text, or messages."""
    if kind not in _JSON_KINDS and not (kind is FeedbackKind.CORRECTION and value.lstrip().startswith("[{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise _unfit(f"expected JSON, got {_shown(value)}") from exc


def feedback_object(stored: Feedback) -> dict[str, Any]:
    """Feedback as a client sees it."""
    return {
        "id": stored.id,
        "object": "feedback",
        "created_at": int(stored.created_at.timestamp()),
        "trajectory_id": stored.trajectory_id,
        "kind": stored.kind,
        "value": stored.value,
        "author": stored.author,
        "trust": stored.trust,
        "trust_reason": stored.trust_reason,
    }


@router.post("/v1/feedback")
async def give_feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
    """Keep a word on a run."""
    services: Services = request.app.state.services
    caller = caller_of(request)
    author = signature(caller, body.author)
    stored = await asyncio.to_thread(store_feedback, services.ledger, body, tenant=caller.tenant, author=author)
    return feedback_object(stored)


@router.post("/v1/feedback/{feedback_id}/trust", dependencies=[requires(Scope.OPERATE)])
async def decide_trust(feedback_id: str, body: TrustRequest, request: Request) -> dict[str, Any]:
    """Let a word of the caller's tenant teach, or keep it from teaching (any more)."""
    services, caller = request.app.state.services, caller_of(request)
    who = {"tenant": caller.tenant, "by": caller.name}
    database = services.ledger.database
    return feedback_object(
        await asyncio.to_thread(approvals.decide, database, feedback_id, Trust(body.trust), body.reason, **who)
    )


@router.get("/v1/feedback")
def list_feedback(
    request: Request,
    response_id: str | None = None,
    trajectory_id: str | None = None,
    conversation_id: str | None = None,
) -> dict[str, Any]:
    """What was said of a run, or of all runs of a conversation, and whether it may teach; oldest first."""
    services: Services = request.app.state.services
    try:
        about = About(response_id=response_id, trajectory_id=trajectory_id, conversation_id=conversation_id)
    except ValidationError as exc:
        raise FieldError(exc.errors()[0]["msg"].removeprefix("Value error, "), "trajectory_id") from exc
    tenant = caller_of(request).tenant
    runs = runs_of(services.ledger, about, tenant)
    said = [stored for run in runs for stored in services.ledger.feedback(trajectory_id=run.id, tenant=tenant)]
    return {"object": "list", "data": [feedback_object(stored) for stored in said], "has_more": False}
