"""`POST /v1/feedback`: a user's word on a run, committed before the reply. It teaches only once a night trusts it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from memory.errors import ConfigError, ConflictError
from memory.ledger import Ledger
from memory.records import DEFAULT_TENANT, Feedback, FeedbackKind, content_hash
from serve.api.openai_types import RESPONSE_PREFIX
from serve.wiring import Services

router = APIRouter()
MAX_TEXT = 20_000
OPERATOR = "operator"
"""Prefix of the authors that a night trusts without corroboration; only the CLI signs so."""


class FeedbackRequest(BaseModel):
    """One word of feedback, on a response or a trajectory."""

    model_config = ConfigDict(extra="forbid")

    response_id: str | None = None
    trajectory_id: str | None = None
    kind: FeedbackKind
    value: Any
    author: str = Field(default="anonymous", min_length=1, max_length=200)

    @field_validator("author")
    @classmethod
    def _operators_are_not_self_made(cls, author: str) -> str:
        if author.casefold().startswith(OPERATOR):
            raise ValueError(f"author names that begin with {OPERATOR!r} are reserved for the command line")
        return author

    @model_validator(mode="after")
    def _names_one_run(self) -> FeedbackRequest:
        if (self.response_id is None) == (self.trajectory_id is None):
            raise ValueError("give exactly one of response_id and trajectory_id")
        return self


def store_feedback(
    ledger: Ledger, said: FeedbackRequest, tenant: str = DEFAULT_TENANT, author: str | None = None
) -> Feedback:
    """Check and commit; `author` replaces the one that was claimed. The same word by the same author on
    the same run is one row, however often sent.

    ConfigError for a value that does not fit its kind, NotFoundError for an unknown run.
    """
    trajectory_id = said.trajectory_id or str(said.response_id).removeprefix(RESPONSE_PREFIX)
    ledger.get_trajectory(trajectory_id)
    value = checked_value(said.kind, said.value)
    identity = content_hash([tenant, trajectory_id, said.kind, value, author or said.author])
    feedback = Feedback(
        id=f"fb_{identity[:32]}",
        trajectory_id=trajectory_id,
        tenant=tenant,
        kind=said.kind,
        value=value,
        author=author or said.author,
    )
    try:
        ledger.add_feedback(feedback)
    except ConflictError:
        return next(f for f in ledger.feedback(trajectory_id=trajectory_id) if f.id == feedback.id)
    return feedback


def checked_value(kind: FeedbackKind, value: Any) -> Any:
    """The value as stored; ConfigError, saying what is expected, when it does not fit the kind."""
    match kind:
        case FeedbackKind.SCORE if isinstance(value, bool):
            return float(value)
        case FeedbackKind.SCORE if isinstance(value, int | float) and 0 <= value <= 1:
            return float(value)
        case FeedbackKind.SCORE:
            raise ConfigError(f"value: a score is a number from 0 to 1 or a boolean, got {value!r}")
        case FeedbackKind.CORRECTION if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            return value
        case FeedbackKind.PREFERENCE if isinstance(value, dict) and isinstance(value.get("over"), str):
            return {"over": value["over"].removeprefix(RESPONSE_PREFIX)}
        case FeedbackKind.PREFERENCE:
            raise ConfigError('value: a preference is {"over": the id of the worse response}')
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        what = "a text or a list of OpenAI messages" if kind is FeedbackKind.CORRECTION else "a text"
        raise ConfigError(f"value: a {kind.value} is {what} of at most {MAX_TEXT} characters")
    return value


@router.post("/v1/feedback")
async def feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
    services: Services = request.app.state.services
    stored = await asyncio.to_thread(store_feedback, services.ledger, body)
    return {
        "id": stored.id,
        "object": "feedback",
        "trajectory_id": stored.trajectory_id,
        "kind": stored.kind,
        "trust": stored.trust,
        "trust_reason": stored.trust_reason,
    }
