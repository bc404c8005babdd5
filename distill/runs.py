"""What a run is to the recipes: whole, the model's own, comparable with another run.

Owns reading a run out of a trajectory or a correction, and its normal form. Owns no judgement of
whether it was good (`distill.snapshot`) or may teach (`distill.credit`).

A run here is the list of messages after the task's own: assistant turns and tool results, the last
one an assistant answer.
"""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

from agent.codec import offered
from agent.tools import LOOKUPS
from memory.records import MALFORMED, RECALLED, Message, Task, Trajectory, text_of

Action = tuple[str, ...]
"""One assistant turn in normal form: ("say", text) or ("call", name, arguments, name, arguments, …)."""

MISTAKE = "mistake"
"""The `name` that a recipe gives to a turn that is to be read and not learned: `distill.layout` keeps the loss off."""

HINT = "fb_"
"""What the id of recalled feedback begins with: a hint is shown as a principle, under its own id."""

_SYSTEM_ROLES = ("system", "developer")
_KEPT = ("role", "content", "tool_calls", "tool_call_id")


def task_messages(task: Task) -> list[Message]:
    """The task's messages as they stand after the system turn in a prompt."""
    return [m for m in task.messages if m.get("role") not in _SYSTEM_ROLES]


def attempt_of(trajectory: Trajectory, task: Task) -> list[Message] | None:
    """What the agent did, as it came, good or bad; None when the trajectory is not one of this task."""
    asked, own = task_messages(task), trajectory.own_messages
    if [_said(m) for m in own[: len(asked)]] != [_said(m) for m in asked]:
        return None
    return own[len(asked) :]


def run_of(trajectory: Trajectory, task: Task) -> list[Message] | None:
    """The trajectory's run, fit to be learned from; None when it is not a whole one.

    A turn marked `MALFORMED` and the reminder after it are cut: what is left is the run as it should
    have gone.
    """
    attempt = attempt_of(trajectory, task)
    if attempt is None:
        return None
    kept: list[Message] = []
    reminded = False
    for message in attempt:
        if message.get("name") == MALFORMED:
            reminded = True
            continue
        if not (reminded and message.get("role") == "user"):
            kept.append(_bare(message))
        reminded = False
    return None if flaw_of(kept, callable_tools(trajectory)) else kept


def hints_shown(trajectory: Trajectory) -> list[str]:
    """The ids of the users' hints that stood in the run's prompt (`distill.hints`)."""
    return [item.id for item in trajectory.recalled if item.id.startswith(HINT) and not item.withheld]


def callable_tools(trajectory: Trajectory) -> list[str]:
    """The names that a call in this run may have: our tools' and the client's."""
    return [*trajectory.tools, *(definition["function"]["name"] for definition in trajectory.client_tools)]


def rendered_tools(trajectory: Trajectory) -> list[str]:
    """The same as an example carries them, so that it is rendered as it was served."""
    return offered(trajectory.tools, trajectory.client_tools)


