"""What a night does to memory, with the scripted model at its only seam."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.equivalence import YES_OR_NO
from evals.suites import EvalTask, Suite, save_suite
from memory import approvals, shelf
from memory.night_records import GenerationStatus, Night, NightStatus
from memory.records import (
    Feedback,
    FeedbackKind,
    MemoryKind,
    MemoryStatus,
    Outcome,
    OutcomeSource,
    Principle,
    Recalled,
    Trust,
)
from serve import lessons
from serve.night import run_stage
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import running, services_in, settings_in

NUMBER = {"similarity": 1.0, "score": 0.5, "recency": 1.0, "rank": 1.0, "tokens": 9, "why": "near"}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    loop = asyncio.new_event_loop()
    with services_in(settings_in(tmp_path), lambda _: "No", loop) as made:
        yield made
    loop.close()


def kept(services: Services, *principles: Principle, reply: str = "Yes") -> dict[str, int]:
    async def judge(prompt: str, regex: str | None) -> str:
        assert regex == YES_OR_NO
        return reply

    return asyncio.run(lessons.keep_principles(services, principles, judge))


ONE = samples.principle("Always check the units before you give the answer.")
SAME = samples.principle("Check the units always before you give an answer.")
OTHER = samples.principle("Sort the words by their length.")


def test_a_new_principle_that_says_the_same_is_merged_into_the_known_one(services: Services):
    assert kept(services, ONE) == {"added": 1, "merged": 0}
    assert kept(services, SAME, OTHER) == {"added": 2, "merged": 1}
    merged = services.ledger.get_principle(SAME.id)
    assert (merged.status, merged.merged_into) == (MemoryStatus.MERGED, ONE.id)
    active = services.ledger.principles(status=MemoryStatus.ACTIVE)
    assert [p.id for p in active] == [ONE.id, OTHER.id]
    assert kept(services, SAME, OTHER) == {"added": 1, "merged": 0}


def test_two_of_one_night_find_each_other_and_a_no_keeps_both(services: Services):
    assert kept(services, ONE, SAME, reply="No") == {"added": 2, "merged": 0}
    assert len(services.ledger.principles(status=MemoryStatus.ACTIVE)) == 2


def test_a_lesson_that_was_retired_does_not_come_back_in_other_words(services: Services):
    kept(services, ONE)
    services.ledger.set_memory_status(ONE.id, MemoryStatus.RETIRED, "it misled")
    assert kept(services, SAME) == {"added": 1, "merged": 1}
    assert services.ledger.principles(status=MemoryStatus.ACTIVE) == []


@pytest.mark.parametrize("pinned", [True, False])
def test_a_principle_that_somebody_reworded_stays_when_the_model_says_the_old_words_again(
    services: Services, pinned: bool
):
    kept(services, ONE)
    database = services.ledger.database
    shelf.reword(database, ONE.id, "Say which unit you mean.", "clearer", tenant=ONE.tenant)
    shelf.set_pinned(database, ONE.id, pinned, "mine", tenant=ONE.tenant)
    services.ledger.add_principle(SAME)
    assert kept(services, ONE) == {"added": 0, "merged": 0}
    reworded = services.ledger.get_principle(ONE.id)
    assert (reworded.text, reworded.status) == ("Say which unit you mean.", MemoryStatus.ACTIVE)


def test_runs_count_by_verifier_or_users_and_as_controls_where_the_item_was_withheld(services: Services):
    ledger = services.ledger
    ledger.add_principle(ONE)
    shown = Recalled(id=ONE.id, kind=MemoryKind.PRINCIPLE, **NUMBER)
    withheld = shown.model_copy(update={"withheld": True})
    won = Outcome(score=1.0, by=OutcomeSource.VERIFIER)
    runs = []
    for n, (item, outcome) in enumerate([(shown, won), (withheld, won), (shown, None), (shown, None)]):
        task = samples.task(f"Question {n}?")
        run = samples.trajectory(task).model_copy(update={"recalled": [item], "outcome": outcome})
        ledger.add_run(task, run)
        runs.append(run)
    said = Feedback(trajectory_id=runs[2].id, kind=FeedbackKind.SCORE, value=0, trust=Trust.TRUSTED)
    assert lessons.credit_runs(services, runs, [said]) == 3
    assert lessons.credit_runs(services, runs, [said]) == 0
    counted = ledger.get_principle(ONE.id)
    assert (counted.uses, counted.successes) == (2, 1)
    better = said.model_copy(update={"value": 1})
    assert lessons.credit_runs(services, runs, [better]) == 1
    assert ledger.get_principle(ONE.id).successes == 2


def test_a_review_retires_and_the_index_hears_of_it(services: Services):
    bad = ONE.model_copy(update={"uses": 9, "successes": 0})
    services.ledger.add_principle(bad)
    assert services.ledger.champion().status is GenerationStatus.CHAMPION
    assert lessons.review_items(services, 0) == {"retired": 1}
    assert lessons.review_items(services, 0) == {}
    assert services.ledger.outbox(1) == []
    assert services.index.count() == 0


def dreamt(services: Services) -> None:
    """A night as far as memory goes."""
    night = Night()
    services.ledger.add_night(night)
    for stage in ("snapshot", "credit", "principles"):
        run_stage(night.id, stage)
    services.ledger.end_night(night.id, NightStatus.SKIPPED, [])


def test_a_past_run_is_recalled_no_more_once_the_correction_behind_it_was_rejected(tmp_path: Path):
    settings = settings_in(tmp_path)
    exam = EvalTask(key="sky", task=samples.task("Which colour has the sky?"))
    save_suite(Suite(name="held_out", role="held_out", tasks=[exam]), settings.suites_dir / "held_out.jsonl")
    task = samples.task("How many seats has the van?").model_copy(update={"reference": None})
    run = samples.trajectory(task, answer="6")
    said = Feedback(trajectory_id=run.id, kind=FeedbackKind.CORRECTION, value="9", author="operator")
    with running(settings, lambda _: "No") as (_, services):
        ledger, asked = services.ledger, samples.task("How many seats has the red van?")
        ledger.add_run(task, run)
        ledger.add_feedback(said)
        dreamt(services)
        (kept,) = ledger.past_runs()
        assert said.id in kept.sources
        assert [item.id for item in services.memory.recall(asked).items] == [kept.id]

        approvals.decide(ledger.database, said.id, Trust.REJECTED, "it has eight", tenant="default", by="operator")
        dreamt(services)
        (gone,) = ledger.past_runs()
        assert (gone.id, gone.status) == (kept.id, MemoryStatus.RETIRED)
        assert services.memory.recall(asked).items == []
