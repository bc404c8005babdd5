"""Runs, feedback and the rules of every write, on SQLite and on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memory.approvals import decide
from memory.errors import ConflictError, LedgerError, NotFoundError
from memory.ledger import Ledger
from memory.records import Purpose, Trust
from tests.memory import samples


def test_records_come_back_as_they_went_in(ledger: Ledger):
    task = samples.task('Wie viel ist 2 + 3? \u0000 \U0001f600 ünï "quoted"')
    run = samples.trajectory(task)
    word = samples.feedback(run)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    ledger.add_feedback(word)
    assert ledger.get_task(task.id) == task
    assert ledger.tasks([task.id, "task_unknown"]) == {task.id: task}
    assert ledger.get_trajectory(run.id) == run
    assert ledger.feedback(trajectory_id=run.id) == [word]


def test_half_an_emoji_from_a_careless_client_is_kept(ledger: Ledger):
    task = samples.task()
    run = samples.trajectory(task, answer="\ud83d")
    ledger.add_task(task)
    ledger.add_trajectory(run)
    assert ledger.get_trajectory(run.id).answer == "\ud83d"


def test_writing_the_same_record_twice_is_one_row(ledger: Ledger):
    task = samples.task()
    run = samples.trajectory(task)
    for _ in range(2):
        ledger.add_task(task)
        ledger.add_trajectory(run)
    assert ledger.trajectories() == [run]


def test_another_record_under_a_used_id_is_refused(ledger: Ledger):
    task = samples.task()
    ledger.add_task(task)
    with pytest.raises(ConflictError, match="use a new id"):
        ledger.add_task(task.model_copy(update={"reference": "6"}))
    assert ledger.get_task(task.id) == task


def test_a_record_written_again_after_it_moved_on_stays_moved_on(ledger: Ledger):
    task = samples.task()
    run = samples.trajectory(task)
    word = samples.feedback(run)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    ledger.add_feedback(word)
    ledger.set_trust(word.id, Trust.TRUSTED, "the verifier agrees")
    ledger.add_feedback(word)
    (judged,) = ledger.feedback()
    assert (judged.trust, judged.trust_reason) == (Trust.TRUSTED, "the verifier agrees")
    ledger.add_feedback(judged)


def test_what_was_decided_on_a_word_while_a_night_judged_it_stands(ledger: Ledger):
    task = samples.task()
    run = samples.trajectory(task)
    word = samples.feedback(run)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    ledger.add_feedback(word)
    decide(ledger.database, word.id, Trust.REJECTED, "a lie", tenant=word.tenant, by="operator")
    ledger.set_trust(word.id, Trust.TRUSTED, "a second voice said so")
    assert [said.trust for said in ledger.feedback() if said.id == word.id] == [Trust.REJECTED]


def test_a_measure_that_is_no_number_is_refused_in_one_line(ledger: Ledger):
    task = samples.task()
    ledger.add_task(task)
    run = samples.trajectory(task).model_copy(update={"seconds": float("nan")})
    with pytest.raises(LedgerError, match="cannot hold") as caught:
        ledger.add_trajectory(run)
    assert "\n" not in str(caught.value)


def test_a_free_figure_that_is_no_number_comes_back_as_not_measured(ledger: Ledger):
    ledger.add_generation(samples.generation(0).model_copy(update={"metrics": {"loss": float("nan")}}))
    assert ledger.generation(0).metrics == {"loss": None}


def test_unknown_ids_are_not_found(ledger: Ledger):
    with pytest.raises(NotFoundError, match="no task 'task_x'"):
        ledger.get_task("task_x")
    with pytest.raises(NotFoundError):
        ledger.get_trajectory("traj_x")
    with pytest.raises(NotFoundError):
        ledger.set_trust("fb_x", Trust.TRUSTED, "")
    with pytest.raises(NotFoundError, match="no task"):
        ledger.add_trajectory(samples.trajectory(samples.task()))
    with pytest.raises(NotFoundError, match="no trajectory"):
        ledger.add_feedback(samples.feedback(samples.trajectory(samples.task())))


def test_a_tenant_finds_nothing_of_another_and_says_nothing_on_it(ledger: Ledger):
    task = samples.task(tenant="ada")
    run = samples.trajectory(task)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    with pytest.raises(NotFoundError):
        ledger.get_task(task.id, tenant="bob")
    with pytest.raises(NotFoundError):
        ledger.get_trajectory(run.id, tenant="bob")
    with pytest.raises(NotFoundError):
        ledger.add_trajectory(samples.trajectory(task).model_copy(update={"tenant": "bob"}))
    with pytest.raises(NotFoundError):
        ledger.add_feedback(samples.feedback(run).model_copy(update={"tenant": "bob"}))
    assert ledger.trajectories(tenant="bob") == []
    assert ledger.get_trajectory(run.id, tenant="ada") == run


def test_runs_are_read_oldest_first_within_their_filters(ledger: Ledger):
    task = samples.task()
    ledger.add_task(task)
    runs = [samples.trajectory(task, str(i)) for i in range(5)]
    runs[2] = runs[2].model_copy(update={"purpose": Purpose.EVAL, "workload": "sums"})
    for run in runs:
        ledger.add_trajectory(run)
    assert ledger.trajectories() == runs
    assert ledger.trajectories(purpose=Purpose.EVAL) == [runs[2]]
    assert ledger.trajectories(workload="sums") == [runs[2]]
    assert ledger.trajectories(limit=2) == runs[:2]
    assert ledger.trajectories(limit=2, newest_first=True) == [runs[4], runs[3]]


def test_a_watermark_parts_what_was_there_from_what_came_later(ledger: Ledger):
    assert ledger.watermark() == {"trajectory": 0, "feedback": 0}
    task = samples.task()
    ledger.add_task(task)
    early, late = samples.trajectory(task, "1"), samples.trajectory(task, "2")
    ledger.add_trajectory(early)
    first = samples.feedback(early)
    ledger.add_feedback(first)
    mark = ledger.watermark()
    ledger.add_trajectory(late)
    second = samples.feedback(late)
    ledger.add_feedback(second)
    assert ledger.trajectories(upto_seq=mark["trajectory"]) == [early]
    assert ledger.trajectories(after_seq=mark["trajectory"]) == [late]
    assert ledger.feedback(upto_seq=mark["feedback"]) == [first]
    assert ledger.feedback(after_seq=mark["feedback"]) == [second]


def test_many_threads_write_at_once(ledger: Ledger):
    task = samples.task()
    ledger.add_task(task)
    runs = [samples.trajectory(task, str(i)) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ledger.add_trajectory, runs))
    assert {run.id for run in ledger.trajectories()} == {run.id for run in runs}
    assert ledger.watermark()["trajectory"] == 40


WRITER = """
import sys
from memory.ledger import Ledger
from tests.memory import samples
ledger = Ledger.open(sys.argv[1])
shared = sys.argv[2]
for i in range(12):
    task = samples.task(f"{i}?")
    ledger.add_task(task)
    ledger.add_trajectory(samples.trajectory(task))
    ledger.credit_use(shared, True, f"use {i}")
ledger.close()
"""


def test_two_processes_open_and_write_a_new_ledger_at_once(url: str):
    root = Path(__file__).parents[2]
    item = samples.principle()
    first = Ledger.open(url)
    first.add_principle(item)
    command = [sys.executable, "-c", WRITER, url, item.id]
    writers = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert len(first.trajectories()) == 24
    assert first.get_principle(item.id).uses == 12  # both counted the same twelve
    first.close()
