"""`corrections`: trusted corrections as whole corrected runs, as SFT examples.

A user's complaint is the scarce signal (DRIFT, arXiv 2510.02341), and accepted corrections of the
states where the agent erred are what coaching trains on (Memento No More, arXiv 2502.01562). InT
(arXiv 2601.14209) trains the prefix and one corrected step; here the user gave the whole better run,
so the whole run is the target.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.runs import actions_of, by_usefulness, rendered_tools, task_messages
from distill.snapshot import Snapshot
from memory.records import Example, ExampleKind


def corrections(snapshot: Snapshot) -> Iterator[Example]:
    """Each distinct corrected run of a question, runs that show their work first, then the shortest."""
    found: list[tuple[tuple[object, ...], Example]] = []
    for trajectory, task, feedback, run in snapshot.corrections():
        example = Example(
            recipe="corrections",
            kind=ExampleKind.SFT,
            tenant=task.tenant,
            workload=task.workload,
            task_id=task.id,
            tools=rendered_tools(trajectory),
            messages=task_messages(task) + run,
            sources=[trajectory.id, feedback.id],
        )
        question = (task.tenant, task.fingerprint)
        order = (question, by_usefulness(run, trajectory.tools), actions_of(run), feedback.id)
        found.append((order, example))
    kept: dict[object, Example] = {}
    for order, example in sorted(found, key=lambda pair: pair[0]):
        kept.setdefault((order[0], order[2]), example)
    yield from kept.values()
