"""`preference`: a run that a trusted word puts over another one of the same question, as a DPO pair.

DPO (arXiv 2305.18290) on what was said outright. The pair stands at the step where the runs part, as
IPR (arXiv 2406.11176) has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from distill.partings import MODELS_FAULT, Better, parting_of
from distill.runs import rendered_tools, run_of
from distill.snapshot import Snapshot
from memory.records import Example, FeedbackKind, OutcomeSource, Task, Trajectory


def preference(snapshot: Snapshot) -> Iterator[Example]:
    """One pair for each two runs that everybody trusted puts in the same order.

    A run that the task's verifier failed is never chosen.
    """
    words = _words(snapshot)
    runs = {t.id: t for t in snapshot.trajectories}
    for better_id, worse_id in sorted(words):
        better, worse = runs.get(better_id), runs.get(worse_id)
        if better is None or worse is None or (worse_id, better_id) in words:
            continue
        task = _same_question(snapshot, better, worse)
        if task is None or worse.stop_reason not in MODELS_FAULT or _failed_by_verifier(snapshot, better):
            continue
        run = run_of(better, task)
        if run is None:
            continue
        sources = [*snapshot.sources_of(better), *words[better_id, worse_id]]
        parting = parting_of(worse, task, Better(worse_id, run, rendered_tools(better), sources))
        if parting is not None:
            yield parting.pair("preference")


def _words(snapshot: Snapshot) -> dict[tuple[str, str], list[str]]:
    """(better run, worse run) -> the ids of the feedback that says so."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for said in snapshot.feedback:
        over = said.value.get("over") if isinstance(said.value, dict) else None
        if said.kind is FeedbackKind.PREFERENCE and isinstance(over, str):
            found[said.trajectory_id, over].append(said.id)
    return dict(found)


def _same_question(snapshot: Snapshot, better: Trajectory, worse: Trajectory) -> Task | None:
    """The worse run's task, when the better one was asked the same by the same tenant."""
    task, other = snapshot.tasks.get(worse.task_id), snapshot.tasks.get(better.task_id)
    if task is None or other is None or (task.tenant, task.fingerprint) != (other.tenant, other.fingerprint):
        return None
    return task


def _failed_by_verifier(snapshot: Snapshot, trajectory: Trajectory) -> bool:
    outcome = snapshot.outcome(trajectory)
    return outcome is not None and outcome.by is OutcomeSource.VERIFIER and not outcome.success
