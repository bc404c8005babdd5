"""`teacher`: what another model did with a task that the agent failed, or was expected to fail, as SFT examples.

The reference trajectory that ETO (arXiv 2403.02502) and rejection sampling start from, from a stronger model. Text of
another model moves the weights further than own successes do, so it stands in only for questions without one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from distill.runs import actions_of, by_usefulness, rendered_tools, run_of, task_messages
from distill.snapshot import Snapshot
from memory.records import Example, ExampleKind


def teacher(snapshot: Snapshot) -> Iterator[Example]:
    """The best vouched-for run of the teacher for each question that no own run solved."""
    solved = {(task.tenant, task.fingerprint) for _, task, _ in snapshot.own_successes()}
    found: defaultdict[tuple[str, str], list[tuple[tuple[object, ...], Example]]] = defaultdict(list)
    for trajectory, task, _ in snapshot.teacher_successes():
        question, run = (task.tenant, task.fingerprint), run_of(trajectory, task)
        if run is None or question in solved:
            continue
        example = Example(
            recipe="teacher",
            kind=ExampleKind.SFT,
            tenant=task.tenant,
            workload=task.workload,
            task_id=task.id,
            tools=rendered_tools(trajectory),
            messages=task_messages(task) + run,
            sources=snapshot.sources_of(trajectory),
        )
        found[question].append(((by_usefulness(run, trajectory.tools), actions_of(run), trajectory.id), example))
    for question in sorted(found):
        yield min(found[question], key=lambda pair: pair[0])[1]
