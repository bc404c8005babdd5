"""OpenAI's wire shapes: the requests we honour, and our records as OpenAI objects.

A field that is not listed in a request model is refused by name; none is silently dropped.
Ours is only the `nightschool` object, an extension that standard clients may ignore.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from memory.errors import ConfigError
from memory.records import Message, StopReason, Task, Trajectory, VerifierSpec, new_id
from serve.api.chat_tools import ResponseFormat, Tool, ToolChoice, checked_choice, checked_tools, clash, engine_format
from serve.api.messages import check_message, checked_messages
from serve.promotion import AGENT_MODEL

__all__ = ["ChatCompletionRequest", "Extension", "check_message"]

RESPONSE_PREFIX = "chatcmpl-"


MAX_METADATA = 20_000
"""Characters of a value: OpenAI's 512 are too few for a whole answer (`nightschool.reference`, feedback)."""


class Extension(BaseModel):
    """What a request may say beyond OpenAI's fields, under `nightschool`."""

    model_config = ConfigDict(extra="forbid")

    workload: str = Field(default="default", min_length=1, max_length=200)
    task_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_\-]{1,100}$")
    tools: list[str] | None = None
    reference: str | None = None
    verifier: VerifierSpec | None = None
    watch: bool = False
    """A stream also tells what the agent does on its way (see `serve.api.chat`)."""


def _refused(value: Any) -> Any:
    if value is not None:
        raise ValueError("this field is not supported")
    return value


Refused = Annotated[None, BeforeValidator(_refused)]
"""A field of OpenAI's that has no meaning here: only null may stand in it."""

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatCompletionRequest(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """A turn makes one call of a client's tool in either case."""
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: Literal[1] | None = None
    store: bool | None = None
    """False: nothing is learned from this run."""
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=64)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: Literal["in_memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=MAX_METADATA)]] | None = Field(
        default=None, max_length=16
    )
    nightschool: Extension = Field(default_factory=Extension)
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)
    moderation: Refused = None
    prediction: Refused = None
    prompt_cache_options: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @field_validator("messages")
    @classmethod
    def _messages_are_chat_messages(cls, messages: list[Message]) -> list[Message]:
        return checked_messages(messages)

    @field_validator("tools")
    @classmethod
    def _tools_have_names_of_their_own(cls, tools: list[Tool] | None) -> list[Tool] | None:
        return checked_tools(tools) if tools else None

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_one_of_the_tools(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        return checked_choice(choice, info.data["tools"] or []) if "tools" in info.data else choice

    @field_validator("response_format")
    @classmethod
    def _a_format_leaves_no_room_for_calls(
        cls, wanted: ResponseFormat | None, info: ValidationInfo
    ) -> ResponseFormat | None:
        if wanted and (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise ValueError("`json_schema` goes with type 'json_schema'")
        if engine_format(wanted) and info.data.get("tools"):
            raise ValueError("it cannot be combined with `tools`")
        return wanted

    @field_validator("logprobs")
    @classmethod
    def _only_plain_text_has_logprobs(cls, wanted: bool | None, info: ValidationInfo) -> bool | None:
        agent = str(info.data.get("model", "")).partition(":")[0] == AGENT_MODEL
        if wanted and (agent or info.data.get("tools")):
            raise ValueError("only plain replies have them: ask `champion` or `gen-N`, without tools")
        return wanted

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs_need_logprobs(cls, wanted: int | None, info: ValidationInfo) -> int | None:
        if wanted is not None and not info.data.get("logprobs"):
            raise ValueError("it needs `logprobs` to be true")
        return wanted

    @field_validator("nightschool")
    @classmethod
    def _own_tools_get_along(cls, said: Extension, info: ValidationInfo) -> Extension:
        shared = clash(said.tools or [], info.data.get("tools") or [])
        if shared is not None:
            raise ValueError(f"tools: {shared!r} is also one of `tools`; the model could not tell them apart")
        if said.tools and engine_format(info.data.get("response_format")):
            raise ValueError("tools: they cannot be combined with `response_format`")
        if said.watch and not info.data.get("stream"):
            raise ValueError("watch: only a stream can be watched")
        return said

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields that say how to generate and were given, in the engine's names."""
        names = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias")
        given = {name: getattr(self, name) for name in (*names, "top_logprobs") if getattr(self, name) is not None}
        if self.logprobs:
            given["logprobs"] = True
        wanted = engine_format(self.response_format)
        if wanted is not None:
            given["response_format"] = wanted
        limit = self.max_completion_tokens or self.max_tokens
        return given | ({"max_tokens": limit} if limit else {})

    @property
    def client_tools(self) -> list[dict[str, Any]]:
        """The tools that the client runs, in OpenAI's form."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]


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


def task_of(request: ChatCompletionRequest, tenant: str, caller: str | None) -> Task:
    """The request as a task of the key that signs it. ConfigError for a metadata key of ours that cannot be read."""
    extension = extension_in(request.nightschool, request.metadata)
    # Beside tools of the client's, and where the answer has a form of its own, ours are off unless they are named.
    none_of_ours = request.tools or engine_format(request.response_format)
    return Task(
        id=extension.task_id or new_id("task"),
        tenant=tenant,
        workload=extension.workload,
        messages=request.messages,
        tools=[] if extension.tools is None and none_of_ours else extension.tools,
        client_tools=request.client_tools,
        reference=extension.reference,
        verifier=extension.verifier,
        source="chat",
        user=request.user,
        safety_identifier=request.safety_identifier,
        caller=caller,
        metadata=request.metadata or {},
    )


def finish_reason(trajectory: Trajectory) -> str:
    """OpenAI's finish_reason of a run."""
    if trajectory.stop_reason is StopReason.TOOL_CALLS:
        return "tool_calls"
    return "length" if trajectory.stop_reason in (StopReason.LENGTH, StopReason.MAX_TURNS) else "stop"


def usage(trajectory: Trajectory) -> dict[str, int]:
    """Tokens over all model calls of the run, without those of the run that it continues."""
    steps = trajectory.steps[trajectory.inherited_steps :]
    prompt = sum(step.prompt_tokens or 0 for step in steps)
    completion = sum(step.completion_tokens or 0 for step in steps)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def tool_calls(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The calls that the client has to run; empty when the run ended in anything else."""
    return trajectory.messages[-1]["tool_calls"] if trajectory.stop_reason is StopReason.TOOL_CALLS else []


def logprobs_of(trajectory: Trajectory) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of a plain reply, where they were asked for."""
    entries = trajectory.steps[-1].logprobs if trajectory.steps and trajectory.sampling.get("logprobs") else None
    return None if entries is None else {"content": entries, "refusal": None}


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
    calls = tool_calls(trajectory)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls else trajectory.answer or ""}
    message |= {"refusal": None} | ({"tool_calls": calls} if calls else {})
    choice = {"index": 0, "message": message, "logprobs": logprobs_of(trajectory)}
    return {
        "id": response_id(trajectory),
        "object": "chat.completion",
        "created": int(trajectory.started_at.timestamp()),
        "model": model,
        "choices": [choice | {"finish_reason": finish_reason(trajectory)}],
        "usage": usage(trajectory),
        "nightschool": extension_of(trajectory),
    }


def chunk(
    trajectory_id: str,
    created: int,
    model: str,
    delta: dict[str, Any] | None,
    finish: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A `chat.completion.chunk`; `delta=None` makes one without choices, that carries usage or what to watch."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
    return {
        "id": f"{RESPONSE_PREFIX}{trajectory_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
    }
