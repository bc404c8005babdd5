"""What the model reads before it acts: the system prompt and the recalled block.

`compose` is the only place that lays a prompt out, for serving, for evaluation and for training
examples alike: the trained prompt is the served prompt.
"""

from __future__ import annotations

from agent.codec import SHORT_NAMES
from memory.recall import Recall
from memory.records import RECALLED, Message, Task, text_of

EXPERIENCE_OPEN = "<experience>"
EXPERIENCE_CLOSE = "</experience>"

_RULES = (
    "You solve tasks step by step. Reply with exactly one line. To use a tool:\n"
    "{calls}\n"
    "After the Observation, when you know the answer:\n"
    "Action: finish(answer)\n"
)
"""Plain words stand for the blanks: a small model copies `<expression>` to the letter."""

_USAGE: dict[str, tuple[str, str]] = {
    "calculator": (
        "expression",
        'calc understands + - * / and gcd(a, b), lcm(a, b), count("letter", "text"), solve(equation).',
    ),
    "python": ("code", "python runs the code and shows what it prints."),
}


def system_prompt(tools: list[str], recall: Recall | None) -> str | None:
    """The system prompt for these tools with the recalled principles; None when there is nothing to say."""
    parts: list[str] = []
    if tools:
        calls = "\nor\n".join(f"Action: {SHORT_NAMES[tool][0]}({_USAGE[tool][0]})" for tool in tools)
        parts.append(_RULES.format(calls=calls) + "\n".join(_USAGE[tool][1] for tool in tools))
    if recall and recall.principles:
        lines = [f"- ({p.kind.value}, score {p.score:.2f}) {p.text}" for p in recall.principles]
        parts.append("\n".join([EXPERIENCE_OPEN, *lines, EXPERIENCE_CLOSE]))
    return "\n\n".join(parts) or None


def showable(recall: Recall, tools: list[str]) -> Recall:
    """What of a recall fits this task: a past run that used a tool which is not offered now would mislead."""
    runs = [run for run in recall.runs if _used(run.messages) <= set(tools)]
    shown = {run.id for run in runs} | {principle.id for principle in recall.principles}
    return Recall(items=[item for item in recall.items if item.id in shown], principles=recall.principles, runs=runs)


def _used(messages: list[Message]) -> set[str]:
    return {call["function"]["name"] for message in messages for call in message.get("tool_calls") or []}


def compose(task: Task, tools: list[str], recall: Recall | None) -> list[Message]:
    """Everything before the run's first assistant turn: system, recalled runs, the task's messages.

    Recalled runs are chat turns, each message marked `name="recalled"`; those whose tools are not offered
    are left out (`showable`). A task's own system message stands after ours in the same system turn.
    """
    recall = showable(recall, tools) if recall else None
    own_system = "\n\n".join(text_of(m) for m in task.messages if m["role"] in ("system", "developer"))
    system = "\n\n".join(part for part in (system_prompt(tools, recall), own_system) if part)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for run in recall.runs if recall else []:
        messages += [{**message, "name": RECALLED} for message in run.messages]
    return messages + [m for m in task.messages if m["role"] not in ("system", "developer")]
