"""What the model reads before it acts: the system prompt and the recalled block.

`compose` is the only place that lays a prompt out, for serving, for evaluation and for training
examples alike: the trained prompt is the served prompt.
"""

from __future__ import annotations

from typing import Any

from agent.client_tools import fits, signature, tools_of
from agent.codec import CLIENT, SHORT_NAMES
from memory.recall import Recall
from memory.records import RECALLED, Message, PastRun, Principle, Task, text_of

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
    "search_knowledge": ("question", "search_knowledge shows what the user's documents say about a question."),
    "search_experience": ("question", "search_experience shows lessons and solved tasks like the question."),
}


def system_prompt(
    tools: list[str], recall: Recall | None, client_tools: list[dict[str, Any]] | None = None
) -> str | None:
    """The system prompt for these tools with the recalled principles; None when there is nothing to say."""
    parts: list[str] = []
    if tools:
        own, client = [name for name in tools if not name.startswith(CLIENT)], tools_of(client_tools or [])
        calls = [f"Action: {SHORT_NAMES[tool][0]}({_USAGE[tool][0]})" for tool in own]
        calls += [f"Action: {signature(tool)}" for tool in client]
        usage = [_USAGE[tool][1] for tool in own]
        usage += [f"{tool.name}: {tool.description}" for tool in client if tool.description]
        parts.append((_RULES.format(calls="\nor\n".join(calls)) + "\n".join(usage)).rstrip("\n"))
    if recall and recall.principles:
        lines = [f"- ({p.kind.value}, score {p.score:.2f}) {p.text}" for p in recall.principles]
        parts.append("\n".join([EXPERIENCE_OPEN, *lines, EXPERIENCE_CLOSE]))
    return "\n\n".join(parts) or None


def showable(recall: Recall, tools: list[str], client_tools: list[dict[str, Any]] | None = None) -> Recall:
    """What of a recall fits this task: a past run that used a tool which is not offered now would mislead."""
    client = tools_of(client_tools or [])

    def fitting(item: Principle | PastRun) -> bool:
        calls = _calls(item) if isinstance(item, PastRun) else []
        return all(call["function"]["name"] in tools or any(fits(tool, call) for tool in client) for call in calls)

    fit = {item.id for item in (*recall.principles, *recall.runs, *recall.unshown) if fitting(item)}
    return Recall(
        items=[item for item in recall.items if item.id in fit],
        principles=recall.principles,
        runs=[run for run in recall.runs if run.id in fit],
        withheld=[item for item in recall.withheld if item.id in fit],
        unshown=[item for item in recall.unshown if item.id in fit],
    )


def _calls(run: PastRun) -> list[dict[str, Any]]:
    return [call for message in run.messages for call in message.get("tool_calls") or []]


def compose(task: Task, tools: list[str], recall: Recall | None) -> list[Message]:
    """Everything before the run's first assistant turn: system, recalled runs, the task's messages.

    Recalled runs are chat turns, each message marked `name="recalled"`; those whose tools are not offered
    are left out (`showable`). `tools` names ours and the client's (`codec.offered`). A task's own system
    message stands after ours in the same system turn.
    """
    recall = showable(recall, tools, task.client_tools) if recall else None
    own_system = "\n\n".join(text_of(m) for m in task.messages if m["role"] in ("system", "developer"))
    system = "\n\n".join(part for part in (system_prompt(tools, recall, task.client_tools), own_system) if part)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for run in recall.runs if recall else []:
        messages += [{**message, "name": RECALLED} for message in run.messages]
    return messages + [m for m in task.messages if m["role"] not in ("system", "developer")]
