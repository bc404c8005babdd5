"""Hints in the prompt of a try: the teacher of context distillation is the same model with them before its eyes.

Memento No More (arXiv 2502.01562): where the agent erred, a hint is put into the teacher's prompt and the student
learns the answer without it. Here the tries are practice: a verifier keeps the good ones, and the recipes, which lay
every example out as it is served, never show the hint.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from distill.partings import Question
from distill.principles import gives_away
from distill.snapshot import Snapshot
from memory.recall import Recall, Recaller, estimate_tokens
from memory.records import Feedback, FeedbackKind, MemoryKind, Principle, PrincipleKind, Recalled, Task


def hints_of(snapshot: Snapshot) -> dict[Question, list[Feedback]]:
    """The trusted hints on each question that no own run of the snapshot solved; what tells its answer is no hint."""
    solved = {(task.tenant, task.fingerprint) for _, task, _ in snapshot.own_successes()}
    found: defaultdict[Question, list[Feedback]] = defaultdict(list)
    for trajectory in snapshot.trajectories:
        task = snapshot.tasks.get(trajectory.task_id)
        if task is None or (task.tenant, task.fingerprint) in solved:
            continue
        for said in snapshot.said_of(trajectory):
            told = said.value if said.kind is FeedbackKind.HINT and isinstance(said.value, str) else ""
            if told.strip() and not gives_away(told, snapshot, trajectory, task):
                found[task.tenant, task.fingerprint].append(said)
    return dict(found)


class Hinted:
    """A memory that shows a question's hints as principles, beside what it recalls anyway."""

    def __init__(self, recaller: Recaller, hints: dict[Question, list[Feedback]]) -> None:
        self._recaller = recaller
        self._hints = hints

    def recall(self, task: Task, **how: Any) -> Recall:
        recall = self._recaller.recall(task, **how)
        hints = [_as_principle(said, task) for said in self._hints.get((task.tenant, task.fingerprint), [])]
        shown = [
            Recalled(
                id=hint.id,
                kind=MemoryKind.PRINCIPLE,
                similarity=1.0,
                score=0.5,
                recency=1.0,
                rank=1.0,
                tokens=estimate_tokens(hint),
                why="a user's hint on this very question",
            )
            for hint in hints
        ]
        return replace(recall, items=[*shown, *recall.items], principles=[*hints, *recall.principles])


def _as_principle(said: Feedback, task: Task) -> Principle:
    return Principle(
        id=said.id,
        tenant=said.tenant,
        workload=task.workload,
        kind=PrincipleKind.GUIDING,
        text=" ".join(str(said.value).split()),
        sources=[said.id],
        created_at=said.created_at,
    )
