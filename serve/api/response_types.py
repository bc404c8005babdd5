"""The Responses API's wire shapes: what a request may say, the same as a chat request, and a run as a `response`.

A field that is not listed is refused by name. Input items are kept in one normal form, so that a stored
reply's items can be listed and shown to the model again.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memory.records import Message, Trajectory, new_id
from serve.api import openai_types as oai
from serve.api.errors import FieldError

RESPONSE_ID = "resp_"
Item = dict[str, Any]
"""One input or output item in OpenAI's form."""

_KEYS = {
    "message": {"type", "id", "role", "content", "status"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
}
_AS_IN_CHAT = (
    "temperature",
    "top_p",
    "metadata",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
)
_CHAT_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Chat's name of a field -> what it is called here, for errors."""


class FunctionTool(BaseModel):
    """A tool that the client runs."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(BaseModel):
    """`text.format`: free text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_\-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _a_schema_comes_with_its_name(self) -> TextFormat:
        described = (self.name, self.description, self.schema_, self.strict)
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("json_schema needs name and schema")
        if self.type != "json_schema" and any(part is not None for part in described):
            raise ValueError("name, description, schema and strict belong to type json_schema")
        return self


class TextConfig(BaseModel):
    """OpenAI's `text`."""

    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None


class StreamOptions(BaseModel):
    """OpenAI's `stream_options` of this API: events are not padded."""

    model_config = ConfigDict(extra="forbid")

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(BaseModel):
    """`POST /v1/responses`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: TextConfig | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = Field(default=None, max_length=0)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    nightschool: oai.Extension | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _input_is_a_text_or_known_items(cls, given: Any) -> Any:
        if isinstance(given, str):
            return given
        if not isinstance(given, list) or not given:
            raise ValueError("expected a text or a list of at least one item")
        return [_item(raw, f"input[{i}]") for i, raw in enumerate(given)]

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _tool_choice_is_a_mode_or_functions(cls, given: Any) -> Any:
        allowed = isinstance(given, dict) and set(given) == {"type", "mode", "tools"}
        if allowed and given["type"] == "allowed_tools" and isinstance(given["tools"], list):
            known = all(_is_function(tool) for tool in given["tools"])
        else:
            known = given in (None, "none", "auto", "required") or _is_function(given)
        if not known:
            raise ValueError("expected none, auto, required, a function by its name, or allowed_tools of functions")
        return given

    @field_validator("nightschool")
    @classmethod
    def _only_chat_can_be_watched(cls, said: oai.Extension | None) -> oai.Extension | None:
        if said is not None and said.watch:
            raise ValueError("watch: streams of this API cannot be watched; those of chat completions can")
        return said

    @property
    def items(self) -> list[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": _parts("user", self.input), "status": "completed"}]
        return self.input


def _is_function(choice: Any) -> bool:
    named = isinstance(choice, dict) and set(choice) == {"type", "name"} and choice["type"] == "function"
    return named and isinstance(choice["name"], str)


def _item(raw: Any, where: str) -> Item:
    """An input item in its normal form; ValueError, naming the place, for one that is not understood."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, got {type(raw).__name__}")
    given = {key: value for key, value in raw.items() if value is not None}
    kind = given.get("type", "message")
    if kind not in _KEYS:
        raise ValueError(f"{where}.type: expected {', '.join(_KEYS)}, got {kind!r}")
    unknown = set(given) - _KEYS[kind]
    if unknown:
        raise ValueError(f"{where}.{min(unknown)}: this field is not supported")
    named = {"id": _text(given, "id", where)} if "id" in given else {}
    item: Item = {"type": kind, **named, "status": "completed"}
    if kind == "message":
        role = given.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise ValueError(f"{where}.role: expected user, assistant, system or developer, got {role!r}")
        return item | {"role": role, "content": _parts(role, _content(given.get("content"), f"{where}.content"))}
    item["call_id"] = _text(given, "call_id", where)
    if kind == "function_call_output":
        return item | {"output": _content(given.get("output"), f"{where}.output")}
    arguments = _text(given, "arguments", where)
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError(f"{where}.arguments: expected the text of a JSON object")
    return item | {"name": _text(given, "name", where), "arguments": arguments}


