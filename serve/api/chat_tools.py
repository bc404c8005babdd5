"""A request's `tools`, `tool_choice` and `response_format`: checked at the door, and what they mean for the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agent.client_tools import NAME, check_schema
from agent.codec import FINISH, SHORT_NAMES
from memory.errors import ConfigError


def _is_schema(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            check_schema(value)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
    return value


def _is_function(value: Any) -> Any:
    if value != "function":
        raise ValueError(f"only tools of type 'function' are understood, got {str(value)[:80]!r}")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_is_schema)]
FunctionType = Annotated[Literal["function"], BeforeValidator(_is_function)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Function(_Closed):
    """A function of the client's. `strict` is always so: arguments are generated and checked by the schema."""

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(_Closed):
    """A tool that the client runs."""

    type: FunctionType
    function: Function


class Named(_Closed):
    """The name of one of `tools`."""

    name: str


class NamedTool(_Closed):
    """`tool_choice` of one tool."""

    type: Literal["function"]
    function: Named


class AllowedTools(_Closed):
    """Which of `tools` may be called, and whether one must."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(_Closed):
    """`tool_choice` of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice


class JsonSchema(_Closed):
    """The schema of an answer."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Closed):
    """OpenAI's `response_format`, which the engine enforces."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def checked_tools(tools: list[Tool]) -> list[Tool]:
    """ValueError for two tools of one name, or one that is taken."""
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"tools[{i}].function.name: there are two tools {name!r}")
        if name == FINISH:
            raise ValueError(f"tools[{i}].function.name: {FINISH!r} is how the model answers; choose another name")
    return tools


def checked_choice(choice: ToolChoice | None, tools: list[Tool]) -> ToolChoice | None:
    """ValueError for a choice of a tool that is not there."""
    known = {tool.function.name for tool in tools}
    if not known and choice not in (None, "none", "auto"):
        raise ValueError("it needs `tools` to choose from")
    missing = (may_call(choice) or frozenset()) - known
    if missing:
        raise ValueError(f"there is no tool {min(missing)!r} in `tools`")
    return choice


def clash(own: list[str], tools: list[Tool]) -> str | None:
    """The name of a client's tool that one of our own, used beside it, goes by; None when there is none."""
    taken = {part for name in own for part in (name, SHORT_NAMES.get(name, (name,))[0])}
    return min(taken & {tool.function.name for tool in tools}, default=None)


def may_call(choice: ToolChoice | None) -> frozenset[str] | None:
    """The names of the tools that may be called; None = all."""
    if choice == "none":
        return frozenset()
    if isinstance(choice, NamedTool):
        return frozenset({choice.function.name})
    if isinstance(choice, AllowedToolChoice):
        return frozenset(tool.function.name for tool in choice.allowed_tools.tools)
    return None


def must_call(choice: ToolChoice | None) -> bool:
    """Whether one of them must be called."""
    if isinstance(choice, AllowedToolChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool)


def engine_format(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """What the engine is told of a `response_format`; None where there is nothing to enforce."""
    if wanted is None or wanted.type == "text":
        return None
    return wanted.model_dump(by_alias=True, exclude_none=True)
