"""Uploaded training files: OpenAI's supervised and preference JSONL as tasks and examples.

A line is laid out like everything else that teaches: as the agent would be served its question. So a
line's last turns, after its last user message, are what is learned; what stands before them is context.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.tools import check_tools
from distill.runs import flaw_of, served_form, task_messages
from memory.errors import ConfigError
from memory.records import DEFAULT_WORKLOAD, Example, ExampleKind, Message, Task, content_hash

RECIPE = "file"
Method = Literal["supervised", "dpo"]


class _Extension(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tools: list[str] | None = None
    workload: str = Field(default=DEFAULT_WORKLOAD, min_length=1, max_length=200)


class _Supervised(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=2)
    nightschool: _Extension = Field(default_factory=_Extension)


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1)


class _Preference(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: _Input
    preferred_output: list[Message] = Field(min_length=1, max_length=1)
    non_preferred_output: list[Message] = Field(min_length=1, max_length=1)
    nightschool: _Extension = Field(default_factory=_Extension)


def read_upload(
    lines: Iterable[str], method: Method, *, file_id: str, tenant: str, tools: list[str]
) -> Iterator[tuple[Task, Example]]:
    """Every line as a task and an example; ids follow from the file, so reading it again gives the same.

    `tools`: the agent's own tools where a line's `nightschool.tools` does not say otherwise. Raises
    ConfigError, naming the line, for the first one that cannot be trained on.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _read_line(line, method, [file_id, number], tenant, tools)
        except (ValueError, RecursionError, ConfigError) as exc:
            raise ConfigError(f"line {number} of the training file: {_said(exc)}") from exc


def _read_line(line: str, method: Method, origin: list[Any], tenant: str, tools: list[str]) -> tuple[Task, Example]:
    value = json.loads(line)
    if method == "supervised":
        supervised = _Supervised.model_validate(value)
        asked, run = _split(supervised.messages)
        extension, chosen, rejected = supervised.nightschool, None, None
        _check(run, _offered(extension, tools))
        run = served_form(run)
    else:
        pair = _Preference.model_validate(value)
        asked, run = _split(pair.input.messages)
        extension, chosen, rejected = pair.nightschool, pair.preferred_output, pair.non_preferred_output
        if run:
            raise ValueError("input.messages must end with the user's message")
        for side in (chosen, rejected):
            _check(side, _offered(extension, tools))
    task = Task(
        id=f"task_{content_hash(origin)[:32]}",
        tenant=tenant,
        workload=extension.workload,
        messages=asked,
        tools=extension.tools,
        source="file",
    )
    example = Example(
        id=f"ex_{content_hash([*origin, method])[:32]}",
        recipe=RECIPE,
        kind=ExampleKind.SFT if method == "supervised" else ExampleKind.DPO,
        tenant=tenant,
        workload=task.workload,
        task_id=task.id,
        tools=tools if task.tools is None else task.tools,
        messages=task_messages(task) + run,
        chosen=chosen,
        rejected=rejected,
        sources=[str(origin[0])],
    )
    return task, example


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """(up to the last user message, what follows it)"""
    for message in messages:
        if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise ValueError(f"a message has the role {message.get('role')!r}")
        unknown = set(message) - {"role", "content", "tool_calls", "tool_call_id"}
        if unknown:
            raise ValueError(f"unsupported message field {sorted(unknown)[0]!r}")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("there is no user message")
    return messages[: users[-1] + 1], messages[users[-1] + 1 :]


def _offered(extension: _Extension, tools: list[str]) -> list[str]:
    """The line's tools; ConfigError for one that there is not: no prompt could be laid out with it."""
    return tools if extension.tools is None else check_tools(extension.tools)


def _check(run: list[Message], tools: list[str]) -> None:
    flaw = flaw_of(run, tools)
    if flaw:
        raise ValueError(flaw)


def _said(exc: ValueError | RecursionError | ConfigError) -> str:
    if isinstance(exc, ValidationError):
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {'this field is not supported' if first['type'] == 'extra_forbidden' else first['msg']}"
    if isinstance(exc, json.JSONDecodeError):
        return f"no JSON ({exc.msg} at column {exc.colno})"
    return str(exc) or type(exc).__name__
