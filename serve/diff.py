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


class ComparedTask(BaseModel):
    """A task as both did it. Texts are None where the task is another tenant's."""

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
    changed: list[ComparedTask]
    """Tasks that one of the two did better. Worse ones first: they are what a reader looks for."""
    unchanged: list[ComparedTask] = []
    """Tasks that both did equally well, where they were asked for; those with other answers first."""


class GenerationDiff(BaseModel):
    """What changed from one generation to another."""

    object: Literal["generation.diff"] = "generation.diff"
    generations: tuple[int, int]
    suites: list[SuiteDiff]


def compare(
    ledger: Ledger,
    before: int,
    after: int,
    *,
    tenant: str,
    suite: str | None = None,
    unchanged: bool = False,
) -> GenerationDiff:
    """Every suite (or the one named) that both were evaluated on, with the same tasks and the same use of memory.

    `unchanged`: list also the tasks that both did equally well. Of several such evaluations those of one night are
    taken, then the newest. Raises `NotFoundError` for an unknown generation and when the two have no evaluation in
    common, `ConfigError` for one generation twice.
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
    diffs = [_suite_diff(ledger, a, b, tenant, unchanged) for a, b in chosen]
    return GenerationDiff(generations=(before, after), suites=diffs)


def of_tenant(diff: GenerationDiff) -> GenerationDiff:
    """Without the tasks of other tenants than the one it was made for; the counts stay."""

    def own(tasks: list[ComparedTask]) -> list[ComparedTask]:
        return [task for task in tasks if task.trajectories != (None, None)]

    suites = [s.model_copy(update={"changed": own(s.changed), "unchanged": own(s.unchanged)}) for s in diff.suites]
    return diff.model_copy(update={"suites": suites})


def print_diff(diff: GenerationDiff, console: Console, *, full: bool = False) -> None:
    """Counts by suite, then the tasks with both answers; `full`: questions and answers in full."""
    before, after = diff.generations
    counts = Table("suite", "memory", f"gen-{after} better", "worse", "same")
    for each in diff.suites:
        counts.add_row(each.suite, "yes" if each.memory else "no", str(each.better), str(each.worse), str(each.same))
    console.print(counts)
    shown = _whole if full else _short
    for each in diff.suites:
        tasks = [*each.changed, *each.unchanged]
        if not tasks:
            continue
        heads = ("task", f"gen-{before}", f"gen-{after}")
        table = Table(*heads, title=each.suite, title_justify="left", show_lines=full)
        for task in tasks:
            cells = [f"{score:g}: {shown(answer)}" for score, answer in zip(task.scores, task.answers, strict=True)]
            table.add_row(*map(escape, [shown(task.question or f"{task.workload} {task.key}"), *cells]))
        console.print(table)


def _preference(pair: tuple[Evaluation, Evaluation]) -> tuple[bool, str]:
    a, b = pair
    return a.night_id is not None and a.night_id == b.night_id, min(a.created_at, b.created_at).isoformat()


def _suite_diff(ledger: Ledger, a: Evaluation, b: Evaluation, tenant: str, unchanged: bool) -> SuiteDiff:
    later = {outcome.key: outcome for outcome in b.outcomes}
    pairs = [(mine, later[mine.key]) for mine in a.outcomes if mine.key in later]
    changed = sorted((pair for pair in pairs if pair[0].score != pair[1].score), key=lambda p: p[1].score - p[0].score)
    worse = sum(y.score < x.score for x, y in changed)
    same = sorted((pair for pair in pairs if pair[0].score == pair[1].score), key=lambda p: p[0].answer == p[1].answer)
    return SuiteDiff(
        suite=a.suite,
        suite_hash=a.suite_hash,
        memory=a.memory,
        evaluations=(a.id, b.id),
        better=len(changed) - worse,
        worse=worse,
        same=len(same),
        changed=[_compared(ledger, x, y, tenant) for x, y in changed],
        unchanged=[_compared(ledger, x, y, tenant) for x, y in same] if unchanged else [],
    )


def _compared(ledger: Ledger, x: TaskOutcome, y: TaskOutcome, tenant: str) -> ComparedTask:
    runs = [_own_run(ledger, outcome, tenant) for outcome in (x, y)]
    known = next((run for run in runs if run is not None), None)
    return ComparedTask(
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


def _whole(text: str | None) -> str:
    return "-" if text is None else text


def _short(text: str | None) -> str:
    said = "-" if text is None else " ".join(text.split())
    # Questions of one kind begin alike: their ends tell them apart.
    return said if len(said) <= 60 else f"{said[:29]}…{said[-30:]}"
