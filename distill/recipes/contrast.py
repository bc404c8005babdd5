"""`contrast`: a failed run against a better one on the same question, as DPO pairs of one turn.

ETO (arXiv 2403.02502) compares the agent's own run with a better one of the same task and drops ties;
the reference is the policy at the start of the night. IPR (arXiv 2406.11176) puts the pair at the
step. Both turns stand at the first step where the runs part: TRL's DPO has no assistant-only mask, so
a longer continuation would also weigh tool results. Of several failures that leave the same better turn, the one to
reject is chosen by `distill.sweet_spot`; those that part elsewhere, or have a correction of their own, teach another
step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from distill.partings import Parting, Question, partings, scores
from distill.runs import Action, actions_of
from distill.snapshot import Snapshot
from distill.sweet_spot import sweet_spot
from memory.records import Example


def contrast(snapshot: Snapshot) -> Iterator[Example]:
    """A pair for each turn of a better run, its own correction's first, that failed runs of the question left."""
    found: defaultdict[tuple[Question, tuple[Action, ...]], dict[str, tuple[float, Parting]]] = defaultdict(dict)
    for parting in partings(snapshot):
        outcome = snapshot.outcome(parting.worse)
        assert outcome is not None
        turn = actions_of(parting.better.run[: parting.step + 1])
        question = (parting.task.tenant, parting.task.fingerprint)
        found[question, turn][parting.worse.id] = (outcome.score, parting)
    every = scores(snapshot)
    for (question, _), failed in found.items():
        picked = sweet_spot(every[question], [(score, id) for id, (score, _) in failed.items()])
        yield failed[picked][1].pair("contrast")
