"""`contrast_runs`: a failed run against a better one on the same question, as a DPO pair of what is left of both.

ETO (arXiv 2403.02502): the chosen side is the better run and the rejected one the agent's own, whole; ties are
dropped and a rejected run is cut when it is much longer. What both say the same at first stands in the prompt: it
would weigh nothing in DPO, whose figures are differences. IPR (arXiv 2406.11176) trains both forms, the step
(`contrast`) and the run. Which of several failures is rejected: `distill.sweet_spot`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from distill.partings import Parting, Question, partings, scores
from distill.runs import rendered_tools
from distill.snapshot import Snapshot
from distill.sweet_spot import sweet_spot
from memory.records import MALFORMED, Example, ExampleKind, Message

LONGER = 10
"""Messages that a rejected run may have beyond the chosen one's number: five rounds of call and result."""


def contrast_runs(snapshot: Snapshot) -> Iterator[Example]:
    """At most one pair for each question; none where neither run goes on after the step at which they part."""
    failed: defaultdict[Question, dict[str, tuple[float, Parting]]] = defaultdict(dict)
    for parting in partings(snapshot):
        outcome = snapshot.outcome(parting.worse)
        assert outcome is not None
        question = (parting.task.tenant, parting.task.fingerprint)
        failed[question][parting.worse.id] = (outcome.score, parting)
    every = scores(snapshot)
    for question in sorted(failed):
        found = failed[question]
        _, parting = found[sweet_spot(every[question], [(score, id) for id, (score, _) in found.items()])]
        chosen = parting.better.run[parting.step :]
        rejected = _rest(parting.attempt[parting.step :], len(chosen) + LONGER)
        if len(chosen) + len(rejected) > 2:
            yield Example(
                recipe="contrast_runs",
                kind=ExampleKind.DPO,
                tenant=parting.task.tenant,
                workload=parting.task.workload,
                task_id=parting.task.id,
                tools=rendered_tools(parting.worse),
                messages=parting.prompt(),
                chosen=chosen,
                rejected=rejected,
                sources=parting.sources(),
            )


def _rest(attempt: list[Message], most: int) -> list[Message]:
    """The run up to its last turn by the assistant, or to its first unreadable one: after that we reminded it."""
    end = 0
    for position, message in enumerate(attempt[:most], start=1):
        if message.get("role") == "assistant":
            end = position
        if message.get("name") == MALFORMED:
            break
    return attempt[:end]
