"""Two generations side by side: the same frozen tasks, from evaluations that are stored already."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memory.errors import ConfigError, NotFoundError
from memory.ledger import Ledger
from memory.night_records import Evaluation, TaskOutcome
from memory.records import Trajectory


class ChangedTask(BaseModel):
    """A task that one of the two did better. Texts are None where the task is another tenant's."""

    key: str
    workload: str
    question: str | None
    scores: tuple[float, float]
    answers: tuple[str | None, str | None]
    trajectories: tuple[str | None, str | None]


class SuiteDiff(BaseModel):
    """Both generations on one suite: `better` and `worse` are the second one's."""

    suite: str
    suite_hash: str
    memory: bool
    evaluations: tuple[str, str]
    better: int
    worse: int
    same: int
    changed: list[ChangedTask]
    """Worse ones first: they are what a reader looks for."""


class GenerationDiff(BaseModel):
    """What changed from one generation to another."""

    object: Literal["generation.diff"] = "generation.diff"
    generations: tuple[int, int]
    suites: list[SuiteDiff]


def compare(ledger: Ledger, before: int, after: int, *, tenant: str, suite: str | None = None) -> GenerationDiff:
    """Every suite (or the one named) that both were evaluated on, with the same tasks and the same use of memory.

    Of several such evaluations those of one night are taken, then the newest. Raises `NotFoundError` for an
    unknown generation and when the two have no evaluation in common, `ConfigError` for one generation twice.
    """
    if before == after:
        raise ConfigError(f"generation {before} is compared with itself: name two generations")
    first, second = (ledger.evaluations(generation=ledger.generation(n).number) for n in (before, after))
    pairs: dict[str, list[tuple[Evaluation, Evaluation]]] = {}
    for a in first:
        for b in second:
            if (a.suite, a.suite_hash, a.memory) == (b.suite, b.suite_hash, b.memory):
                pairs.setdefault(a.suite, []).append((a, b))
    if not pairs or (suite is not None and suite not in pairs):
        where = f"on a suite {suite!r}" if suite is not None else "on the same tasks"
        common = f"; they were on {', '.join(sorted(pairs))}" if pairs else ""
        raise NotFoundError(
            f"generations {before} and {after} were never both evaluated {where}{common}: "
            f"`nightschool eval --model nightschool:gen-N` for each makes it so"
        )
    chosen = [max(found, key=_preference) for name, found in sorted(pairs.items()) if suite in (None, name)]
    diffs = [_suite_diff(ledger, a, b, tenant) for a, b in chosen]
    return GenerationDiff(generations=(before, after), suites=diffs)


def print_diff(diff: GenerationDiff, console: Console) -> None:
    """Counts by suite, then the tasks that changed."""
    before, after = diff.generations
    counts = Table("suite", "memory", f"gen-{after} better", "worse", "same")
    for each in diff.suites:
        counts.add_row(each.suite, "yes" if each.memory else "no", str(each.better), str(each.worse), str(each.same))
    console.print(counts)
    for each in diff.suites:
        if not each.changed:
            continue
        table = Table("task", f"gen-{before}", f"gen-{after}", title=each.suite, title_justify="left")
        for task in each.changed:
            cells = [f"{score:g}: {_short(answer)}" for score, answer in zip(task.scores, task.answers, strict=True)]
            table.add_row(*map(escape, [_short(task.question or f"{task.workload} {task.key}"), *cells]))
        console.print(table)


def _preference(pair: tuple[Evaluation, Evaluation]) -> tuple[bool, str]:
    a, b = pair
    return a.night_id is not None and a.night_id == b.night_id, min(a.created_at, b.created_at).isoformat()


def _suite_diff(ledger: Ledger, a: Evaluation, b: Evaluation, tenant: str) -> SuiteDiff:
    later = {outcome.key: outcome for outcome in b.outcomes}
    pairs = [(mine, later[mine.key]) for mine in a.outcomes if mine.key in later]
    changed = sorted((pair for pair in pairs if pair[0].score != pair[1].score), key=lambda p: p[1].score - p[0].score)
    worse = sum(y.score < x.score for x, y in changed)
    return SuiteDiff(
        suite=a.suite,
        suite_hash=a.suite_hash,
        memory=a.memory,
        evaluations=(a.id, b.id),
        better=len(changed) - worse,
        worse=worse,
        same=len(pairs) - len(changed),
        changed=[_changed(ledger, x, y, tenant) for x, y in changed],
    )


def _changed(ledger: Ledger, x: TaskOutcome, y: TaskOutcome, tenant: str) -> ChangedTask:
    runs = [_own_run(ledger, outcome, tenant) for outcome in (x, y)]
    known = next((run for run in runs if run is not None), None)
    return ChangedTask(
        key=x.key,
        workload=x.workload,
        question=ledger.get_task(known.task_id, tenant=tenant).question if known else None,
        scores=(x.score, y.score),
        answers=(x.answer if runs[0] else None, y.answer if runs[1] else None),
        trajectories=(x.trajectory_id if runs[0] else None, y.trajectory_id if runs[1] else None),
    )


def _own_run(ledger: Ledger, outcome: TaskOutcome, tenant: str) -> Trajectory | None:
    if outcome.trajectory_id is None:
        return None
    try:
        return ledger.get_trajectory(outcome.trajectory_id, tenant=tenant)
    except NotFoundError:
        return None


def _short(text: str | None) -> str:
    said = "-" if text is None else " ".join(text.split())
    # Questions of one kind begin alike: their ends tell them apart.
    return said if len(said) <= 60 else f"{said[:29]}…{said[-30:]}"
