"""Grade-school word problems (GSM8K, Cobbe et al. 2021, arXiv 2110.14168) as tasks, from a file of the user's.

Owns reading the file and the oracle's run: its solutions carry each calculation as `<<48/2=24>>`, so the right
run is those calculations by the calculator, in their order, then the answer. A problem is left out when the
calculator does not arrive where its solution does, or when it needs more calls than an agent may make.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.suites import CALCULATOR, frozen_task
from memory.errors import ConfigError, ToolError, boundary
from memory.jsonl import lines_of
from memory.records import Message, Task, VerifierSpec

WORKLOAD = "gsm8k"
_STEP = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def word_problems(path: Path, calculate: Callable[[str], str], calls: int = 3) -> list[tuple[Task, list[Message]]]:
    """Every usable problem of a JSONL file of `question` and `answer`, with its right run, in the file's order.

    `calls`: calculations at most. Raises: ConfigError for an unreadable file or line.
    """
    found: list[tuple[Task, list[Message]]] = []
    with boundary(ConfigError, f"cannot read {path}"):
        lines = lines_of(path.read_text(encoding="utf-8"))
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            question, solution = str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"{path}, line {number} is no word problem with a question and an answer") from exc
        steps, reference = _STEP.findall(solution), solution.rpartition("####")[2].strip().replace(",", "")
        run = _run([expression for expression, _ in steps], reference, calculate)
        if run is not None and len(steps) <= calls:
            found.append((_task(question, reference), run))
    return found


def _task(question: str, reference: str) -> Task:
    return frozen_task(
        Task(
            workload=WORKLOAD,
            messages=[{"role": "user", "content": " ".join(question.split())}],
            tools=[CALCULATOR],
            reference=reference,
            verifier=VerifierSpec(name="numeric"),
            source=WORKLOAD,
        )
    )


def _run(expressions: Sequence[str], reference: str, calculate: Callable[[str], str]) -> list[Message] | None:
    """The calculations as OpenAI messages and the answer; None when they do not lead to the reference."""
    messages: list[Message] = []
    value = None
    for number, expression in enumerate(expressions):
        try:
            value = calculate(expression)
        except ToolError:
            return None
        arguments = json.dumps({"expression": expression}, ensure_ascii=False)
        function = {"name": CALCULATOR, "arguments": arguments}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": value})
    return [*messages, {"role": "assistant", "content": value}] if value == reference else None
