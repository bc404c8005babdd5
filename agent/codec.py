"""The compact text form of tool calls that a small model speaks, and its grammar.

Everywhere in Nightschool a conversation is OpenAI messages with `tool_calls`. A model of 135M
parameters does not produce that JSON (spike: 0 of 120 replies), so at the model seam, and in the
trainer, the same messages are rendered into one line per action:

    {"tool_calls": [{"function": {"name": "calculator", "arguments": "{\"expression\": \"1+2\"}"}}]}
        <->  Action: calc(1+2)
    {"role": "tool", "content": "3"}   ->  {"role": "user", "content": "Observation: 3"}
    {"role": "assistant", "content": "3"}   <->  Action: finish(3)

A tool that the client runs has any number of arguments: `Action: get_weather({"city": "Paris"})`. In lists
of tool names it stands as `client:get_weather`, since it may share its name with one of ours.

One codec serves both the served prompt and the training text, so they cannot differ. A conversation
without tools passes through unchanged: plain chat stays plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.client_tools import ClientTool, arguments_of, one_line, pattern
from memory.records import MALFORMED, Message, new_id, text_of

FINISH = "finish"
CLIENT = "client:"
"""What the names of the client's tools begin with in lists of tool names."""

MAX_COUNTED = 200
"""Longer texts are left unbounded: engines unroll a counted repetition into as many states."""
MIN_ACTION_CHARS = 60

SHORT_NAMES: dict[str, tuple[str, str]] = {
    "calculator": ("calc", "expression"),
    "python": ("python", "code"),
    "search_knowledge": ("search_knowledge", "query"),
    "search_experience": ("search_experience", "query"),
}
"""Tool name -> (its name in an action line, the one string argument the parentheses hold)."""

_FREE = r"[^\n]"
_NESTED = r"\(([^()\n]|\([^()\n]*\))*\)"
_BALANCED = rf"([^()\n]|{_NESTED})"
_CALCULATION = (
    r"([-+*/%=.0-9 ]|\"[^\"\n]*\"|[a-z][-+*/= ]|"
    rf"(gcd|lcm|count|solve|abs|min|max|round|sqrt)?{_NESTED})"
)
_INSIDE: dict[str, str] = {
    "calculator": _CALCULATION,
    "search_knowledge": _BALANCED,
    "search_experience": _BALANCED,
}
"""What may stand between a call's parentheses, as a regex of one piece; other tools take anything."""

_ACTION = re.compile(r"^\s*Action:\s*([A-Za-z0-9_-]+)\((.*)\)\s*$", re.DOTALL)
_FINISH_BEGINS = re.compile(rf"^\s*Action:\s*{FINISH}\(")


@dataclass(frozen=True)
class Action:
    """What a model's line says to do: call `tool` with `arguments`, or answer (`tool` is None)."""

    tool: str | None
    arguments: dict[str, Any]
    answer: str | None = None
    client_arguments: str | None = None
    """The JSON text of a call that the client runs; None for our own tools."""


def offered(tools: list[str], client_tools: list[dict[str, Any]]) -> list[str]:
    """The names of our own tools and of a client's definitions in one list."""
    return [*tools, *(f"{CLIENT}{definition['function']['name']}" for definition in client_tools)]


def grammar(
    tools: list[str],
    max_chars: int = MIN_ACTION_CHARS,
    *,
    answer_only: bool = False,
    client: Sequence[ClientTool] = (),
    must_call: bool = False,
) -> str | None:
    """The regex of a well-formed action line for the engine's structured outputs.

    Parentheses must balance (quoted text aside), so the first one that closes the call ends the line: a
    small model that would ramble on after the right expression has acted instead. `max_chars` bounds
    what stands between them, so that a line closes inside its token budget. `answer_only` leaves none of
    our tools to call. `client`: the client's tools that may be called now; with `must_call` one of them is
    the only way to end. None without tools: plain chat is not constrained.
    """
    if not tools:
        return None
    own = [] if answer_only else [name for name in tools if not name.startswith(CLIENT)]
    lines = [rf"{_short(name)[0]}\({_INSIDE.get(name, _FREE)}{{1,{max_chars}}}\)" for name in own]
    lines += [rf"{tool.name}\({pattern(tool)}\)" for tool in client]
    if not must_call:
        unbounded = any(name.startswith(CLIENT) for name in tools) and max_chars > MAX_COUNTED
        lines.append(rf"{FINISH}\({_BALANCED}{'+' if unbounded else f'{{1,{max_chars}}}'}\)")
    return f"Action: ({'|'.join(lines)})"


