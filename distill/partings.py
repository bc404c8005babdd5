"""Partings: the step at which a bad run leaves a better one of the same question.

Owns which runs are compared and where they part. Owns no decision of what is made of it: a pair, a
correction of one step, a revision (`distill.recipes`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from distill.runs import action_of, actions_of, attempt_of, by_usefulness, rendered_tools, run_of, task_messages
from distill.snapshot import Snapshot
from memory.records import MALFORMED, Example, ExampleKind, Message, StopReason, Task, Trajectory, text_of

MODELS_FAULT = (StopReason.ANSWER, StopReason.MAX_TURNS, StopReason.LENGTH, StopReason.MALFORMED)
"""A run that ended by an error or was cancelled says nothing about its turns."""

Question = tuple[str, str]
"""(tenant, task fingerprint)."""


@dataclass(frozen=True)
class Better:
    """A better run: which failed run it corrects (None: a success, own or a teacher's), its messages, its sources."""

    of: str | None
    run: list[Message]
    tools: list[str]
    sources: list[str]


@dataclass(frozen=True)
class Parting:
    """Both runs say the same before `step`, and at it each has another assistant turn."""

    worse: Trajectory
    task: Task
    attempt: list[Message]
    better: Better
    step: int

    def prompt(self) -> list[Message]:
        """The better run's prefix: the same actions and results as the worse one's, in clean form."""
        return task_messages(self.task) + self.better.run[: self.step]

    def sources(self) -> list[str]:
        return sorted({self.worse.id, *self.better.sources})

    def pair(self, recipe: str) -> Example:
        """Both turns as a DPO example."""
        return Example(
            recipe=recipe,
            kind=ExampleKind.DPO,
            tenant=self.task.tenant,
            workload=self.task.workload,
            task_id=self.task.id,
            tools=rendered_tools(self.worse),
            messages=self.prompt(),
            chosen=[self.better.run[self.step]],
            rejected=[self.attempt[self.step]],
            sources=self.sources(),
        )


def scores(snapshot: Snapshot) -> dict[Question, list[float]]:
    """The scores of each question's judged own runs: what `distill.sweet_spot` chooses by."""
    found: defaultdict[Question, list[float]] = defaultdict(list)
    for trajectory in snapshot.trajectories:
        task, outcome = snapshot.tasks.get(trajectory.task_id), snapshot.outcome(trajectory)
        if task is not None and outcome is not None:
            found[task.tenant, task.fingerprint].append(outcome.score)
    return dict(found)


def partings(snapshot: Snapshot) -> Iterator[Parting]:
    """At most one for each failed run: from its own correction first, then from the question's best run."""
    better = _better_runs(snapshot)
    for failed in snapshot.trajectories:
        task = snapshot.tasks.get(failed.task_id)
        if task is None or not snapshot.failed(failed) or failed.stop_reason not in MODELS_FAULT:
            continue
        candidates = better.get((task.tenant, task.fingerprint), [])
        for candidate in sorted(candidates, key=lambda b: b.of != failed.id):
            parting = parting_of(failed, task, candidate)
            if parting is not None:
                yield parting
                break


def parting_of(worse: Trajectory, task: Task, better: Better) -> Parting | None:
    """The first step where the runs part; None when they never do at an assistant's turn of both."""
    attempt = attempt_of(worse, task)
    if attempt is None or set(better.tools) != set(rendered_tools(worse)):
        return None
    for step, (bad, good) in enumerate(zip(attempt, better.run, strict=False)):
        roles = (bad.get("role"), good.get("role"))
        if roles == ("tool", "tool") and text_of(bad).strip() == text_of(good).strip():
            continue
        if roles != ("assistant", "assistant"):
            return None
        if bad.get("name") != MALFORMED and action_of(bad) == action_of(good):
            continue
        if not text_of(bad).strip() and not bad.get("tool_calls"):
            return None
        if bad.get("tool_calls") and not any(m.get("tool_calls") for m in better.run):
            # A bare right answer does not show that calling a tool was the mistake.
            return None
        return Parting(worse, task, attempt, better, step)
    return None


def _better_runs(snapshot: Snapshot) -> dict[Question, list[Better]]:
    found: defaultdict[Question, list[Better]] = defaultdict(list)
    for trajectory, task, feedback, run in snapshot.corrections():
        better = Better(trajectory.id, run, rendered_tools(trajectory), [trajectory.id, feedback.id])
        found[task.tenant, task.fingerprint].append(better)
    for trajectory, task, _ in chain(snapshot.own_successes(), snapshot.teacher_successes()):
        run = run_of(trajectory, task)
        if run is not None:
            better = Better(None, run, rendered_tools(trajectory), snapshot.sources_of(trajectory))
            found[task.tenant, task.fingerprint].append(better)
    for runs in found.values():
        runs.sort(key=lambda b: (b.of is None, by_usefulness(b.run, b.tools), actions_of(b.run), b.sources))
    return dict(found)
