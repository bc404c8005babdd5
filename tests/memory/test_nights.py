"""Nights, generations and promotions, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.night_records import GenerationStatus, Night, NightStatus, Promotion, StageRun
from tests.memory import samples

CHAMPION, CANDIDATE = GenerationStatus.CHAMPION, GenerationStatus.CANDIDATE
RETIRED, REJECTED = GenerationStatus.RETIRED, GenerationStatus.REJECTED


def standing(ledger: Ledger) -> list[GenerationStatus]:
    return [generation.status for generation in ledger.generations()]


def test_a_promotion_changes_log_and_both_generations_together(ledger: Ledger):
    ledger.add_generation(samples.generation(0, CHAMPION))
    ledger.add_generation(samples.generation(1))
    promotion = ledger.promote(1, "better by 12 points", by="gate", expected_from=0)
    assert ledger.champion().number == 1
    assert standing(ledger) == [RETIRED, CHAMPION]
    assert ledger.promotions() == [promotion]
    assert (promotion.from_generation, promotion.to_generation) == (0, 1)
    back = ledger.promote(0, "worse on live traffic", by="watch")
    assert standing(ledger) == [CHAMPION, RETIRED]
    assert ledger.promotions() == [promotion, back]


def test_a_promotion_decided_against_another_champion_changes_nothing(ledger: Ledger):
    ledger.add_generation(samples.generation(0, CHAMPION))
    for number in (1, 2):
        ledger.add_generation(samples.generation(number))
    ledger.promote(1, "first", by="gate", expected_from=0)
    with pytest.raises(ConflictError, match="not 0"):
        ledger.promote(2, "late", by="gate", expected_from=0)
    assert standing(ledger) == [RETIRED, CHAMPION, CANDIDATE]
    assert len(ledger.promotions()) == 1


def test_a_repeated_promotion_is_one_promotion(ledger: Ledger):
    ledger.add_generation(samples.generation(0, CHAMPION))
    ledger.add_generation(samples.generation(1))
    first = ledger.promote(1, "better", by="gate", expected_from=0)
    assert ledger.promote(1, "better", by="gate", expected_from=0) == first
    assert ledger.promotions() == [first]


def test_a_new_champion_ends_the_trial_against_the_old_one(ledger: Ledger):
    ledger.add_generation(samples.generation(0, CHAMPION))
    for number in (1, 2):
        ledger.add_generation(samples.generation(number))
    ledger.begin_canary(1, 0.1, "on trial", by="operator")
    ledger.promote(2, "better by 12 points", by="gate", expected_from=0)
    assert ledger.canary() is None
    assert standing(ledger) == [RETIRED, RETIRED, CHAMPION]
    ended, switched = ledger.promotions()
    assert (ended.from_generation, ended.to_generation, switched.from_generation) == (1, 0, 0)
    ledger.begin_canary(1, 0.1, "again, against the new one", by="operator")
    ledger.promote(1, "stood its trial", by="watch", expected_from=2)
    assert len(ledger.promotions()) == 3


def test_a_promotion_that_fails_half_way_leaves_the_old_champion(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    ledger.add_generation(samples.generation(0, CHAMPION))
    ledger.add_generation(samples.generation(1))

    class Torn(Promotion):
        def __init__(self, **_: object) -> None:
            raise RuntimeError("power cut")

    # The log row is written last: dying there is dying half-way.
    monkeypatch.setattr("memory.nights.Promotion", Torn)
    with pytest.raises(RuntimeError):
        ledger.promote(1, "better", by="gate")
    assert standing(ledger) == [CHAMPION, CANDIDATE]
    assert ledger.promotions() == []


def test_of_two_promotions_at_once_against_the_same_champion_one_wins(ledger: Ledger):
    ledger.add_generation(samples.generation(0, CHAMPION))
    for number in (1, 2):
        ledger.add_generation(samples.generation(number))

    def attempt(number: int) -> bool:
        try:
            ledger.promote(number, "better", by="gate", expected_from=0)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, (1, 2))) == [False, True]
    assert standing(ledger).count(CHAMPION) == 1


def test_generations_move_only_legally_and_never_around_a_promotion(ledger: Ledger):
    with pytest.raises(NotFoundError, match="no champion yet"):
        ledger.champion()
    assert ledger.next_generation_number() == 0
    ledger.add_generation(samples.generation(0, CHAMPION))
    ledger.add_generation(samples.generation(1))
    assert ledger.next_generation_number() == 2
    with pytest.raises(ConflictError, match="cannot be added as champion"):
        ledger.add_generation(samples.generation(2, CHAMPION))
    with pytest.raises(ConflictError, match="only a promotion"):
        ledger.advance_generation(1, CHAMPION)
    with pytest.raises(ConflictError, match="only a promotion"):
        ledger.advance_generation(0, RETIRED)
    with pytest.raises(ConflictError, match="cannot become"):
        ledger.advance_generation(1, RETIRED)
    ledger.advance_generation(1, CANDIDATE, {"loss": 0.5})
    ledger.advance_generation(1, REJECTED, {"gain": -0.1})
    assert ledger.generation(1).metrics == {"loss": 0.5, "gain": -0.1}
    with pytest.raises(ConflictError, match="cannot become champion"):
        ledger.promote(1, "anyway", by="ada")
    with pytest.raises(NotFoundError):
        ledger.promote(7, "unknown", by="ada")
    with pytest.raises(ConflictError, match="already"):
        ledger.promote(0, "again", by="ada")


def test_a_night_ends_once(ledger: Ledger):
    night = Night(options={"recipes": ["successes"]})
    ledger.add_night(night)
    ledger.set_candidate(night.id, 3)
    with pytest.raises(ConflictError):
        ledger.end_night(night.id, NightStatus.RUNNING, [])
    ended = ledger.end_night(night.id, NightStatus.REJECTED, ["not better"], report_path="/r.html")
    assert ledger.end_night(night.id, NightStatus.REJECTED, ["said again"]) == ended
    with pytest.raises(ConflictError, match="has ended as rejected"):
        ledger.end_night(night.id, NightStatus.PROMOTED, [])
    with pytest.raises(ConflictError):
        ledger.set_candidate(night.id, 4)
    kept = ledger.night(night.id)
    assert (kept.candidate, kept.reasons, kept.report_path) == (3, ["not better"], "/r.html")
    assert kept.ended_at is not None
    assert ledger.nights() == [kept]


def test_of_nights_that_begin_at_once_one_does(ledger: Ledger):
    nights, together = [Night() for _ in range(4)], Barrier(4)

    def begin(night: Night) -> str | None:
        together.wait()
        try:
            ledger.add_night(night)
        except ConflictError as exc:
            return str(exc)
        return None

    with ThreadPoolExecutor(4) as pool:
        refused = [said for said in pool.map(begin, nights) if said is not None]
    [begun] = ledger.nights()
    assert len(refused) == 3
    assert set(refused) == {f"night {begun.id} is running; wait for it or cancel it"}
    ledger.add_night(begun)
    ledger.end_night(begun.id, NightStatus.SKIPPED, [])
    ledger.add_night(nights[0] if nights[0].id != begun.id else nights[1])


def test_the_first_output_of_a_stage_stays(ledger: Ledger):
    night = Night()
    ledger.add_night(night)
    first = StageRun(night_id=night.id, stage="train", output={"adapter": "a"}, seconds=2.0)
    second = StageRun(night_id=night.id, stage="train", output={"adapter": "b"}, seconds=9.0)
    assert ledger.stage(night.id, "train") is None
    assert ledger.record_stage(first) == first
    assert ledger.record_stage(second) == first
    assert ledger.stage(night.id, "train") == first
    assert ledger.stages(night.id) == [first]
    with pytest.raises(NotFoundError):
        ledger.record_stage(first.model_copy(update={"night_id": "night_x"}))


def test_what_an_attempt_that_died_wrote_gives_way_to_the_next_ones_examples(ledger: Ledger):
    night = Night()
    ledger.add_night(night)
    made = [samples.example(samples.task(f"{i}?")) for i in range(4)]
    ledger.set_examples(night.id, made[:3])
    ledger.set_examples(night.id, [made[3], made[1]])
    assert ledger.examples(night.id) == [made[3], made[1]]


def test_a_nights_examples_are_kept_once_and_all_or_none(ledger: Ledger):
    night, later = Night(), Night()
    ledger.add_night(night)
    ledger.end_night(night.id, NightStatus.SKIPPED, [])
    ledger.add_night(later)
    made = [samples.example(samples.task(f"{i}?")) for i in range(4)]
    ledger.set_examples(night.id, made[:2])
    ledger.set_examples(night.id, [*made[:3], made[0]])
    assert ledger.examples(night.id) == made[:3]
    changed = made[0].model_copy(update={"weight": 2.0})
    with pytest.raises(ConflictError):
        ledger.set_examples(night.id, [made[0], changed])
    assert ledger.examples(night.id) == made[:3]
    ledger.set_examples(later.id, made[:1])
    assert ledger.examples(later.id) == made[:1]


def test_evaluations_are_found_by_night_generation_and_suite(ledger: Ledger):
    night = Night()
    ledger.add_night(night)
    champion, candidate = samples.evaluation(0), samples.evaluation(1, night_id=night.id)
    control = samples.evaluation(1, suite_hash="s2", night_id=night.id)
    for evaluation in (champion, candidate, control):
        ledger.add_evaluation(evaluation)
        ledger.add_evaluation(evaluation)
    assert ledger.evaluations() == [champion, candidate, control]
    assert ledger.evaluations(night_id=night.id, suite_hash="s1") == [candidate]
    assert ledger.evaluations(generation=0) == [champion]


@pytest.mark.parametrize("number", [-1, 2**31, 10**30])
def test_a_number_that_no_database_can_hold_is_the_number_of_no_generation(ledger: Ledger, number: int):
    with pytest.raises(NotFoundError):
        ledger.generation(number)
    assert ledger.evaluations(generation=number) == []
