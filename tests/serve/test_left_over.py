"""What a promoted night had no room or no time for is learned by the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.dataset import DatasetConfig
from evals.suites import EvalTask, Suite, save_suite
from memory.errors import NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.recall import NoMemory
from memory.records import Feedback, FeedbackKind, Outcome, OutcomeSource, Purpose, Trajectory, Trust, now
from serve import promotion
from serve.settings import NightConfig
from serve.stages.dataset import make_dataset
from serve.stages.material import load_snapshot, snapshot, tonights
from serve.stages.night_run import NightRun, Output
from serve.stages.worth import nothing_new
from serve.wiring import open_ledger
from tests.memory import samples
from tests.serve.fakes import settings_in
from tests.serve.test_forgetting_spares import shown_hints
from tests.serve.test_night_limits import night_in

PLACES = ("river", "hill", "lake", "town", "forest", "desert", "island", "bridge", "valley", "harbour")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Ten failed runs, each with a trusted correction by the same voice."""
    settings = settings_in(tmp_path)
    opened = open_ledger(settings)
    promotion.ensure_base(opened, settings.model)
    exam = Suite(name="held_out", role="held_out", tasks=[EvalTask(key="4", task=samples.task("What comes after 4?"))])
    save_suite(exam, settings.suites_dir / "held_out.jsonl")
    for place in PLACES:
        corrected(opened, f"Which {place} is widest?")
    yield opened
    opened.close()


def corrected(ledger: Ledger, question: str, author: str = "ann") -> Trajectory:
    task = samples.task(question)
    failed = Outcome(score=0.0, by=OutcomeSource.VERIFIER)
    run = samples.trajectory(task, "I would rather not.").model_copy(update={"outcome": failed})
    ledger.add_run(task, run)
    word: dict[str, Any] = {"kind": FeedbackKind.CORRECTION, "value": "5", "trust": Trust.TRUSTED}
    ledger.add_feedback(Feedback(trajectory_id=run.id, author=author, **word))
    return run


def night(ledger: Ledger, folder: Path, most: int = 4, **options: Any) -> tuple[NightRun, Output]:
    """A night that may take `most` examples of one author, up to its dataset."""
    run = night_in(ledger, folder, [], Night(options=options))
    config = NightConfig(min_examples=1, rehearsal=0, replay_share=1.0, controls=[])
    settings = settings_in(folder, night=config, dataset=DatasetConfig(max_per_author=most))

    def no_wait(work: Any) -> list[Any]:
        work.close()
        return []

    services: Any = SimpleNamespace(settings=settings, ledger=ledger, memory=NoMemory(), llm=None, base_model=folder)
    drawn = replace(run, services=services)
    object.__setattr__(drawn, "wait", no_wait)
    record(ledger, run.night, "snapshot", snapshot(drawn))
    record(ledger, run.night, "dataset", made := make_dataset(drawn))
    return drawn, made


def record(ledger: Ledger, night: Night, stage: str, output: Output) -> None:
    ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=0.0))


def ended(ledger: Ledger, run: NightRun, left: list[str] | None = None, promote: bool = True) -> None:
    """The rest of the night; `left`: what its training did not reach."""
    number = ledger.next_generation_number()
    parent: dict[str, Any] = {"parent": ledger.champion().number, "status": GenerationStatus.CANDIDATE}
    ledger.add_generation(Generation(number=number, base_model="m", night_id=run.night.id, **parent))
    record(ledger, run.night, "train", {"generation": number, "left": left or []})
    record(ledger, run.night, "decide", {"verdict": "promote" if promote else "reject"})
    if promote:
        ledger.promote(number, why="better", by="night")
    status = NightStatus.PROMOTED if promote else NightStatus.REJECTED
    ledger.end_night(run.night.id, status, [], candidate=number, report_path=None)


def taught(ledger: Ledger, run: NightRun) -> set[str]:
    """The questions of the night's new examples."""
    earlier = {e.id for n in ledger.nights() if n.id != run.night.id for e in ledger.examples(n.id)}
    return {e.messages[-2]["content"] for e in ledger.examples(run.night.id) if e.id not in earlier}


