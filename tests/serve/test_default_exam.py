"""The exam that is made of the days: whose tasks it holds, what it leaves out, and what a night makes of it."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from evals.suites import Suite
from memory.errors import NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Evaluation, Generation, GenerationStatus, Night, NightStatus, StageRun, TaskOutcome
from memory.records import RECALLED, Example, ExampleKind, StopReason, Task, Trajectory, VerifierSpec, content_hash, now
from serve.client import Client
from serve.settings import NightConfig
from serve.stages.evaluation import judge
from serve.stages.material import suites_of
from serve.suites import MAX_HELD_OUT, held_out_from_days
from tests.serve.fakes import fake_training, running, settings_in
from tests.serve.test_night_defects import School, script_of, words
from tests.serve.test_night_limits import ledger, night_in

__all__ = ["ledger"]


def asked(ledger: Ledger, question: str, age: float = 0.0, **fields: Any) -> Task:
    given: dict[str, Any] = {"reference": "2", "created_at": now() - timedelta(hours=age), **fields}
    task = Task(messages=[{"role": "user", "content": question}], **given)
    run = Trajectory(
        task_id=task.id, tenant=task.tenant, generation=0, model="base", messages=task.messages,
        stop_reason=StopReason.ANSWER, answer="2",
    )  # fmt: skip
    ledger.add_run(task, run)
    return task


def questions(exam: Suite) -> set[str]:
    return {item.task.question for item in exam.tasks}


def test_one_tenants_flood_and_one_workloads_leave_room_for_the_others(ledger: Ledger) -> None:
    for number in range(MAX_HELD_OUT + 100):
        asked(ledger, f"Flood {number}", age=number / 100, tenant="loud", workload="flood")
    for number in range(30):
        asked(ledger, f"Drop {number}", age=900 + number, tenant="loud", workload="drops")
        asked(ledger, f"Quiet {number}", age=990 + number, tenant="quiet")
    exam = held_out_from_days(ledger, 1.0)
    assert Counter(i.task.tenant for i in exam.tasks) == {"quiet": 30, "loud": MAX_HELD_OUT - 30}
    assert Counter(i.task.workload for i in exam.tasks)["drops"] == 30
    newest = MAX_HELD_OUT - 60
    assert {q for q in questions(exam) if q.startswith("Flood")} == {f"Flood {n}" for n in range(newest)}


def test_one_tenant_with_many_workloads_has_no_more_than_its_turn(ledger: Ledger) -> None:
    for number in range(MAX_HELD_OUT):
        asked(ledger, f"Flood {number}", tenant="loud", workload=f"flood {number}")
        asked(ledger, f"Quiet {number}", age=5, tenant="quiet")
    exam = held_out_from_days(ledger, 1.0)
    assert Counter(i.task.tenant for i in exam.tasks) == {"quiet": MAX_HELD_OUT / 2, "loud": MAX_HELD_OUT / 2}


def test_the_same_question_is_one_task_for_each_tenant_as_it_was_judged_last(ledger: Ledger) -> None:
    asked(ledger, "How many?", age=2, reference="1")
    asked(ledger, "How many?", age=1, reference="2")
    asked(ledger, "How many?", age=0, reference=None)
    asked(ledger, "How many?", age=3, reference="3", tenant="zoo")
    exam = held_out_from_days(ledger, 1.0)
    assert sorted((i.task.tenant, i.task.reference) for i in exam.tasks) == [("default", "2"), ("zoo", "3")]


def taught(ledger: Ledger, status: NightStatus, *texts: str) -> None:
    """A night that ended so, with examples that ask these."""
    night = Night()
    ledger.add_night(night)
    shown = {"role": "user", "content": "What is 9 + 9, shown by memory?", "name": RECALLED}
    examples = [
        Example(
            recipe="corrections",
            kind=ExampleKind.SFT,
            task_id=f"task {text}",
            messages=[shown, {"role": "user", "content": text}, {"role": "assistant", "content": "2"}],
        )
        for text in texts
    ]
    ledger.set_examples(night.id, examples)
    ledger.end_night(night.id, status, [])


def test_what_a_night_has_taught_or_nearly_is_no_task_of_the_exam_any_more(ledger: Ledger) -> None:
    long = "Please tell me now which two of all the numbers that you know of come to four, and why that is so"
    for question in (
        "What is 1 + 1?",
        f"{long}?",
        f"{long}, please!",
        "?!",
        "What is 7 - 5?",
        "What is 9 + 9, shown by memory?",
    ):
        asked(ledger, question)
    taught(ledger, NightStatus.REJECTED, "What is 7 - 5?")
    taught(ledger, NightStatus.PROMOTED, "what is 1+1", f"{long}.", "?!")
    exam = held_out_from_days(ledger, 1.0)
    assert questions(exam) == {"What is 7 - 5?", "What is 9 + 9, shown by memory?"}
    taught(ledger, NightStatus.PROMOTED, "What is 7 - 5?", "What is 9 + 9, shown by memory?")
    with pytest.raises(NotEnoughExperienceError, match="no night has taught"):
        held_out_from_days(ledger, 1.0)


def test_an_exam_that_grew_since_is_compared_with_the_best_generation_on_the_tasks_they_share(
    ledger: Ledger, tmp_path: Path
) -> None:
    for number in range(24):
        asked(ledger, f"What is {number} - 2?", workload="sums")
    before = held_out_from_days(ledger, 0.9)
    for number, status in ((1, GenerationStatus.CANDIDATE), (2, GenerationStatus.CANDIDATE)):
        ledger.add_generation(Generation(number=number, base_model="m", status=status))
        ledger.promote(number, why="better", by="night")
    ledger.add_generation(Generation(number=3, base_model="m", status=GenerationStatus.CANDIDATE))

    def measured(exam: Suite, generation: int, right: int, night: Night | None = None) -> None:
        outcomes = [
            TaskOutcome(key=i.key, workload="sums", score=float(n < right), task_hash=content_hash(i.task.content)[:16])
            for n, i in enumerate(exam.tasks)
        ]
        fields: dict[str, Any] = {"suite": exam.name, "suite_hash": exam.hash, "role": "held_out", "memory": True}
        night_id = night.id if night else None
        made = Evaluation(generation=generation, outcomes=outcomes, seconds=1.0, night_id=night_id, **fields)
        ledger.add_evaluation(made)

    measured(before, 1, right=len(before.tasks))
    for number in range(30, 33):
        asked(ledger, f"What is {number} - 2?", workload="sums")
    night = Night()
    run = night_in(ledger, tmp_path, [], night, held_out_share=0.9, controls=[], triggers=False)
    (exam,) = suites_of(run)
    assert before.hash != exam.hash
    measured(exam, 2, right=15, night=night)
    measured(exam, 3, right=14, night=night)
    outputs = {"snapshot": {"champion": 2}, "train": {"generation": 3}, "evaluate": {"generations": [2, 3]}}
    for stage, output in outputs.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=1.0))
    reasons = judge(run)["reasons"]
    assert any(r.startswith("Since generation 1 held-out workload 'sums' went from") for r in reasons), reasons


def test_a_task_whose_verifier_fails_at_an_answer_does_not_end_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.stages.training.launch.run", fake_training)
    night = NightConfig(rehearsal=0, principles=0, min_failures=0, held_out_share=0.5, controls=["chat"])
    regex = VerifierSpec(name="regex", args={"pattern": r"(a|aa)+$"})
    snares = [Task(messages=[{"role": "user", "content": f"Snare {n}"}], tools=[], verifier=regex) for n in range(9)]
    trap = next(task for task in snares if int(task.fingerprint[:8], 16) / 0xFFFFFFFF < 0.5)

    def pupil(question: str) -> str:
        return "a" * 60 + "!" if question == trap.question else "Well, nothing."

    with running(settings_in(tmp_path, night=night), script_of({0: lambda _: "?", 1: pupil})) as (url, services):
        school = School(Client(url), services.ledger, {})
        tasks = [*words(range(100, 180)), trap]
        school.day(tasks, [str(task.reference) for task in tasks[:-1]], "ann")
        status, reasons = school.night(pupil)
        exams = {e.generation: e for e in services.ledger.evaluations() if e.suite == "held_out"}
    assert status == "rejected", reasons
    assert any("verifiers failed at 1 of the tasks of 'held_out'" in reason for reason in reasons), reasons
    assert [len(exams[n].unjudged) for n in (0, 1)] == [0, 1]