def corrected_run(value: Any, task: Task, tools: list[str]) -> list[Message]:
    """A correction's value as a run: a string is the final answer, a list is a better run.

    A list may be the whole edited conversation: system, recalled and the task's own messages are
    taken off its front. Calls without ids get them and their results are paired in order; the run comes in
    its `served_form`. Raises ValueError with the reason when it is no whole run over `tools`.
    """
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("a correction is an answer or a list of messages")
    if not all(isinstance(m, dict) for m in value):
        raise ValueError("a correction's messages must be objects")
    run = [_bare(m) for m in value if m.get("role") not in _SYSTEM_ROLES and m.get("name") != RECALLED]
    asked = task_messages(task)
    if [_said(m) for m in run[: len(asked)]] == [_said(m) for m in asked]:
        run = run[len(asked) :]
    run = _with_call_ids(run)
    flaw = flaw_of(run, tools)
    if flaw:
        raise ValueError(flaw)
    try:
        json.dumps(run, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as exc:
        raise ValueError("the correction holds what no JSON text can hold") from exc
    return served_form(run)


def served_form(run: list[Message]) -> list[Message]:
    """A whole run in turns that a served model could have taken: one call each, and no words beside it.

    Calls made side by side become turns of their own, each with its result behind it.
    """
    turns: list[Message] = []
    for at, message in enumerate(run):
        calls = message.get("tool_calls") or []
        if message.get("role") == "assistant":
            turns += [] if calls else [message]
            results = {m["tool_call_id"]: m for m in takewhile(lambda m: m.get("role") == "tool", run[at + 1 :])}
            for call in calls:
                turns += [{**message, "content": None, "tool_calls": [call]}, results[call["id"]]]
    return turns


def flaw_of(run: list[Message], tools: list[str]) -> str | None:
    """Why these messages are no whole run; None when they are one."""
    waiting: list[str] = []
    answered = False
    for message in run:
        role, content = message.get("role"), message.get("content")
        if answered:
            # Its answer is what a run is judged by: an earlier one would be learned unjudged.
            return "an assistant message without tool calls is the run's answer, so nothing may follow it"
        if content is not None and not isinstance(content, (str, list)):
            return f"a message's content must be text, got {type(content).__name__}"
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                return "a tool message answers no open tool call"
            waiting.remove(message["tool_call_id"])
        elif role == "assistant":
            if waiting:
                return "a tool call is left without its result"
            flaw, waiting = _calls_of(message, tools)
            if flaw:
                return flaw
            answered = not waiting
            if answered and not text_of(message).strip():
                return "an assistant message is empty"
        else:
            return f"a run holds assistant and tool messages only, got {role!r}"
    if not run or run[-1].get("role") != "assistant" or waiting:
        return "the last message is not the assistant's answer"
    return None


def looked_up(run: list[Message]) -> bool:
    """Whether a run shows what memory or documents say, whoever recorded it: such text is never remembered again."""
    calls = (call for message in run for call in message.get("tool_calls") or [])
    return any(_function(call).get("name") in LOOKUPS for call in calls)


def answer_of(run: list[Message]) -> str:
    """A whole run's final answer, trimmed."""
    return text_of(run[-1]).strip()


def action_of(message: Message) -> Action:
    """An assistant turn in normal form: white space and the order of arguments do not matter."""
    calls = message.get("tool_calls") or []
    if not calls:
        return ("say", _squeeze(text_of(message)))
    parts = [part for call in calls for part in (str(_function(call).get("name")), _arguments(_function(call)))]
    return ("call", *parts)


def actions_of(run: list[Message]) -> tuple[Action, ...]:
    """A run's assistant turns in normal form: runs with equal ones taught the same."""
    return tuple(action_of(m) for m in run if m.get("role") == "assistant")


def by_usefulness(run: list[Message], tools: list[str]) -> tuple[bool, int, int]:
    """Sort key, best first: runs that show their work with the offered tools, then the shortest.

    An answer without a call where tools were offered may be luck, and teaches guessing.
    """
    shows_work = any(m.get("tool_calls") for m in run) or not tools
    return (not shows_work, len(run), sum(len(part) for action in actions_of(run) for part in action))


def _bare(message: Message) -> Message:
    return {key: message[key] for key in _KEPT if key in message}


def _said(message: Message) -> tuple[str, str]:
    return str(message.get("role")), _squeeze(text_of(message))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _function(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _arguments(function: dict[str, Any]) -> str:
    raw = function.get("arguments")
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        return _squeeze(str(raw))
    if isinstance(value, dict):
        value = {key: _squeeze(item) if isinstance(item, str) else item for key, item in value.items()}
    return json.dumps(value, sort_keys=True)


def _calls_of(message: Message, tools: list[str]) -> tuple[str | None, list[str]]:
    """(what is wrong with the message's tool calls, the ids it waits for)."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        return "tool_calls must be a list", []
    waiting: list[str] = []
    for call in calls:
        function = _function(call)
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call.get("id"), str):
            return "a tool call needs an id, a function name and arguments as a JSON string", []
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            return f"the arguments of {name!r} are not a JSON object", []
        if name not in tools:
            return f"the task does not offer the tool {name!r}", []
        waiting.append(call["id"])
    if len(set(waiting)) != len(waiting):
        return "two tool calls share an id", []
    return None, waiting


def _with_call_ids(run: list[Message]) -> list[Message]:
    """Ids for calls that have none, arguments as JSON strings, results without an id paired in order."""
    waiting: list[str] = []
    numbered: list[Message] = []
    count = 0
    for message in run:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(calls, list):
            named: list[Any] = []
            for call in calls:
                function = _function(call)
                if not function:
                    named.append(call)
                    continue
                count += 1
                if isinstance(function.get("arguments"), dict):
                    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
                # Nine characters: some chat templates refuse ids of another length.
                named.append(
                    {"type": "function", **call, "id": call.get("id") or f"call{count:05d}"} | {"function": function}
                )
            message = {**message, "tool_calls": named}
            waiting = [call["id"] for call in named if isinstance(call, dict) and isinstance(call.get("id"), str)]
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None and waiting:
                message = {**message, "tool_call_id": waiting[0]}
            if message.get("tool_call_id") in waiting:
                waiting.remove(message["tool_call_id"])
        numbered.append(message)
    return numbered