def test_what_one_voice_said_beyond_its_cap_is_taught_by_the_nights_that_follow(ledger: Ledger, tmp_path: Path) -> None:
    found: list[set[str]] = []
    for expected in (4, 4, 2):
        run, made = night(ledger, tmp_path)
        assert made["counts"]["corrections"] == expected
        assert len(made["left"]) == 10 - 4 * len(found) - expected
        found.append(taught(ledger, run))
        ended(ledger, run)
    assert len(set.union(*found)) == 10
    run = night_in(ledger, tmp_path, [])
    record(ledger, run.night, "snapshot", snapshot(run))
    assert load_snapshot(run).trajectories == []


def test_what_training_did_not_reach_is_material_of_the_next_night_and_what_it_replayed_is_not(
    ledger: Ledger, tmp_path: Path
) -> None:
    run, _ = night(ledger, tmp_path, most=100)
    runs = [t.id for t in load_snapshot(run).trajectories]
    assert tonights(run, [*runs[:3], "traj_of_an_earlier_night", "fb_1"]) == runs[:3]
    ended(ledger, run, left=runs[:3])
    again, made = night(ledger, tmp_path, most=100)
    assert [t.id for t in load_snapshot(again).trajectories] == runs[:3]
    assert (made["counts"]["corrections"], made["left"]) == (3, [])


def test_a_practised_run_that_training_did_not_reach_is_material_of_the_next_night(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, _ = night(ledger, tmp_path, most=100)
    task = samples.task("Which of them is deepest?")
    solved = Outcome(score=1.0, by=OutcomeSource.VERIFIER)
    tried = samples.trajectory(task).model_copy(update={"purpose": Purpose.PRACTICE, "outcome": solved})
    ledger.add_run(task, tried)
    record(ledger, first.night, "practice", {"upto": ledger.watermark()["trajectory"], "tries": 1})
    ended(ledger, first, left=[tried.id])
    new = corrected(ledger, "Who said so?")
    second, _ = night(ledger, tmp_path, most=100)
    assert {t.id for t in load_snapshot(second).trajectories} == {tried.id, new.id}


def test_the_hint_behind_a_try_is_material_of_a_night_that_does_not_go_back_so_far(
    ledger: Ledger, tmp_path: Path
) -> None:
    failed = ledger.trajectories()[0]
    hint = Feedback(trajectory_id=failed.id, kind=FeedbackKind.HINT, value="Look at a map.", trust=Trust.TRUSTED)
    ledger.add_feedback(hint)
    since = {"since": now().isoformat()}
    tried = shown_hints(ledger.get_task(failed.task_id), [hint])
    ledger.add_trajectory(tried)
    run = night_in(ledger, tmp_path, [], Night(options=since))
    record(ledger, run.night, "snapshot", snapshot(run))
    material = load_snapshot(run)
    assert [t.id for t in material.trajectories] == [tried.id]
    assert [said.id for said in material.feedback] == [hint.id], "its author's cap counts what it teaches"


def test_a_dataset_stage_that_runs_again_and_a_rejected_night_lose_nothing_of_it(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, made = night(ledger, tmp_path)
    assert make_dataset(first) == made
    ended(ledger, first)
    second, made = night(ledger, tmp_path)
    material = load_snapshot(second)
    assert make_dataset(second) == made
    ended(ledger, second, promote=False)
    assert load_snapshot(second) == material, "whatever came of the night, its material is the same"
    corrected(ledger, "Who said so?")
    third, made = night(ledger, tmp_path)
    assert len(load_snapshot(third).trajectories) == 7
    assert (made["counts"]["corrections"], len(made["left"])) == (4, 3)


def test_what_waits_is_worth_a_night_until_one_with_it_was_rejected(ledger: Ledger, tmp_path: Path) -> None:
    first, _ = night(ledger, tmp_path)
    task = samples.task("What comes after 4?")
    ledger.add_run(task, samples.trajectory(task).model_copy(update={"purpose": Purpose.EVAL}))
    ended(ledger, first)
    second, _ = night(ledger, tmp_path)
    assert nothing_new(second, load_snapshot(second)) is None
    ended(ledger, second, promote=False)
    with pytest.raises(NotEnoughExperienceError, match=r"no new run failed.*--since or --recipes"):
        night(ledger, tmp_path)


def test_what_a_night_of_named_recipes_left_out_is_not_lost_to_the_next_whole_one(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, _ = night(ledger, tmp_path)
    ended(ledger, first)
    named, made = night(ledger, tmp_path, most=1, recipes=["corrections"])
    assert len(made["left"]) == 5
    ended(ledger, named)
    whole, _ = night(ledger, tmp_path)
    assert len(load_snapshot(whole).trajectories) == 6
