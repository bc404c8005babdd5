"""Which run a request goes on with: the one whose client-side tool calls it brings the results of.

A client sends the whole conversation each time. The ids of our tool calls name their run, so what that run
was shown (system prompt, recalled block) is reused to the letter, and the turns become one trajectory.
"""

from __future__ import annotations

from typing import Any

from agent.client_tools import run_of_call
from memory.errors import NotFoundError
from memory.ledger import Ledger
from memory.records import Message, StopReason, Task, Trajectory, text_of


def predecessor(ledger: Ledger, task: Task, tools: list[str]) -> Trajectory | None:
    """The run that this task goes on with, of the same tenant; None when it begins anew.

    It must have ended in exactly these calls, after exactly these messages, with these tools (`tools`: our
    own ones), and the client must have added results, and at most words of the user, since.
    """
    last = max((i for i, message in enumerate(task.messages) if message.get("tool_calls")), default=None)
    if last is None or not task.client_tools:
        return None
    run_id = run_of_call(task.messages[last]["tool_calls"][0]["id"])
    if run_id is None or any(m["role"] not in ("tool", "user") for m in task.messages[last + 1 :]):
        return None
    try:
        run = ledger.get_trajectory(run_id, tenant=task.tenant)
        asked = ledger.get_task(run.task_id, tenant=task.tenant)
    except NotFoundError:
        return None
    same = (
        run.stop_reason is StopReason.TOOL_CALLS
        and run.workload == task.workload
        and run.client_tools == task.client_tools
        and run.tools == tools
        and _said(asked.messages) == _said(task.messages[:last])
        and _said(run.messages[-1:]) == _said(task.messages[last : last + 1])
    )
    return run if same else None


def _said(messages: list[Message]) -> list[tuple[Any, ...]]:
    """What of messages must be the same, whatever else a client's library left in them."""
    return [
        (
            message["role"],
            text_of(message),
            message.get("name"),
            message.get("tool_call_id"),
            [(call["id"], call["function"]) for call in message.get("tool_calls") or []],
        )
        for message in messages
    ]
