"""The oracle: what a user who knows the answer would have done, for reasoning-gym tasks.

Owns the corrected run of the families in `ORACLE_FAMILIES`, made from a task's own metadata. It stands
for a user in the demo and in tests; nothing else may call it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from typing import Any

from evals.suites import CALCULATOR
from memory.errors import VerifierError
from memory.records import Message, Task


def _expression(meta: dict[str, Any]) -> str:
    return str(meta["expression"])


def _nested(function: str) -> Callable[[dict[str, Any]], str]:
    def build(meta: dict[str, Any]) -> str:
        numbers = [str(n) for n in meta["numbers"]]
        return reduce(lambda left, right: f"{function}({left}, {right})", numbers)

    return build


def _count(meta: dict[str, Any]) -> str:
    return f"count({_quoted(meta['target_letter'])}, {_quoted(' '.join(meta['span']))})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _solve(meta: dict[str, Any]) -> str:
    return f"solve({meta['equation']})"


ORACLE_FAMILIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "chain_sum": _expression,
    "products": _expression,
    "basic_arithmetic": _expression,
    "gcd": _nested("gcd"),
    "lcm": _nested("lcm"),
    "letter_counting": _count,
    "simple_equations": _solve,
}
"""Family -> the calculator expression that answers a task, from its metadata."""


def oracle_expression(task: Task) -> str:
    """The calculator expression that answers the task.

    Raises: VerifierError when the task is not of a family the oracle knows.
    """
    args = task.verifier.args if task.verifier is not None else {}
    family = args.get("family")
    if family not in ORACLE_FAMILIES:
        raise VerifierError(f"the oracle knows {', '.join(ORACLE_FAMILIES)}; task {task.id} is of family {family!r}")
    return ORACLE_FAMILIES[family](args["entry"]["metadata"])


def oracle(task: Task, calculate: Callable[[str], str]) -> list[Message]:
    """The corrected run as OpenAI messages: the call, what the tool returned, the answer.

    `calculate` is the agent's own calculator, so that the observation is what the agent would see.
    Raises: VerifierError for an unknown family, or when the calculator does not reach the reference.
    """
    expression = oracle_expression(task)
    observation = calculate(expression)
    if observation.strip() != (task.reference or "").strip():
        raise VerifierError(
            f"the oracle's {expression!r} gave {observation!r} for task {task.id}, the reference is {task.reference!r}"
        )
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": CALCULATOR, "arguments": json.dumps({"expression": expression}, ensure_ascii=False)},
    }
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": observation},
        {"role": "assistant", "content": observation},
    ]
