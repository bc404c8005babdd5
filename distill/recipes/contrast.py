"""`contrast`: a failed run against a better one on the same question, as DPO pairs of one turn.

ETO (arXiv 2403.02502) compares the agent's own run with a better one of the same task and drops ties;
the reference is the policy at the start of the night. IPR (arXiv 2406.11176) puts the pair at the
step. Both turns stand at the first step where the runs part: TRL's DPO has no assistant-only mask, so
a longer continuation would also weigh tool results.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.partings import partings
from distill.snapshot import Snapshot
from memory.records import Example


def contrast(snapshot: Snapshot) -> Iterator[Example]:
    """At most one pair for each failed run: its own correction first, then the question's best run."""
    for parting in partings(snapshot):
        yield parting.pair("contrast")
