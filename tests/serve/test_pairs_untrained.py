"""Preference pairs while `train.dpo_epochs` is 0: nothing trains on them, so nothing counts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.train.config import TrainConfig
from evals.suites import EvalTask, Suite, save_suite
from memory.errors import NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.recall import NoMemory
from memory.records import Example, ExampleKind, Outcome, OutcomeSource
from serve import promotion
from serve.dry_run import Estimate, estimate
from serve.settings import NightConfig
from serve.stages.dataset import make_dataset, replayed
from serve.stages.material import load_snapshot, snapshot
from serve.stages.night_run import NightRun
from serve.wiring import open_ledger
from tests.memory import samples
from tests.serve.fakes import settings_in
from tests.serve.test_night_limits import night_in


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Four questions, each failed once and solved once."""
    settings = settings_in(tmp_path)
    opened = open_ledger(settings)
    promotion.ensure_base(opened, settings.model)
    exam = Suite(name="held_out", role="held_out", tasks=[EvalTask(key="4", task=samples.task("Which comes after 4?"))])
    save_suite(exam, settings.suites_dir / "held_out.jsonl")
    for question in ("Name a river.", "Who wrote it?", "Which city is that?", "How far is the moon?"):
        task = samples.task(question)
        for answer, score in (("I would rather not.", 0.0), ("5", 1.0)):
            outcome = Outcome(score=score, by=OutcomeSource.VERIFIER)
            opened.add_run(task, samples.trajectory(task, answer).model_copy(update={"outcome": outcome}))
    yield opened
    opened.close()


def night(ledger: Ledger, folder: Path, recipes: list[str], dpo_epochs: int = 0, **config: Any) -> NightRun:
    run = night_in(ledger, folder, [], Night(options={"recipes": recipes}))
    given = {"min_examples": 4, "rehearsal": 0, "controls": [], **config}
    settings = settings_in(folder, night=NightConfig(**given), train=TrainConfig(dpo_epochs=dpo_epochs))
    services: Any = SimpleNamespace(settings=settings, ledger=ledger, memory=NoMemory())
    drawn = replace(run, services=services)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="snapshot", output=snapshot(drawn), seconds=0.0))
    return drawn


def foretold(run: NightRun) -> Estimate:
    return estimate(run.services, run.night.options)


def test_a_night_of_pairs_alone_skips_itself_and_the_dry_run_says_so(ledger: Ledger, tmp_path: Path) -> None:
    run = night(ledger, tmp_path, ["contrast"])
    why = "only 0 examples to learn from, 4 needed (4 preference pairs while train.dpo_epochs is 0)"
    with pytest.raises(NotEnoughExperienceError) as skipped:
        make_dataset(run)
    assert str(skipped.value).startswith(why)
    assert ledger.examples(run.night.id) == []
    said = foretold(run)
    assert (said.would_skip, said.reasons[0]) == (True, why)
    ledger.end_night(run.night.id, NightStatus.SKIPPED, [why])
    trained = foretold(night(ledger, tmp_path, ["contrast"], dpo_epochs=1))
    assert (trained.would_skip, trained.examples["contrast"]) == (False, 4)


@pytest.mark.parametrize(("dpo_epochs", "replay"), [(0, 4), (1, 8)])
def test_earlier_examples_are_replayed_beside_what_is_trained_on(
    ledger: Ledger, tmp_path: Path, dpo_epochs: int, replay: int
) -> None:
    lesson(ledger, *(ExampleKind.SFT for _ in range(20)))
    run = night(ledger, tmp_path, ["successes", "contrast"], dpo_epochs, replay_share=1.0)
    assert foretold(run).examples["replay"] == replay


@pytest.mark.parametrize("dpo_epochs", [0, 1])
def test_from_the_base_model_uploaded_pairs_are_taught_again_only_where_pairs_are(
    ledger: Ledger, tmp_path: Path, dpo_epochs: int
) -> None:
    rows, pairs = lesson(ledger, ExampleKind.SFT, ExampleKind.DPO)
    run = night(ledger, tmp_path, ["successes"], dpo_epochs, train_from="base")
    assert replayed(run, load_snapshot(run), []) == [rows, pairs][: 1 + dpo_epochs]


def lesson(ledger: Ledger, *kinds: ExampleKind) -> list[Example]:
    """What a promoted night over an uploaded file taught."""
    night = Night(id="night_1", options={"training_file": "file-1"})
    ledger.add_night(night)
    made: dict[str, Any] = {"night_id": night.id, "parent": 0, "status": GenerationStatus.CANDIDATE}
    ledger.add_generation(Generation(number=1, base_model="test/model", **made))
    tasks = [samples.task(f"Lesson {n}") for n in range(len(kinds))]
    for task in tasks:
        ledger.add_task(task)
    taught = [
        Example(recipe="file", kind=kind, task_id=task.id, messages=task.messages)
        for kind, task in zip(kinds, tasks, strict=True)
    ]
    ledger.set_examples(night.id, taught)
    ledger.promote(1, why="better", by="night")
    ledger.end_night(night.id, NightStatus.PROMOTED, [], candidate=1, report_path=None)
    return taught
