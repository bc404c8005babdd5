"""Small records for the tests of distill: sums, the runs that solve them, a memory and a prompt."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from distill.snapshot import Snapshot
from memory.recall import Recall
from memory.records import (
    RECALLED,
    Feedback,
    FeedbackKind,
    MemoryKind,
    Message,
    Outcome,
    OutcomeSource,
    PastRun,
    Recalled,
    StopReason,
    Task,
    Trajectory,
    Trust,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
TOOLS = ["calculator"]
SYSTEM: Message = {"role": "system", "content": "You solve tasks."}


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def task(number: int, question: str | None = None, **fields: Any) -> Task:
    """The task of adding `number` and 1."""
    asked = {"role": "user", "content": question or f"What is {number} + 1?"}
    defaults = {"id": f"task_{number:04d}", "messages": [asked], "reference": str(number + 1), "created_at": START}
    return Task(**{**defaults, **fields})


def call(expression: str, id: str = "c1") -> Message:
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": function}]}


def result(text: str, id: str = "c1") -> Message:
    return {"role": "tool", "tool_call_id": id, "content": text}


def say(text: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": text, **fields}


def solve(number: int, id: str = "c1") -> list[Message]:
    """The run that solves `task(number)` with the tool."""
    return [call(f"{number} + 1", id), result(str(number + 1), id), say(str(number + 1))]


def trajectory(
    of: Task, run: list[Message], score: float | None = 1.0, recalled: list[Message] | None = None, **fields: Any
) -> Trajectory:
    """A served run of a task, judged by its verifier unless `score` is None."""
    outcome = None if score is None else Outcome(score=score, by=OutcomeSource.VERIFIER)
    block = [{**m, "name": RECALLED} for m in recalled or []]
    answer = run[-1].get("content") if run and run[-1]["role"] == "assistant" else None
    defaults = {
        "id": f"traj_{of.id}",
        "task_id": of.id,
        "tenant": of.tenant,
        "workload": of.workload,
        "generation": 0,
        "model": "base",
        "tools": TOOLS,
        "messages": [SYSTEM, *block, *of.messages, *run],
        "answer": answer,
        "outcome": outcome,
        "stop_reason": StopReason.ANSWER,
        "started_at": START,
    }
    return Trajectory(**{**defaults, **fields})


def feedback(on: Trajectory, kind: FeedbackKind, value: Any, author: str = "ann", **fields: Any) -> Feedback:
    defaults = {
        "id": f"fb_{on.id}_{author}_{kind.value}",
        "trajectory_id": on.id,
        "tenant": on.tenant,
        "kind": kind,
        "value": value,
        "author": author,
        "created_at": START,
    }
    return Feedback(**{**defaults, **fields})


def correction(on: Trajectory, value: Any, author: str = "ann", **fields: Any) -> Feedback:
    """A trusted correction."""
    return feedback(on, FeedbackKind.CORRECTION, value, author, **{"trust": Trust.TRUSTED, **fields})


def corrected(numbers: range | list[int], author: str = "ann", **task_fields: Any) -> Snapshot:
    """Failed runs of these tasks, each with a trusted correction by `author`."""
    tasks = [task(n, **task_fields) for n in numbers]
    runs = [trajectory(t, [say("no idea")], score=0.0) for t in tasks]
    words = [correction(t, solve(n), author) for n, t in zip(numbers, runs, strict=True)]
    return Snapshot(runs, words, {t.id: t for t in tasks})


def snapshot(*pairs: tuple[Task, Trajectory], said: list[Feedback] | None = None, **fields: Any) -> Snapshot:
    return Snapshot([t for _, t in pairs], said or [], {t.id: t for t, _ in pairs}, **fields)


class OneRun:
    """A memory that recalls the same past run for every task, and remembers what it was told to leave out."""

    def __init__(self) -> None:
        self.excluded: list[tuple[str, frozenset[str], frozenset[str]]] = []

    def recall(
        self,
        task: Task,
        *,
        exclude_task_ids: frozenset[str] = frozenset(),
        exclude_fingerprints: frozenset[str] = frozenset(),
        **_: Any,
    ) -> Recall:
        self.excluded.append((task.id, exclude_task_ids, exclude_fingerprints))
        messages = [{"role": "user", "content": "What is 900 + 1?"}, *solve(900)]
        run = PastRun(id="run_900", task_id="task_900", messages=messages, created_at=START)
        numbers = {"similarity": 0.9, "score": 0.5, "recency": 1.0, "rank": 0.8, "tokens": 9}
        return Recall([Recalled(id=run.id, kind=MemoryKind.RUN, why="nearest", **numbers)], [], [run])


def compose(task: Task, tools: list[str], recall: Recall | None) -> list[Message]:
    """A stand-in for `agent.prompts.compose` with its layout."""
    block = [{**m, "name": RECALLED} for run in (recall.runs if recall else []) for m in run.messages]
    return [SYSTEM, *block, *task.messages]
