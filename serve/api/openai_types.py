"""OpenAI's wire shapes: the requests we honour, and our records as OpenAI objects.

A field that is not listed in a request model is refused by name; none is silently dropped.
Ours is only the `nightschool` object, an extension that standard clients may ignore.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from memory.errors import ConfigError
from memory.records import Message, StopReason, Task, Trajectory, VerifierSpec, new_id

RESPONSE_PREFIX = "chatcmpl-"


class Extension(BaseModel):
    """What a request may say beyond OpenAI's fields, under `nightschool`."""

    model_config = ConfigDict(extra="forbid")

    workload: str = Field(default="default", min_length=1, max_length=200)
    task_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_\-]{1,100}$")
    tools: list[str] | None = None
    reference: str | None = None
    verifier: VerifierSpec | None = None


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatCompletionRequest(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    nightschool: Extension = Field(default_factory=Extension)

    @field_validator("messages")
    @classmethod
    def _messages_are_chat_messages(cls, messages: list[Message]) -> list[Message]:
        for i, message in enumerate(messages):
            check_message(message, f"messages[{i}]")
        if not any(m["role"] == "user" for m in messages):
            raise ValueError("messages must hold at least one message with role 'user'")
        return messages

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling fields that were given, in the engine's names."""
        names = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        limit = self.max_completion_tokens or self.max_tokens
        return given | ({"max_tokens": limit} if limit else {})


def check_message(message: Message, where: str) -> None:
    """ValueError, naming the place, unless it is a text message of OpenAI's chat format."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"{where}.role: expected system, developer, user or assistant, got {role!r}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{where}.content: only text parts are understood")
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a string or text parts, got {type(content).__name__}")
    unknown = set(message) - {"role", "content"}
    if unknown:
        raise ValueError(f"{where}: unsupported field {sorted(unknown)[0]!r}")


def extension_in(given: Extension, metadata: dict[str, str] | None) -> Extension:
    """What a client that can set nothing but `metadata` says of a task: `nightschool.reference`, `.verifier` (a
    name, or {"name", "args"} as JSON) and `.workload`. What the `nightschool` object itself says goes first.
    """
    said = {key: (metadata or {}).get(f"nightschool.{key}") for key in ("reference", "verifier", "workload")}
    update: dict[str, Any] = {k: v for k, v in said.items() if v is not None and k not in given.model_fields_set}
    if not update:
        return given
    verifier = update.get("verifier", "")
    if verifier and not verifier.lstrip().startswith("{"):
        update["verifier"] = {"name": verifier}
    elif verifier:
        try:
            update["verifier"] = json.loads(verifier)
        except ValueError as exc:
            raise ConfigError(f"metadata.nightschool.verifier: no JSON: {exc}") from exc
    try:
        return Extension.model_validate(given.model_dump(exclude_unset=True) | update)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"metadata.nightschool.{where}: {first['msg']}") from exc


def task_of(request: ChatCompletionRequest, tenant: str) -> Task:
    """The request as a task. ConfigError for a metadata key of ours that cannot be read."""
    extension = extension_in(request.nightschool, request.metadata)
    return Task(
        id=extension.task_id or new_id("task"),
        tenant=tenant,
        workload=extension.workload,
        messages=request.messages,
        tools=extension.tools,
        reference=extension.reference,
        verifier=extension.verifier,
        source="chat",
    )


def finish_reason(trajectory: Trajectory) -> str:
    """OpenAI's finish_reason of a run."""
    return "length" if trajectory.stop_reason in (StopReason.LENGTH, StopReason.MAX_TURNS) else "stop"


def usage(trajectory: Trajectory) -> dict[str, int]:
    """Tokens over all model calls of the run."""
    prompt = sum(step.prompt_tokens or 0 for step in trajectory.steps)
    completion = sum(step.completion_tokens or 0 for step in trajectory.steps)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def response_id(trajectory: Trajectory) -> str:
    """The id a client sees; feedback takes it."""
    return f"{RESPONSE_PREFIX}{trajectory.id}"


def extension_of(trajectory: Trajectory) -> dict[str, Any]:
    """Our object on a reply: who answered, what was recalled, how it was judged."""
    return {
        "trajectory_id": trajectory.id,
        "task_id": trajectory.task_id,
        "generation": trajectory.generation,
        "served_by": trajectory.model,
        "recalled": [item.model_dump(mode="json") for item in trajectory.recalled],
        "outcome": trajectory.outcome.model_dump(mode="json") if trajectory.outcome else None,
        "stop_reason": trajectory.stop_reason,
    }


def completion(trajectory: Trajectory, model: str) -> dict[str, Any]:
    """A `chat.completion` object. A run without an answer is an empty reply that says why in `nightschool`."""
    message = {"role": "assistant", "content": trajectory.answer or "", "refusal": None}
    return {
        "id": response_id(trajectory),
        "object": "chat.completion",
        "created": int(trajectory.started_at.timestamp()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(trajectory)}],
        "usage": usage(trajectory),
        "nightschool": extension_of(trajectory),
    }


def chunk(
    trajectory_id: str, created: int, model: str, delta: dict[str, Any] | None, finish: str | None = None
) -> dict[str, Any]:
    """A `chat.completion.chunk`; `delta=None` makes the last one, without choices, that carries usage."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": f"{RESPONSE_PREFIX}{trajectory_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
    }
