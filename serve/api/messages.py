"""A request's messages: which of OpenAI's shapes are understood, and the form in which they are kept.

Kept is what has a meaning here: fields that are null go, a refusal is text like any other. What is not
understood (images, audio, custom tools, `function` messages) is refused by its place.
"""

from __future__ import annotations

import json
import re
from typing import Any

from memory.records import LOOKED_UP, MALFORMED, RECALLED, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "assistant": {"role", "content", "name", "refusal", "tool_calls"},
    "tool": {"role", "content", "tool_call_id"},
}
_NAME = re.compile(r"[^\s<|\\/>]{1,64}")


def checked_messages(messages: list[Message]) -> list[Message]:
    """The messages as they are kept; ValueError, naming the place, for one that is not understood.

    Every tool call must be answered, by `tool` messages right after it, and nothing else may be.
    """
    kept = [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    waiting: list[str] = []
    for i, message in enumerate(kept):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                known = f"; {waiting[0]!r} is" if waiting else ""
                raise ValueError(f"messages[{i}].tool_call_id: {message['tool_call_id']!r} is no open tool call{known}")
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            raise ValueError(f"messages[{i}]: expected a tool message that answers the tool call {waiting[0]!r}")
        waiting = [call["id"] for call in message.get("tool_calls") or []]
    if waiting:
        raise ValueError(f"messages: no tool message answers the tool call {waiting[0]!r}")
    if not any(m["role"] == "user" for m in kept):
        raise ValueError("messages must hold at least one message with role 'user'")
    return kept


def check_message(message: Message, where: str) -> Message:
    """The message as it is kept. ValueError, naming the place, unless it is a text message of OpenAI's chat format."""
    said = {name: held for name, held in message.items() if held is not None and (held or name != "annotations")}
    role = said.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: expected system, developer, user, assistant or tool, got {_shown(role)}")
    unknown = set(said) - _FIELDS.get(role, {"role", "content", "name"})
    if unknown:
        raise ValueError(f"{where}: unsupported field {min(unknown)!r}")
    if "name" in said:
        _check_name(said["name"], f"{where}.name")
    if role == "tool" and not isinstance(said.get("tool_call_id"), str):
        raise ValueError(f"{where}.tool_call_id: expected the id of a tool call")
    if "tool_calls" in said:
        said["tool_calls"] = _tool_calls(said["tool_calls"], f"{where}.tool_calls")
    refusal = said.pop("refusal", None)
    if refusal is not None and not isinstance(refusal, str):
        raise ValueError(f"{where}.refusal: expected a text, got {_shown(refusal)}")
    if "content" in said:
        said["content"] = _content(said["content"], role, f"{where}.content")
    elif refusal is not None:
        said["content"] = refusal
    elif "tool_calls" in said:
        said["content"] = None
    else:
        raise ValueError(f"{where}.content: expected a string or text parts, got nothing")
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{where}: holds half a surrogate pair, which is no text") from exc
    return said


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: expected up to 64 characters without spaces, got {_shown(name)}")
    if name in (RECALLED, LOOKED_UP, MALFORMED):
        raise ValueError(f"{where}: {name!r} marks messages of the service itself; choose another name")


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}: expected a string or text parts, got {_shown(content)}")
    parts: list[dict[str, str]] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        key = {"text": "text", "refusal": "refusal" if role == "assistant" else None}.get(str(kind))
        if key is None or not isinstance(part.get(key), str):
            raise ValueError(f"{where}[{i}]: only text parts are understood, got {_shown(kind or part)}")
        more = {name for name, held in part.items() if held is not None} - {"type", key}
        if more:
            raise ValueError(f"{where}[{i}]: unsupported field {min(more)!r}")
        parts.append({"type": "text", "text": part[key]})
    return parts


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{where}: expected a list of tool calls, got {_shown(calls)}")
    kept: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise ValueError(f"{at}: only function calls are understood")
        function = call.get("function")
        if not isinstance(call.get("id"), str) or not call["id"] or not isinstance(function, dict):
            raise ValueError(f"{at}: expected an id and a function")
        # `index` is what a client that put a stream's deltas together may have left there.
        more = {name for name, held in call.items() if held is not None} - {"id", "type", "function", "index"}
        more |= set(function) - {"name", "arguments"}
        if more:
            raise ValueError(f"{at}: unsupported field {min(more)!r}")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name or not _is_object(arguments):
            raise ValueError(f"{at}.function: expected a name, and arguments as the text of a JSON object")
        kept.append({"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}})
    if len({call["id"] for call in kept}) != len(kept):
        raise ValueError(f"{where}: two calls share an id")
    return kept


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _shown(value: Any) -> str:
    return repr(value)[:80]