def _text(given: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(given.get(key), str) or not given[key]:
        raise ValueError(f"{where}.{key}: expected a text that is not empty")
    return given[key]


def _content(content: Any, where: str) -> str:
    """The text of a string or of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected a text or text parts, got {type(content).__name__}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text"):
            raise ValueError(f"{where}[{i}]: only input_text and output_text parts are understood")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{i}].text: expected a text")
    return "".join(part["text"] for part in content)


def _parts(role: str, text: str) -> list[dict[str, Any]]:
    return [output_text(text)] if role == "assistant" else [{"type": "input_text", "text": text}]


def output_text(text: str) -> dict[str, Any]:
    """The one content part of an output message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def with_ids(items: list[Item]) -> list[Item]:
    """The items, each with an id of its own; one that came without, or with another item's, gets a new one."""
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
    named: dict[str, Item] = {}
    for item in items:
        known = item.get("id") or ""
        name = known if known and known not in named else new_id(prefixes[item["type"]])
        named[name] = {**item, "id": name}
    return list(named.values())


def check_calls(items: list[Item]) -> None:
    """FieldError unless every result answers a call before it, and every call has its result before anything else."""
    waiting: list[str] = []
    for item in items:
        if item["type"] == "function_call" and item["call_id"] not in waiting:
            waiting.append(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] in waiting:
            waiting.remove(item["call_id"])
        elif item["type"] == "function_call_output":
            raise FieldError(f"input: no open function call has the call_id {item['call_id']!r}", "input")
        elif waiting:
            break
    if waiting:
        raise FieldError(f"input: the function call {waiting[0]!r} has no function_call_output", "input")


def messages_of(instructions: str | None, items: list[Item]) -> list[Message]:
    """Items as chat messages: calls join the assistant turn before them, results become tool messages."""
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        if item["type"] == "message":
            messages.append({"role": item["role"], "content": "".join(part["text"] for part in item["content"])})
        elif item["type"] == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


def chat_request(request: ResponseRequest, items: list[Item]) -> oai.ChatCompletionRequest:
    """The request as one of chat, over the whole context; FieldError in this API's names when it is none."""
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages_of(request.instructions, items),
        "max_completion_tokens": request.max_output_tokens,
        "store": request.store,
        **{name: getattr(request, name) for name in _AS_IN_CHAT},
        "tools": _chat_tools(request.tools),
        "tool_choice": _chat_tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "response_format": _chat_format(request.text),
        "nightschool": request.nightschool.model_dump(exclude_unset=True) if request.nightschool else None,
    }
    try:
        return oai.ChatCompletionRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as exc:
        first = exc.errors()[0]
        name, *rest = (str(part) for part in first["loc"] if part != "function")
        param = ".".join([_CHAT_FIELDS.get(name, name), *rest])
        said = first["msg"].removeprefix("Value error, ")
        raise FieldError(f"{param}: {said.replace('messages', 'input')}", param) from exc


def _chat_tools(tools: list[FunctionTool] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    names = ("name", "description", "parameters", "strict")
    return [{"type": "function", "function": tool.model_dump(include={*names}, exclude_none=True)} for tool in tools]


def _chat_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice["type"] == "allowed_tools":
        tools = [_chat_tool_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}}
    return {"type": "function", "function": {"name": choice["name"]}}


def _chat_format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    if text.format.type == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": text.format.model_dump(by_alias=True, exclude_none=True, exclude={"type"}),
    }


def response_id(run_id: str) -> str:
    """The id a client sees; it follows from the run's, so that feedback finds the run."""
    return RESPONSE_ID + run_id.removeprefix("traj_")


def run_id_of(reply_id: str) -> str:
    """The run behind a response."""
    return "traj_" + reply_id.removeprefix(RESPONSE_ID)


def message_item(run_id: str, index: int, text: str, status: str) -> Item:
    """An output message; while `in_progress` it has no content yet."""
    content = [] if status == "in_progress" else [output_text(text)]
    name = f"msg_{run_id.removeprefix('traj_')}_{index}"
    return {"id": name, "type": "message", "status": status, "role": "assistant", "content": content}


def call_item(run_id: str, index: int, call_id: str, name: str, arguments: str, status: str) -> Item:
    """A call of a tool that the client runs."""
    call = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": f"fc_{run_id.removeprefix('traj_')}_{index}", "type": "function_call", "status": status, **call}


def output_items(trajectory: Trajectory) -> list[Item]:
    """What the run answered: a message, tool calls, or both; an empty message when it has neither."""
    choice = oai.completion(trajectory, "")["choices"][0]
    text, calls = choice["message"]["content"], choice["message"].get("tool_calls") or []
    status = "incomplete" if choice["finish_reason"] == "length" else "completed"
    items = [message_item(trajectory.id, 0, text or "", status)] if text or not calls else []
    for call in calls:
        function = call["function"]
        items.append(
            call_item(trajectory.id, len(items), call["id"], function["name"], function["arguments"], "completed")
        )
    return items


def response_object(request: ResponseRequest, run_id: str, created: int) -> dict[str, Any]:
    """A `response` that has just begun; `ended` and `failed` make it a finished one."""
    text_format = request.text.format if request.text else None
    tools = [tool.model_dump() for tool in request.tools or []]
    return {
        "id": response_id(run_id),
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": request.temperature,
        "text": {
            "format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
    }


def ended(response: dict[str, Any], trajectory: Trajectory, completed: int) -> dict[str, Any]:
    """The response of a run that ended: completed, or incomplete and why."""
    output = output_items(trajectory)
    cut = output[0]["status"] == "incomplete"
    return response | {
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else completed,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": _usage(trajectory),
        "nightschool": oai.extension_of(trajectory),
    }


def failed(response: dict[str, Any], message: str, status: int) -> dict[str, Any]:
    """The response of a run that ended in an error, by the error's HTTP status."""
    codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    return response | {"status": "failed", "error": {"code": codes.get(status, "server_error"), "message": message}}


def _usage(trajectory: Trajectory) -> dict[str, Any]:
    used = oai.usage(trajectory)
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }
