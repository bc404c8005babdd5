"""`intervene`: the steps of a failed run up to its first wrong one, and the right step in its place.

InT (arXiv 2601.14209) trains the right prefix and a single corrected step and leaves out what follows:
on problems never solved before, 202 of 235 were covered without the suffix, 111 with it and 162 without
the prefix. There the model finds the wrong step and continuations confirm its fix; here the step is
the first where the run leaves a trusted correction or a success of the same question.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.partings import partings
from distill.runs import rendered_tools
from distill.snapshot import Snapshot
from memory.records import Example, ExampleKind


def intervene(snapshot: Snapshot) -> Iterator[Example]:
    """At most one SFT example for each failed run; it ends with the corrected step, also if that calls a tool."""
    for parting in partings(snapshot):
        yield Example(
            recipe="intervene",
            kind=ExampleKind.SFT,
            tenant=parting.task.tenant,
            workload=parting.task.workload,
            task_id=parting.task.id,
            tools=rendered_tools(parting.worse),
            messages=[*parting.prompt(), parting.better.run[parting.step]],
            sources=parting.sources(),
        )
