"""`revise`: a wrong tool call and what came of it, then the way a better run went on.

Agent-R (arXiv 2501.11425) splices the bad prefix, without loss, to a revision and the good tail, so that
an agent that has gone wrong turns back early. Its revising thought is left out: the served form is one
action a turn. The steps before the mistake are the better run's own and keep their loss (InT, arXiv
2601.14209: the prefix is worth training).

The good tail's observations are as they were without the mistake: sound for tools that only compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from distill.partings import partings
from distill.runs import MISTAKE, callable_tools, flaw_of, rendered_tools
from distill.snapshot import Snapshot
from memory.records import MALFORMED, Example, ExampleKind


def revise(snapshot: Snapshot) -> Iterator[Example]:
    """At most one SFT example for each failed run whose first wrong turn was a readable tool call."""
    for parting in partings(snapshot):
        mistake, tail = parting.attempt[parting.step], parting.better.run[parting.step :]
        if mistake.get("name") == MALFORMED or not mistake.get("tool_calls"):
            continue
        observed = list(takewhile(lambda m: m.get("role") == "tool", parting.attempt[parting.step + 1 :]))
        detour = [{**mistake, "name": MISTAKE}, *observed]
        if flaw_of(detour + tail, callable_tools(parting.worse)):
            continue
        yield Example(
            recipe="revise",
            kind=ExampleKind.SFT,
            tenant=parting.task.tenant,
            workload=parting.task.workload,
            task_id=parting.task.id,
            tools=rendered_tools(parting.worse),
            messages=parting.prompt() + detour + tail,
            sources=parting.sources(),
        )
