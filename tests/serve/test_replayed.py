"""What a night that goes on from the champion replays of earlier ones, by the fixed schedule and by retention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.dataset import DatasetConfig
from distill.snapshot import Snapshot
from memory import approvals
from memory.ledger import Ledger
from memory.night_records import Evaluation, Generation, GenerationStatus, Night, NightStatus, TaskOutcome
from memory.records import RECALLED, Example, ExampleKind, Task, Trust
from serve import promotion
from serve.settings import NightConfig
from serve.stages.dataset import replayed
from serve.stages.night_run import NightRun
from serve.wiring import open_ledger
from tests.memory import samples
from tests.serve.fakes import settings_in

WORKLOADS = ("sums", "words")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Two promoted nights; the second champion lost half of `sums`."""
    ledger = open_ledger(settings_in(tmp_path))
    promotion.ensure_base(ledger, "test/model")
    for number, sums in ((1, 1.0), (2, 0.5)):
        night = Night(id=f"night_{number}")
        ledger.add_night(night)
        ledger.set_examples(night.id, taught(ledger, number))
        made: dict[str, Any] = {"night_id": night.id, "parent": number - 1, "status": GenerationStatus.CANDIDATE}
        ledger.add_generation(Generation(number=number, base_model="test/model", **made))
        ledger.add_evaluation(measured(number, sums, night.id))
        ledger.promote(number, why="better", by="night")
        ledger.end_night(night.id, NightStatus.PROMOTED, [], candidate=number, report_path=None)
    yield ledger
    ledger.close()


def taught(ledger: Ledger, number: int) -> list[Example]:
    examples = []
    for workload in WORKLOADS:
        for n in range(20):
            asked: list[dict[str, Any]] = [{"role": "user", "content": f"{workload} {number} {n}"}]
            task = Task(workload=workload, messages=asked)
            ledger.add_task(task)
            said = [*asked, {"role": "assistant", "content": str(n)}]
            fields: dict[str, Any] = {"workload": workload, "task_id": task.id, "messages": said}
            examples.append(Example(recipe="successes", kind=ExampleKind.SFT, **fields))
    return examples


def measured(generation: int, sums: float, night_id: str) -> Evaluation:
    scores = {"sums": sums, "words": 0.8}
    outcomes = [
        TaskOutcome(key=f"{workload} {n}", workload=workload, score=float(n < 10 * scores[workload]))
        for workload in WORKLOADS
        for n in range(10)
    ]
    fields: dict[str, Any] = {"suite": "held_out", "suite_hash": "h", "role": "held_out", "memory": True}
    return Evaluation(generation=generation, outcomes=outcomes, seconds=1.0, night_id=night_id, **fields)


def drawn_tonight(ledger: Ledger, folder: Path, new: list[Example], **night: Any) -> list[Example]:
    caps = DatasetConfig(**{name: night.pop(name) for name in list(night) if name.startswith("max_per_")})
    drawn: dict[str, Any] = {"champion": ledger.champion().number, "upto": ledger.watermark()}
    drawn |= {name: night.pop(name) for name in ("champion", "train_from") if name in night}
    settings = settings_in(folder, night=NightConfig(**{"replay_share": 0.5, **night}), dataset=caps)
    services: Any = SimpleNamespace(ledger=ledger, settings=settings)
    run = NightRun(services, Night(id="night_3"), lambda *_, **__: None, lambda _stage: drawn)
    return replayed(run, Snapshot([], [], {}), new)


def tonight(ledger: Ledger, folder: Path, **night: Any) -> Counter[str]:
    new = [Example(recipe="successes", kind=ExampleKind.SFT, task_id=f"new_{n}", messages=[]) for n in range(16)]
    return Counter(example.workload for example in drawn_tonight(ledger, folder, new, **night))


def test_by_default_every_workload_has_its_fixed_share(ledger: Ledger, tmp_path: Path) -> None:
    assert tonight(ledger, tmp_path) == {"sums": 4, "words": 4}


def test_by_retention_a_workload_that_the_champion_lost_is_replayed_more(ledger: Ledger, tmp_path: Path) -> None:
    assert tonight(ledger, tmp_path, replay_schedule="retention") == {"sums": 12, "words": 4}


def test_nights_from_different_champions_replay_different_examples(ledger: Ledger, tmp_path: Path) -> None:
    new = [Example(recipe="successes", kind=ExampleKind.SFT, task_id=f"new_{n}", messages=[]) for n in range(16)]
    first, again = (drawn_tonight(ledger, tmp_path, new) for _ in range(2))
    assert first == again
    ledger.add_generation(Generation(number=3, base_model="test/model", parent=2, status=GenerationStatus.CANDIDATE))
    ledger.promote(3, why="better", by="night")
    other = drawn_tonight(ledger, tmp_path, new)
    assert len(other) == len(first) == 8
    assert {e.id for e in other} != {e.id for e in first}


def test_from_the_base_model_nothing_is_replayed(ledger: Ledger, tmp_path: Path) -> None:
    assert not tonight(ledger, tmp_path, train_from="base", replay_schedule="retention")


