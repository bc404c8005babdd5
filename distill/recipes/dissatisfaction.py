"""`dissatisfaction`: what a user complained about against a fresh success of a later run, as a DPO pair.

DRIFT (arXiv 2510.02341): complaints are plenty and praise is rare, so the answer complained about is
rejected, and the chosen one is sampled from today's model and must pass; fixed good answers would
become stale as the model moves on. Today's model is the champion that the night goes on from (`Snapshot.champion`):
where it has not solved the question since, practice asks it again. Of several complaints about one question the
rejected one is chosen by `distill.sweet_spot`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from distill.partings import MODELS_FAULT, Better, Parting, Question, parting_of, scores
from distill.runs import by_usefulness, rendered_tools, run_of
from distill.snapshot import ANONYMOUS, Snapshot, corrections_of, score_of
from distill.sweet_spot import sweet_spot
from memory.records import Example, FeedbackKind, Task, Trajectory


def dissatisfaction(snapshot: Snapshot) -> Iterator[Example]:
    """At most one pair for each question; none where today's model has not solved it after the complaint's run."""
    fresh, every = _fresh(snapshot), scores(snapshot)
    complained: defaultdict[Question, dict[str, tuple[float, Parting, list[str]]]] = defaultdict(dict)
    for trajectory in snapshot.trajectories:
        task, outcome = snapshot.tasks.get(trajectory.task_id), snapshot.outcome(trajectory)
        if task is None or outcome is None or not (words := _complaints(snapshot, trajectory)):
            continue
        question = (task.tenant, task.fingerprint)
        parting = _from_later(trajectory, task, fresh.get(question, []))
        if parting is not None:
            complained[question][trajectory.id] = (outcome.score, parting, words)
    for question in sorted(complained):
        found = complained[question]
        picked = sweet_spot(every[question], [(score, id) for id, (score, _, _) in found.items()])
        _, parting, words = found[picked]
        pair = parting.pair("dissatisfaction")
        yield pair.model_copy(update={"sources": sorted({*pair.sources, *words})})


def unanswered(snapshot: Snapshot) -> set[Question]:
    """The questions complained about that today's model has not solved since: only a fresh sample makes a pair of
    them."""
    complained: dict[Question, datetime] = {}
    for trajectory in snapshot.trajectories:
        task = snapshot.tasks.get(trajectory.task_id)
        if task is not None and _complaints(snapshot, trajectory):
            question = (task.tenant, task.fingerprint)
            complained[question] = max(complained.get(question, trajectory.started_at), trajectory.started_at)
    for trajectory, task in _todays_successes(snapshot):
        question = (task.tenant, task.fingerprint)
        if question in complained and trajectory.started_at > complained[question]:
            del complained[question]
    return set(complained)


def _complaints(snapshot: Snapshot, trajectory: Trajectory) -> list[str]:
    """The ids of the trusted words that find fault with a run, a signed score below half or a correction; none where
    the run was right all the same, or was not the model's fault."""
    if not snapshot.failed(trajectory) or trajectory.stop_reason not in MODELS_FAULT:
        return []
    said = snapshot.said_of(trajectory)
    marks = [(f.id, score_of(f.value)) for f in said if f.kind is FeedbackKind.SCORE and f.voice != ANONYMOUS]
    return [id for id, mark in marks if mark is not None and mark < 0.5] + [
        f.id for f in corrections_of(trajectory, said)
    ]


def _todays_successes(snapshot: Snapshot) -> Iterator[tuple[Trajectory, Task]]:
    for trajectory, task, _ in snapshot.own_successes():
        if snapshot.champion in (None, trajectory.generation):
            yield trajectory, task


def _fresh(snapshot: Snapshot) -> dict[Question, list[tuple[Trajectory, Better]]]:
    """Each question's successes by today's model; the newest one's first where the snapshot does not say which."""
    found: defaultdict[Question, list[tuple[Trajectory, Better]]] = defaultdict(list)
    for trajectory, task in _todays_successes(snapshot):
        run = run_of(trajectory, task)
        if run is not None:
            better = Better(None, run, rendered_tools(trajectory), snapshot.sources_of(trajectory))
            found[task.tenant, task.fingerprint].append((trajectory, better))
    for runs in found.values():
        runs.sort(key=lambda one: (-one[0].generation, by_usefulness(one[1].run, one[1].tools), one[0].id))
    return dict(found)


def _from_later(worse: Trajectory, task: Task, fresh: list[tuple[Trajectory, Better]]) -> Parting | None:
    for trajectory, better in fresh:
        if trajectory.started_at > worse.started_at:
            parting = parting_of(worse, task, better)
            if parting is not None:
                return parting
    return None
