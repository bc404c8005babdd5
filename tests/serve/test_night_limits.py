"""What a person may narrow a night to: the experience since a moment, and a budget."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from memory.errors import ConfigError, NotFoundError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.records import Purpose, StopReason, Task, Trajectory, now
from serve import promotion
from serve.api.fine_tuning import JobRequest
from serve.settings import NightConfig
from serve.since import moment
from serve.stages.budget import foretold, practice_limit, training_limits
from serve.stages.material import load_snapshot, snapshot
from serve.stages.night_run import NightRun, OverBudgetError
from serve.wiring import open_ledger
from tests.serve.fakes import settings_in


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    settings = settings_in(tmp_path)
    opened = open_ledger(settings)
    promotion.ensure_base(opened, settings.model)
    yield opened
    opened.close()


def night_in(ledger: Ledger, folder: Path, said: list[str], night: Night | None = None, **config: Any) -> NightRun:
    """A night's run with nothing behind it but the ledger; what it says goes into `said`."""
    settings = settings_in(folder, night=NightConfig(**config))
    night = night or Night()
    if night.id not in {known.id for known in ledger.nights()}:
        ledger.add_night(night)
    services: Any = SimpleNamespace(settings=settings, ledger=ledger)

    def done(name: str) -> dict[str, Any]:
        found = ledger.stage(night.id, name)
        assert found is not None
        return found.output

    return NightRun(services, night, lambda _stage, message, /, **_data: said.append(message), done)


def ran(ledger: Ledger, question: str, days_ago: float) -> Trajectory:
    task = Task(messages=[{"role": "user", "content": question}], reference="2")
    run = Trajectory(
        task_id=task.id, generation=0, model="base", messages=task.messages, stop_reason=StopReason.ANSWER, answer="2",
        purpose=Purpose.SERVE, started_at=now() - timedelta(days=days_ago), seconds=1.0,
    )  # fmt: skip
    ledger.add_task(task)
    ledger.add_trajectory(run)
    return run


def test_a_moment_is_said_as_a_span_a_date_a_generation_or_a_night(ledger: Ledger) -> None:
    assert abs(moment("24h", ledger) - (now() - timedelta(hours=24))) < timedelta(seconds=5)
    assert moment("2026-01-02T03:04:05+00:00", ledger).isoformat() == "2026-01-02T03:04:05+00:00"
    assert moment("2026-01-02", ledger).utcoffset() == timedelta(0)
    night = Night()
    ledger.add_night(night)
    assert moment(night.id, ledger) == night.created_at
    drawn = ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output={}, seconds=1.0))
    made = Generation(number=1, parent=0, base_model="m", night_id=night.id, status=GenerationStatus.CANDIDATE)
    ledger.add_generation(made)
    assert moment("gen-1", ledger) == moment(night.id, ledger) == drawn.at
    assert moment("gen-0", ledger) == ledger.generation(0).created_at


@pytest.mark.parametrize("said", ["yesterday", "-3d", "0h", "2026-13-01", "9999-01-01", "gen-x", "99999999w"])
def test_what_is_no_moment_of_the_past_is_refused_by_name(ledger: Ledger, said: str) -> None:
    with pytest.raises(ConfigError, match="since"):
        moment(said, ledger)


@pytest.mark.parametrize("said", ["gen-7", "night_7"])
def test_an_unknown_generation_or_night_is_not_found(ledger: Ledger, said: str) -> None:
    with pytest.raises(NotFoundError):
        moment(said, ledger)


def test_a_night_since_a_moment_learns_from_nothing_before_it(ledger: Ledger, tmp_path: Path) -> None:
    ran(ledger, "What is 1 + 1, long ago?", 9)
    recent = ran(ledger, "What is 4 - 2, of late?", 1)
    said: list[str] = []
    run = night_in(ledger, tmp_path, said, Night(options={"since": moment("7d", ledger).isoformat()}))
    drawn = snapshot(run)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="snapshot", output=drawn, seconds=0.0))
    assert drawn["runs"] == 1
    assert [t.id for t in load_snapshot(run).trajectories] == [recent.id]
    assert said[0].startswith("1 runs since 20")


def test_an_uploaded_file_has_no_since() -> None:
    with pytest.raises(ValidationError, match="since"):
        JobRequest(training_file="file-1", since="7d")


def test_a_night_without_a_budget_has_no_limits(ledger: Ledger, tmp_path: Path) -> None:
    said: list[str] = []
    assert training_limits(night_in(ledger, tmp_path, said)) == {}
    assert said == []


def slept(ledger: Ledger, *, exam: float = 30.0, **trained: Any) -> None:
    """A night that trained 1000 tokens in 20 s and evaluated for 30 s."""
    night = Night()
    ledger.add_night(night)
    for stage, seconds in (("dataset", 5.0), ("train", 20.0), ("evaluate", exam)):
        output = {"tokens": 1000, "seconds": 20.0, **trained} if stage == "train" else {}
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=seconds))
    ledger.end_night(night.id, NightStatus.REJECTED, [])