def test_a_question_that_came_again_is_not_replayed_beside_todays_word_on_it(ledger: Ledger, tmp_path: Path) -> None:
    # Word for word it would be one id with two origins; otherwise it would teach what was superseded.
    first, *_, last = known = ledger.examples("night_1")
    other = [*first.messages[:-1], {"role": "assistant", "content": "something else"}]
    new = [*known[1:-1], first.model_copy(update={"id": "ex_other", "messages": other}), last]
    replayed_too = drawn_tonight(ledger, tmp_path, new, replay_share=4.0)
    assert {e.id for e in replayed_too} == {e.id for e in ledger.examples("night_2")}
    ledger.add_night(Night(id="night_3"))
    ledger.set_examples("night_3", [*new, *replayed_too])


def test_what_only_a_generation_learned_that_was_rolled_back_is_not_replayed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.promote(1, why="worse", by="ada")
    new = [Example(recipe="successes", kind=ExampleKind.SFT, task_id=f"new_{n}", messages=[]) for n in range(16)]
    replayed_too = drawn_tonight(ledger, tmp_path, new, replay_share=4.0, train_from="champion")
    assert {e.id for e in replayed_too} == {e.id for e in ledger.examples("night_1")}


def test_from_the_base_model_uploaded_lessons_are_taught_again_all_of_them(ledger: Ledger, tmp_path: Path) -> None:
    task = Task(workload="files", messages=[{"role": "user", "content": "uploaded"}])
    ledger.add_task(task)
    ledger.add_night(Night(id="night_3", options={"training_file": "file_1"}))
    made: dict[str, Any] = {"night_id": "night_3", "parent": 2, "status": GenerationStatus.CANDIDATE}
    ledger.add_generation(Generation(number=3, base_model="test/model", **made))
    lesson = Example(recipe="file", kind=ExampleKind.SFT, task_id=task.id, messages=task.messages)
    ledger.set_examples("night_3", [lesson])
    ledger.promote(3, why="better", by="night")
    ledger.end_night("night_3", NightStatus.PROMOTED, [], candidate=3, report_path=None)
    assert drawn_tonight(ledger, tmp_path, [], train_from="base") == [lesson]


def test_what_rests_on_a_word_that_was_rejected_since_is_not_replayed(ledger: Ledger, tmp_path: Path) -> None:
    task = samples.task("planted")
    run = samples.trajectory(task)
    said = samples.feedback(run)
    ledger.add_run(task, run)
    ledger.add_feedback(said)
    planted = Example(recipe="corrections", kind=ExampleKind.SFT, task_id=task.id, messages=[], sources=[said.id])
    ledger.set_examples("night_1", [planted])
    new = [Example(recipe="successes", kind=ExampleKind.SFT, task_id=f"new_{n}", messages=[]) for n in range(32)]
    assert planted in drawn_tonight(ledger, tmp_path, new, replay_share=4.0)
    approvals.decide(ledger.database, said.id, Trust.REJECTED, "it is wrong", tenant=task.tenant, by="operator")
    assert planted not in drawn_tonight(ledger, tmp_path, new, replay_share=4.0)


def test_replay_takes_what_the_caps_leave_beside_the_new_examples(ledger: Ledger, tmp_path: Path) -> None:
    def corrected(question: str, author: str) -> list[Example]:
        """A laid out correction by `author`, with memory and without."""
        task = samples.task(question)
        run = samples.trajectory(task)
        said = samples.feedback(run).model_copy(update={"author": author})
        ledger.add_run(task, run)
        ledger.add_feedback(said)
        fields: dict[str, Any] = {"kind": ExampleKind.SFT, "task_id": task.id, "sources": [run.id, said.id]}
        shown = {"role": "user", "content": "a past run", "name": RECALLED}
        return [
            Example(recipe="corrections", messages=[*block, *task.messages], with_memory=bool(block), **fields)
            for block in ([shown], [])
        ]

    def drawn(**caps: int) -> Counter[str]:
        found = drawn_tonight(ledger, tmp_path, new, replay_share=4.0, **caps)
        return Counter(author_of[e.id] for e in found)

    new = [row for n in range(6) for row in corrected(f"Which of {n} hills is highest?", "eve")]
    earlier = {
        name: [row for n in range(8) for row in corrected(f"Where did {name} put {n} keys?", name)]
        for name in ("eve", "ann")
    }
    author_of = {row.id: name for name, rows in earlier.items() for row in rows}
    ledger.set_examples("night_1", [])
    ledger.set_examples("night_2", [*earlier["eve"], *earlier["ann"]])
    assert drawn() == {"eve": 16, "ann": 16}
    assert drawn(max_per_author=7) == {"eve": 2, "ann": 14}, "lessons, each with its copy without memory"
    assert drawn(max_per_author=6) == {"ann": 12}
    assert (drawn(max_per_workload=9).total(), drawn(max_per_workload=6).total()) == (6, 0)


def test_a_switch_after_the_line_was_drawn_changes_nothing_of_what_is_replayed(ledger: Ledger, tmp_path: Path) -> None:
    new = [Example(recipe="successes", kind=ExampleKind.SFT, task_id=f"new_{n}", messages=[]) for n in range(16)]
    before = drawn_tonight(ledger, tmp_path, new, replay_share=4.0, champion=2)
    assert before
    ledger.promote(1, why="worse", by="ada")
    assert drawn_tonight(ledger, tmp_path, new, replay_share=4.0, champion=2) == before
