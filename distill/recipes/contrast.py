"""`contrast`: a failed run against a better one on the same question, as DPO pairs of one turn.

ETO (arXiv 2403.02502) compares the agent's own run with a better one of the same task and drops ties;
the reference is the policy at the start of the night. IPR (arXiv 2406.11176) puts the pair at the
step. Both turns stand at the first step where the runs part: TRL's DPO has no assistant-only mask, so
a longer continuation would also weigh tool results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from distill.runs import action_of, actions_of, attempt_of, by_usefulness, rendered_tools, run_of, task_messages
from distill.snapshot import Snapshot
from memory.records import MALFORMED, Example, ExampleKind, Message, StopReason, Task, Trajectory, text_of

_MODELS_FAULT = (StopReason.ANSWER, StopReason.MAX_TURNS, StopReason.LENGTH, StopReason.MALFORMED)
"""A run that ended by an error or was cancelled says nothing about its turns."""

_Question = tuple[str, str]


@dataclass(frozen=True)
class _Better:
    """A better run: which failed run it corrects (None: an own success), its messages, its sources."""

    of: str | None
    run: list[Message]
    tools: list[str]
    sources: list[str]


def contrast(snapshot: Snapshot) -> Iterator[Example]:
    """At most one pair for each failed run: its own correction first, then the question's best run."""
    better = _better_runs(snapshot)
    for failed in snapshot.trajectories:
        task, outcome = snapshot.tasks.get(failed.task_id), snapshot.outcome(failed)
        if task is None or outcome is None or outcome.success or failed.stop_reason not in _MODELS_FAULT:
            continue
        candidates = better.get((task.tenant, task.fingerprint), [])
        for candidate in sorted(candidates, key=lambda b: b.of != failed.id):
            pair = _pair(failed, task, candidate)
            if pair is not None:
                yield pair
                break


def _better_runs(snapshot: Snapshot) -> dict[_Question, list[_Better]]:
    found: defaultdict[_Question, list[_Better]] = defaultdict(list)
    for trajectory, task, feedback, run in snapshot.corrections():
        better = _Better(trajectory.id, run, rendered_tools(trajectory), [trajectory.id, feedback.id])
        found[task.tenant, task.fingerprint].append(better)
    for trajectory, task, _ in snapshot.own_successes():
        run = run_of(trajectory, task)
        if run is not None:
            better = _Better(None, run, rendered_tools(trajectory), [trajectory.id])
            found[task.tenant, task.fingerprint].append(better)
    for runs in found.values():
        runs.sort(key=lambda b: (b.of is None, by_usefulness(b.run, b.tools), actions_of(b.run), b.sources))
    return dict(found)


def _pair(failed: Trajectory, task: Task, better: _Better) -> Example | None:
    """The pair at the first diverging step; None when the runs never part at an assistant's turn."""
    attempt = attempt_of(failed, task)
    if attempt is None or set(better.tools) != set(rendered_tools(failed)):
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
        return Example(
            recipe="contrast",
            kind=ExampleKind.DPO,
            tenant=task.tenant,
            workload=task.workload,
            task_id=task.id,
            tools=rendered_tools(failed),
            # The better run's prefix: the same actions and results as the failed one's, in clean form.
            messages=task_messages(task) + better.run[:step],
            chosen=[good],
            rejected=[bad],
            sources=sorted({failed.id, *better.sources}),
        )
    return None
