"""The compact text form of tool calls that a small model speaks, and its grammar.

Everywhere in Nightschool a conversation is OpenAI messages with `tool_calls`. A model of 135M
parameters does not produce that JSON (spike: 0 of 120 replies), so at the model seam, and in the
trainer, the same messages are rendered into one line per action:

    {"tool_calls": [{"function": {"name": "calculator", "arguments": "{\"expression\": \"1+2\"}"}}]}
        <->  Action: calc(1+2)
    {"role": "tool", "content": "3"}   ->  {"role": "user", "content": "Observation: 3"}
    {"role": "assistant", "content": "3"}   <->  Action: finish(3)

One codec serves both the served prompt and the training text, so they cannot differ. A conversation
without tools passes through unchanged: plain chat stays plain.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from memory.records import MALFORMED, Message, new_id, text_of

FINISH = "finish"
MIN_ACTION_CHARS = 60

SHORT_NAMES: dict[str, tuple[str, str]] = {
    "calculator": ("calc", "expression"),
    "python": ("python", "code"),
}
"""Tool name -> (its name in an action line, the one string argument the parentheses hold)."""

_FREE = r"[^\n]"
_NESTED = r"\(([^()\n]|\([^()\n]*\))*\)"
_BALANCED = rf"([^()\n]|{_NESTED})"
_CALCULATION = (
    r"([-+*/%=.0-9 ]|\"[^\"\n]*\"|[a-z][-+*/= ]|"
    rf"(gcd|lcm|count|solve|abs|min|max|round|sqrt)?{_NESTED})"
)
_INSIDE: dict[str, str] = {"calculator": _CALCULATION}
"""What may stand between a call's parentheses, as a regex of one piece; other tools take anything."""

_ACTION = re.compile(r"^\s*Action:\s*([A-Za-z_][A-Za-z0-9_]*)\((.*)\)\s*$", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What a model's line says to do: call `tool` with `arguments`, or answer (`tool` is None)."""

    tool: str | None
    arguments: dict[str, Any]
    answer: str | None = None


def grammar(tools: list[str], max_chars: int = MIN_ACTION_CHARS, *, answer_only: bool = False) -> str | None:
    """The regex of a well-formed action line for the engine's structured outputs.

    Parentheses must balance (quoted text aside), so the first one that closes the call ends the line: a
    small model that would ramble on after the right expression has acted instead. `max_chars` bounds
    what stands between them, so that a line closes inside its token budget. `answer_only` leaves no
    tool to call. None without tools: plain chat is not constrained.
    """
    if not tools:
        return None
    lines = (
        [] if answer_only else [rf"{_short(name)[0]}\({_INSIDE.get(name, _FREE)}{{1,{max_chars}}}\)" for name in tools]
    )
    lines.append(rf"{FINISH}\({_BALANCED}{{1,{max_chars}}}\)")
    return f"Action: ({'|'.join(lines)})"


def parse(text: str, tools: list[str]) -> Action | None:
    """Read a model's line; None when it is no well-formed action over `tools`."""
    first_line = text.strip().split("\n", 1)[0] if "python" not in tools else text.strip()
    match = _ACTION.match(first_line)
    if match is None:
        return None
    name, inside = match.group(1), match.group(2)
    if not inside.strip():
        return None
    if name == FINISH:
        return Action(tool=None, arguments={}, answer=_unescape(inside))
    for tool in tools:
        short, argument = _short(tool)
        if name == short:
            return Action(tool=tool, arguments={argument: _unescape(inside)})
    return None


def assistant_message(action: Action) -> Message:
    """The OpenAI assistant message of an action, arguments as a JSON string."""
    if action.tool is None:
        return {"role": "assistant", "content": action.answer or ""}
    function = {"name": action.tool, "arguments": json.dumps(action.arguments, ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": new_id("call"), "type": "function", "function": function}],
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
    if role != "assistant" or not tools or message.get("name") == MALFORMED:
        return {"role": role, "content": text_of(message), **mark}
    calls = message.get("tool_calls")
    if not calls:
        return {"role": role, "content": f"Action: {FINISH}({_escape(text_of(message))})", **mark}
    return {"role": role, "content": "\n".join(_call_line(call["function"]) for call in calls), **mark}


def _call_line(function: dict[str, Any]) -> str:
    short, argument = _short(function["name"])
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