def parse(text: str, tools: list[str], client: Sequence[ClientTool] = ()) -> Action | None:
    """Read a model's line; None when it is no well-formed action over `tools`.

    `client`: the client's tools that may be called now; arguments that do not fit their schema are no action.
    """
    first_line = text.strip().split("\n", 1)[0] if "python" not in tools else text.strip()
    match = _ACTION.match(first_line)
    if match is None:
        return None
    name, inside = match.group(1), match.group(2)
    if not inside.strip():
        return None
    if name == FINISH:
        return Action(tool=None, arguments={}, answer=_unescape(inside))
    for tool in client:
        if name == tool.name:
            arguments = arguments_of(tool, inside)
            return None if arguments is None else Action(tool.name, json.loads(arguments), client_arguments=arguments)
    for tool in tools:
        short, argument = _short(tool)
        if name == short and not tool.startswith(CLIENT):
            return Action(tool=tool, arguments={argument: _unescape(inside)})
    return None


def settled_answer(text: str, tools: list[str]) -> str:
    """What of the answer is certain, whatever follows, while a line is still being generated.

    Empty until the line has begun as an answer. Held back: what may belong to the line's end (a closing
    parenthesis, space) and half an escape. It only grows, and what `parse` reads in the end begins with it.
    """
    if not tools:
        return text if text.strip() else ""
    inside = _inside_of_answer(text, tools)
    end = len(inside)
    while end and (inside[end - 1] == ")" or inside[end - 1].isspace()):
        end -= 1
    backslashes = end - len(inside[:end].rstrip("\\"))
    return _unescape(inside[: end - backslashes % 2]).strip()


def cut_answer(text: str, tools: list[str]) -> str | None:
    """The answer of a line that ran out of tokens, as far as it came; None when it had not begun."""
    inside = _inside_of_answer(text, tools)
    return _unescape(inside).strip() or None


def _inside_of_answer(text: str, tools: list[str]) -> str:
    begun = _FINISH_BEGINS.match(text)
    if begun is None:
        return ""
    inside = text[begun.end() :]
    return inside if "python" in tools else inside.split("\n", 1)[0]


def assistant_message(action: Action, call_id: str | None = None) -> Message:
    """The OpenAI assistant message of an action, arguments as a JSON string."""
    if action.tool is None:
        return {"role": "assistant", "content": action.answer or ""}
    arguments = action.client_arguments or json.dumps(action.arguments, ensure_ascii=False)
    function = {"name": action.tool, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id or new_id("call"), "type": "function", "function": function}],
    }


def wire(messages: list[Message], tools: list[str]) -> list[Message]:
    """OpenAI messages as the plain role/content messages that the chat template renders.

    Same number, same order; `name` marks are kept (the trainer masks recalled turns by them).
    """
    return [_wire_one(message, tools) for message in messages]


def _wire_one(message: Message, tools: list[str]) -> Message:
    mark = {"name": message["name"]} if message.get("name") else {}
    role = message["role"]
    if role == "tool":
        return {"role": "user", "content": f"Observation: {text_of(message)}", **mark}
    calls = message.get("tool_calls") if message.get("name") != MALFORMED else None
    if calls:
        lines = [text_of(message), *(_call_line(call["function"], tools) for call in calls)]
        return {"role": role, "content": "\n".join(line for line in lines if line), **mark}
    if role != "assistant" or not tools or message.get("name") == MALFORMED:
        return {"role": role, "content": text_of(message), **mark}
    return {"role": role, "content": f"Action: {FINISH}({_escape(text_of(message))})", **mark}


def _call_line(function: dict[str, Any], tools: list[str]) -> str:
    name = function["name"]
    if name not in tools and (name not in SHORT_NAMES or not tools or f"{CLIENT}{name}" in tools):
        return f"Action: {name}({one_line(function['arguments'])})"
    short, argument = _short(name)
    arguments = json.loads(function["arguments"])
    inside = arguments.get(argument)
    if not isinstance(inside, str):
        inside = function["arguments"]
    return f"Action: {short}({_escape(inside)})"


def _short(tool: str) -> tuple[str, str]:
    return SHORT_NAMES.get(tool, (tool, "input"))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _unescape(text: str) -> str:
    return re.sub(r"\\(n|\\)", lambda m: "\n" if m.group(1) == "n" else "\\", text)
