"""After forgetting, the next night starts from the base model with all that is left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from distill.train.config import TrainJob
from memory import forget
from memory.night_records import GenerationStatus, Night, NightStatus, StageRun
from memory.records import Example, ExampleKind
from serve.stages import snapshot, train
from serve.stages.night_run import NightRun, Output
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import fake_training, services_in, settings_in


def a_champion_that_learned_from(services: Services, user: str) -> None:
    """Generation 1, trained in a night on one example of the user's."""
    ledger = services.ledger
    task = samples.task("How heavy is my badger?").model_copy(update={"user": user})
    run = samples.trajectory(task)
    ledger.add_run(task, run)
    night = Night()
    ledger.add_night(night)
    example = Example(
        recipe="successes", kind=ExampleKind.SFT, task_id=task.id, messages=task.messages, sources=[run.id]
    )
    ledger.set_examples(night.id, [example])
    since = {"upto": ledger.watermark()}
    ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output=since, seconds=0.0))
    made = samples.generation(1).model_copy(update={"parent": 0, "night_id": night.id, "adapter_path": "one"})
    ledger.add_generation(made)
    ledger.set_candidate(night.id, 1)
    ledger.promote(1, "better", "night")
    ledger.end_night(night.id, NightStatus.PROMOTED, ["better"])


@pytest.mark.parametrize(("user", "start", "parent"), [("ann", "base", 0), ("eve", "champion", 1)])
def test_a_night_does_not_build_on_weights_that_know_what_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, start: str, parent: int
):
    jobs: list[TrainJob] = []

    def training(job: TrainJob, *_: Any, **__: Any) -> Any:
        jobs.append(job)
        return fake_training(job)

    monkeypatch.setattr("serve.stages.training.launch.run", training)
    loop = asyncio.new_event_loop()
    with services_in(settings_in(tmp_path), lambda _: "No", loop) as services:
        ledger = services.ledger
        a_champion_that_learned_from(services, "ann")
        kept = samples.task("How heavy is my cow?")
        ledger.add_run(kept, samples.trajectory(kept))
        forget.forget(ledger.database, services.settings.data_dir, tenant="default", user=user, by="operator")
        night = Night()
        ledger.add_night(night)
        done: dict[str, Output] = {"dataset": {"folder": str(tmp_path)}}
        said: list[str] = []
        run = NightRun(services, night, lambda _s, text, **_: said.append(text), done.__getitem__)
        done["snapshot"] = snapshot(run)
        assert done["snapshot"]["train_from"] == start
        assert done["snapshot"]["runs"] == 1
        assert ("forgotten" in said[0]) == (start == "base")
        number = train(run)["generation"]
        assert (jobs[0].parent_adapter is None) == (start == "base")
        made = ledger.generation(number)
        assert (made.parent, made.status) == (parent, GenerationStatus.CANDIDATE)
        assert not forget.must_start_from_base(ledger.database, made)
    loop.close()
