"""`successes`: the agent's own runs that got full marks, as SFT examples.

Rejection sampling: pool all successful runs, keep the distinct ones, fine-tune on them (RLoop, arXiv
2511.04285; ReST-MCTS*, arXiv 2406.03816, keeps only traces that end in the right answer). Own
successes also forget least: they are the model's own text (arXiv 2507.05386).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from distill.runs import actions_of, by_usefulness, rendered_tools, run_of, task_messages
from distill.snapshot import Snapshot
from memory.records import Example, ExampleKind, Trajectory

PER_TASK = 4
"""Distinct successes kept for one question."""


def successes(snapshot: Snapshot) -> Iterator[Example]:
    """The distinct successes of each question, runs that show their work first, then the shortest."""
    return distinct_successes(snapshot, lambda _trajectory: True)


def distinct_successes(snapshot: Snapshot, wanted: Callable[[Trajectory], bool]) -> Iterator[Example]:
    """The same over those runs that are `wanted`."""
    found: defaultdict[tuple[str, str], list[tuple[tuple[object, ...], Example]]] = defaultdict(list)
    for trajectory, task, _ in snapshot.own_successes():
        run = run_of(trajectory, task)
        if run is None or not wanted(trajectory):
            continue
        example = Example(
            recipe="successes",
            kind=ExampleKind.SFT,
            tenant=task.tenant,
            workload=task.workload,
            task_id=task.id,
            tools=rendered_tools(trajectory),
            messages=task_messages(task) + run,
            sources=snapshot.sources_of(trajectory),
        )
        order = (by_usefulness(run, trajectory.tools), actions_of(run), trajectory.id)
        found[task.tenant, task.fingerprint].append((order, example))
    for key in sorted(found):
        kept: dict[object, Example] = {}
        for order, example in sorted(found[key], key=lambda pair: pair[0]):
            kept.setdefault(order[1], example)
        yield from list(kept.values())[:PER_TASK]