def test_time_for_evaluation_is_kept_and_the_rest_is_tokens_at_the_last_pace(ledger: Ledger, tmp_path: Path) -> None:
    slept(ledger)
    said: list[str] = []
    run = night_in(ledger, tmp_path, said, max_seconds=50.0)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="dataset", output={}, seconds=8.0))
    assert training_limits(run) == {"max_tokens": 600, "max_seconds": 12.0}
    assert "600 tokens and 12 seconds" in said[0]


def test_the_first_night_keeps_half_of_its_time_for_an_exam_that_nobody_has_timed(
    ledger: Ledger, tmp_path: Path
) -> None:
    run = night_in(ledger, tmp_path, [], max_seconds=50.0)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="dataset", output={}, seconds=10.0))
    assert training_limits(run) == {"max_seconds": 20.0}


def test_a_night_that_was_killed_keeps_the_budget_it_was_given(ledger: Ledger, tmp_path: Path) -> None:
    slept(ledger)
    night, said = Night(), list[str]()
    first = training_limits(night_in(ledger, tmp_path, said, night, max_seconds=50.0, max_tokens=500))
    # Meanwhile the settings have changed: other numbers would throw the trainer's checkpoints away.
    again = night_in(ledger, tmp_path, said, night, max_seconds=10.0)
    assert training_limits(again) == first == {"max_tokens": 500, "max_seconds": 20.0}
    assert len(said) == 1


def test_a_night_that_began_to_train_without_a_budget_goes_on_without_one(ledger: Ledger, tmp_path: Path) -> None:
    night = Night()
    assert training_limits(night_in(ledger, tmp_path, [], night)) == {}
    assert training_limits(night_in(ledger, tmp_path, [], night, max_tokens=10)) == {}


def test_the_tighter_budget_holds(ledger: Ledger, tmp_path: Path) -> None:
    slept(ledger)
    run = night_in(ledger, tmp_path, [], max_seconds=50.0, max_tokens=100)
    assert training_limits(run)["max_tokens"] == 100


def test_a_night_whose_time_is_spent_before_training_says_so(ledger: Ledger, tmp_path: Path) -> None:
    slept(ledger)
    with pytest.raises(OverBudgetError, match=r"night\.max_seconds is 25.*takes 30 s.*raised"):
        training_limits(night_in(ledger, tmp_path, [], max_seconds=25.0))


def test_one_exam_on_a_busy_machine_does_not_end_all_training(ledger: Ledger, tmp_path: Path) -> None:
    for exam in (30.0, 28.0, 4000.0):
        slept(ledger, exam=exam)
    assert training_limits(night_in(ledger, tmp_path, [], max_seconds=50.0))["max_seconds"] == 20.0


@pytest.mark.parametrize(
    ("max_seconds", "limit"), [(None, None), (100.0, 42.0), (58.0, 10.0), (38.0, 0.0), (20.0, 0.0)]
)
def test_practice_gets_what_exam_and_training_leave_and_half_of_what_the_exam_leaves_at_least(
    ledger: Ledger, tmp_path: Path, max_seconds: float | None, limit: float | None
) -> None:
    slept(ledger)
    run = night_in(ledger, tmp_path, [], max_seconds=max_seconds)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="principles", output={}, seconds=8.0))
    assert practice_limit(run) == limit


def test_the_first_night_keeps_half_for_the_exam_and_shares_the_rest_between_practice_and_training(
    ledger: Ledger, tmp_path: Path
) -> None:
    run = night_in(ledger, tmp_path, [], max_seconds=50.0)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="snapshot", output={}, seconds=10.0))
    assert practice_limit(run) == 10.0
    ledger.record_stage(StageRun(night_id=run.night.id, stage="practice", output={}, seconds=10.0))
    assert training_limits(run) == {"max_seconds": 10.0}


def test_a_night_that_was_cut_does_not_shrink_what_the_next_one_is_taken_to_need(
    ledger: Ledger, tmp_path: Path
) -> None:
    slept(ledger, planned_tokens=2000)
    # Uncut it would have trained for 40 s: of 60 s that the exam leaves practice has half and not 40.
    assert practice_limit(night_in(ledger, tmp_path, [], max_seconds=90.0)) == 30.0


def test_a_dry_run_foretells_what_the_budget_cuts() -> None:
    def told(config: NightConfig, train: float | None, night: float | None, practice: float = 0.0) -> list[str]:
        said, trains = foretold(config, 1000, train, night, practice)
        assert trains is not any("skip itself" in sentence for sentence in said)
        return said

    assert told(NightConfig(), 20.0, 50.0) == []
    assert told(NightConfig(max_tokens=2000, max_seconds=60), 20.0, 50.0) == []
    assert "25%" in told(NightConfig(max_tokens=250), None, None)[0]
    assert "50%" in told(NightConfig(max_seconds=40), 20.0, 50.0)[0]
    assert "skip itself" in told(NightConfig(max_seconds=25), 20.0, 50.0)[0]
    assert told(NightConfig(max_seconds=60), 20.0, 60.0, 10.0) == []
    assert told(NightConfig(max_seconds=60), 20.0, 90.0, 40.0) == [
        "night.max_seconds shortens practice to about 38% of its tries",
        "night.max_seconds shortens training to about 75% of its steps",
    ]
    assert "not known before the first night" in told(NightConfig(max_seconds=60), None, None)[0]
