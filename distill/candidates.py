"""Candidates: what the recipes made, without what must not or cannot be trained on.

Owns the checks of one example and the search for duplicates. Owns no caps (`distill.dataset`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from agent.codec import wire
from distill.recipes import load
from distill.runs import MISTAKE, task_messages
from distill.snapshot import Snapshot
from memory.records import MALFORMED, RECALLED, Example, ExampleKind, Message, content_hash, text_of


def candidates_of(snapshot: Snapshot, recipe_names: Iterable[str], dropped: Counter[str]) -> list[Example]:
    """The recipes' examples, in their order, without the unusable, the held-out and the duplicates.

    Of two examples that teach the same, the first recipe's stays. What is left out is counted in
    `dropped` by reason.
    """
    recipes = load(recipe_names).values()
    return usable(snapshot, (example for recipe in recipes for example in recipe(snapshot)), dropped)


def usable(snapshot: Snapshot, examples: Iterable[Example], dropped: Counter[str]) -> list[Example]:
    """Those of the examples that may be trained on, by the same checks as for the recipes' own."""
    kept: dict[str, Example] = {}
    reasons: dict[str, str | None] = {}
    for example in examples:
        reason = _flaw(snapshot, example)
        if reason is None:
            if example.task_id not in reasons:
                reasons[example.task_id] = snapshot.held_out_reason(snapshot.tasks[example.task_id])
            reason = reasons[example.task_id]
        if reason is None:
            duplicate = kept.setdefault(_lesson(example), example) is not example
            reason = "duplicate" if duplicate else None
        if reason is not None:
            dropped[reason] += 1
    return list(kept.values())


def _flaw(snapshot: Snapshot, example: Example) -> str | None:
    """What keeps a recipe's example out whatever it teaches; the built-in recipes make none of these."""
    task = snapshot.tasks.get(example.task_id)
    if task is None:
        return "task not in the snapshot"
    asked = task_messages(task)
    if example.messages[: len(asked)] != asked:
        return "does not begin with its task"
    sides = (example.chosen or [], example.rejected or [])
    turns = [*example.messages[len(asked) :], *sides[0], *sides[1]]
    if any(m.get("name") == RECALLED or m.get("role") == "system" for m in turns):
        return "holds recalled or system messages"
    if example.kind is ExampleKind.SFT:
        if len(example.messages) == len(asked) or example.messages[-1].get("role") != "assistant":
            return "does not end with an assistant turn"
        if any(m.get("name") == MALFORMED for m in turns):
            return "holds an unreadable turn"
        if turns[-1].get("name") == MISTAKE:
            return "ends with a mistake"
    else:
        if any(not side or {side[0].get("role"), side[-1].get("role")} != {"assistant"} for side in sides):
            return "a pair's sides must begin and end with an assistant turn"
        if any(m.get("role") not in ("assistant", "tool") for side in sides for m in side):
            return "a pair's sides must be assistant turns and tool results"
    if any(_has_parsed_arguments(m) for m in [*example.messages, *turns]):
        # As objects, Arrow would give every call the keys of all others, with null in them.
        return "a tool call's arguments are not a JSON string"
    try:
        said = [text_of(m) for m in wire(turns, example.tools)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "cannot be rendered"
    if example.kind is ExampleKind.DPO:
        before, chosen = len(turns) - len(sides[0]) - len(sides[1]), len(sides[0])
        if said[before : before + chosen] == said[before + chosen :]:
            return "both sides say the same"
    return None


def _has_parsed_arguments(message: Message) -> bool:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return any(isinstance(f, dict) and not isinstance(f.get("arguments"), str) for f in functions)


def _lesson(example: Example) -> str:
    """Hash of what an example teaches; the random ids of tool calls do not make a difference."""

    def plain(messages: list[Message] | None) -> list[Message] | None:
        if messages is None:
            return None
        return [
            {
                **{key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")},
                "calls": [call.get("function") for call in message.get("tool_calls") or []],
            }
            for message in messages
        ]

    parts = (plain(example.messages), plain(example.chosen), plain(example.rejected))
    return content_hash([example.kind, example.tenant, example.bare, *parts])
