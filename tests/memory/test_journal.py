"""Runs written together: one commit, each with its own answer, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from sqlalchemy import event

from memory.errors import ConflictError, LedgerError
from memory.ledger import Ledger
from memory.night_records import GenerationStatus
from tests.memory import samples


def test_runs_that_end_together_share_commits_and_are_all_there(ledger: Ledger):
    commits: list[int] = []
    event.listen(ledger.database.engine, "commit", lambda _: commits.append(1))
    tasks = [samples.task(f"What is {i} + 1?") for i in range(60)]
    runs = [samples.trajectory(task) for task in tasks]

    async def all_at_once() -> None:
        with ledger.database.writing():  # the writer waits: the others queue up behind its first group
            waiting = [asyncio.create_task(ledger.record(*pair)) for pair in zip(tasks, runs, strict=True)]
            await asyncio.sleep(0.05)
        await asyncio.gather(*waiting)

    asyncio.run(all_at_once())
    assert sorted(run.id for run in ledger.trajectories()) == sorted(run.id for run in runs)
    assert ledger.tasks([task.id for task in tasks]) == {task.id: task for task in tasks}
    assert len(commits) < 10


def test_a_run_is_on_disk_when_its_record_returns(url: str):
    ledger = Ledger.open(url)
    task = samples.task()
    run = samples.trajectory(task)
    asyncio.run(ledger.record(task, run))
    other = Ledger.open(url)
    try:
        assert other.get_trajectory(run.id) == run
    finally:
        other.close()
        ledger.close()


def test_one_refused_run_leaves_those_beside_it_alone(ledger: Ledger):
    known = samples.task()
    first = samples.trajectory(known)
    fine = samples.task("What is 4 + 4?")
    good = samples.trajectory(fine)
    unwritable = samples.trajectory(fine).model_copy(update={"seconds": float("nan")})

    async def together() -> Sequence[object]:
        await ledger.record(known, first)
        return await asyncio.gather(
            ledger.record(known.model_copy(update={"reference": "6"}), samples.trajectory(known)),
            ledger.record(known, first.model_copy(update={"answer": "7"})),
            ledger.record(samples.task(), good),
            ledger.record(fine, unwritable),
            ledger.record(fine, good),
            return_exceptions=True,
        )

    results = asyncio.run(together())
    assert [type(r) for r in results] == [ConflictError, ConflictError, ConflictError, LedgerError, type(None)]
    assert ledger.trajectories() == [first, good]


def test_the_same_run_twice_is_one_row_and_a_task_asked_again_is_the_same_task(ledger: Ledger):
    task = samples.task()
    again = task.model_copy(update={"source": "batch", "created_at": samples.task().created_at})
    run, second = samples.trajectory(task), samples.trajectory(task)

    async def asked_again() -> None:
        await asyncio.gather(*(ledger.record(task, run) for _ in range(3)), ledger.record(again, second))

    asyncio.run(asked_again())
    assert {r.id for r in ledger.trajectories()} == {run.id, second.id}
    assert ledger.get_task(task.id) == task


def test_closing_writes_what_was_handed_in(url: str):
    ledger = Ledger.open(url)
    task = samples.task()
    run = samples.trajectory(task)
    handed_in = threading.Event()

    async def hand_in_and_go() -> None:
        waiting = asyncio.create_task(ledger.record(task, run))
        await asyncio.sleep(0)
        handed_in.set()
        ledger.close()
        await waiting

    asyncio.run(hand_in_and_go())
    other = Ledger.open(url)
    try:
        assert other.get_trajectory(run.id) == run
    finally:
        other.close()
    with pytest.raises(LedgerError, match="closed"):
        asyncio.run(ledger.record(task, run))


def test_what_is_served_follows_a_switch_at_once(sqlite_ledger: Ledger):
    for number, status in enumerate((GenerationStatus.CHAMPION, GenerationStatus.CANDIDATE)):
        sqlite_ledger.add_generation(samples.generation(number, status))
    before = sqlite_ledger.serving()
    assert before == sqlite_ledger.champion()
    sqlite_ledger.promote(1, why="better", by="gate")
    assert sqlite_ledger.serving().number == 1


def test_a_run_of_another_task_is_refused_also_when_that_task_is_known(ledger: Ledger):
    known, other = samples.task(), samples.task("What is 4 + 4?")
    asyncio.run(ledger.record(known, samples.trajectory(known)))
    with pytest.raises(ConflictError, match="is not a run of task"):
        asyncio.run(ledger.record(other, samples.trajectory(known)))
    assert len(ledger.trajectories()) == 1
