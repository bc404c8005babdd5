"""A dry run says what the night then does, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import select

from distill.train.config import TrainConfig
from memory.errors import ConfigError
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus, StageRun
from memory.recall import NoMemory
from memory.records import Trust
from memory.schema import metadata
from serve.client import Client
from serve.days import correct_value
from serve.dry_run import Cost, Estimate, PracticeForetold, TeacherForetold, estimate, print_estimate
from serve.settings import NightConfig, Settings
from serve.wiring import Services
from tests.serve.fakes import running, settings_in
from tests.serve.test_loop import day, live, pupil, settings, sleep_through
from tests.serve.test_pairs_untrained import ledger

__all__ = ["ledger", "settings"]

ESTIMATE = "/v1/fine_tuning/jobs/estimate"


def everything(services: Services, folder: Path) -> tuple[object, list[Path]]:
    """All rows of the ledger, and the files of the data folder that a night makes."""
    with services.ledger.database.reading() as connection:
        rows = {table.name: connection.execute(select(table)).all() for table in metadata.sorted_tables}
    return rows, sorted(path for part in ("nights", "adapters") for path in (folder / part).rglob("*"))


@pytest.fixture(autouse=True)
def nothing_left_over(settings: Settings) -> None:
    assert not settings.night_dir("x").parent.exists()


def test_a_dry_run_says_what_the_night_then_does_and_writes_nothing(settings: Settings) -> None:
    with running(settings, pupil) as (url, services):
        client = Client(url)
        empty = client.post(ESTIMATE, {})
        assert (empty["would_skip"], empty["runs"], empty["examples"]["rehearsal"]) == (True, 0, 32)
        assert "only 0 examples" in empty["reasons"][0]

        replies = live(client, 1)
        for number, task in enumerate(day(1)):
            word = {"response_id": replies[number]["id"], "kind": "correction", "value": correct_value(task)}
            client.post("/v1/feedback", {**word, "author": "u"})
        before = everything(services, settings.data_dir)
        said = client.post(ESTIMATE, {})
        assert everything(services, settings.data_dir) == before
        assert all(f.trust is Trust.QUARANTINED for f in services.ledger.feedback())
        assert said["would_skip"] is False
        assert (said["runs"], said["feedback"]) == (len(day(1)), {"trusted": len(day(1))})
        assert said["cost"]["measured"] is False
        assert said["cost"]["train_seconds"] is None

        job = sleep_through(client)
        made = services.ledger.stage(job["id"], "dataset")
        assert made is not None
        assert said["examples"] == made.output["counts"]
        assert said["dropped"] == made.output["dropped"]
        assert said["practice"] is said["teacher"] is None
        again = client.post(ESTIMATE, {})
        assert (again["would_skip"], again["cost"]["measured"]) == (True, True)
        with pytest.raises(ConfigError, match="no-such-recipe"):
            client.post(ESTIMATE, {"recipes": ["no-such-recipe"]})
        with pytest.raises(ConfigError, match="seed"):
            client.post(ESTIMATE, {"seed": 1})
        with pytest.raises(ConfigError, match="training_file"):
            client.post(ESTIMATE, {"training_file": "file-1"})


def ended(ledger: Ledger, stages: dict[str, tuple[dict[str, Any], float]]) -> None:
    """A night with these stages: output and seconds by name."""
    night = Night()
    ledger.add_night(night)
    for stage, (output, seconds) in stages.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=seconds))
    ledger.end_night(night.id, NightStatus.REJECTED, [])


def costs(ledger: Ledger, folder: Path, epochs: int = 2, **config: Any) -> Estimate:
    """What a dry run says with four rows to learn from."""
    given = {"min_examples": 4, "rehearsal": 0, "controls": [], "recipes": ["successes"], **config}
    settings = settings_in(folder, night=NightConfig(**given), train=TrainConfig(epochs=epochs, dpo_epochs=0))
    services: Any = SimpleNamespace(settings=settings, ledger=ledger, memory=NoMemory())
    return estimate(services, {})


def test_before_the_first_night_all_epochs_and_the_rehearsed_answers_are_counted(
    ledger: Ledger, tmp_path: Path
) -> None:
    once, twice = (costs(ledger, tmp_path, epochs).cost for epochs in (1, 2))
    assert twice.tokens == pytest.approx(2 * once.tokens, abs=1)
    general = costs(ledger, tmp_path, rehearsal=32).cost
    assert general.tokens > twice.tokens + 2 * 32 * 48
    limit = (once.tokens + twice.tokens) // 2
    assert "night.max_tokens shortens training to about 75%" in costs(ledger, tmp_path, max_tokens=limit).reasons[-1]
    assert "not known before the first night" in costs(ledger, tmp_path, max_seconds=60).reasons[-1]


def test_a_night_that_its_budget_cut_is_the_measure_as_it_would_have_been_uncut(ledger: Ledger, tmp_path: Path) -> None:
    rows = costs(ledger, tmp_path).cost.rows
    trained = {"sft_rows": rows, "dpo_pairs": 0, "epochs": 2, "dpo_epochs": 0, "tokens": 1000, "seconds": 10.0}
    cut = {**trained, "planned_tokens": 4000}
    tried = {"tries": 10}
    ended(ledger, {"practice": (tried, 20.0), "dataset": ({}, 5.0), "train": (cut, 11.0), "evaluate": ({}, 30.0)})
    # Died before its exam: it has not shown what a night takes.
    ended(ledger, {"dataset": ({}, 1.0), "train": (trained, 1.0)})
    cost = costs(ledger, tmp_path).cost
    assert (cost.measured, cost.tokens, cost.train_seconds, cost.night_seconds) == (True, 4000, 40.0, 75.0)
    assert cost.practice_seconds is None
    assert costs(ledger, tmp_path, epochs=3).cost.tokens == 6000
    assert "25%" in costs(ledger, tmp_path, max_tokens=1000).reasons[-1]
    practising = costs(ledger, tmp_path, practice=2, practice_samples=3)
    assert practising.practice is not None
    took = 2.0 * practising.practice.tries
    assert took > 0
    assert (practising.cost.practice_seconds, practising.cost.night_seconds) == (took, 75.0 + took)


def test_a_night_of_an_older_version_is_a_measure_too(ledger: Ledger, tmp_path: Path) -> None:
    rows = costs(ledger, tmp_path).cost.rows
    trained = {"sft_rows": 2 * rows, "dpo_pairs": 0, "tokens": 1000, "seconds": 10.0}
    ended(ledger, {"train": (trained, 11.0), "evaluate": ({}, 30.0)})
    assert (costs(ledger, tmp_path).cost.tokens, costs(ledger, tmp_path).cost.night_seconds) == (500, 35.0)


def test_the_estimate_reads_on_one_screen() -> None:
    cost = Cost(rows=52, tokens=9000, measured=True, train_seconds=61.0, night_seconds=90.0)
    found = Estimate(
        would_skip=False,
        reasons=["20 examples to learn from, 8 needed"],
        starts_from="champion",
        runs=24,
        feedback={"trusted": 20, "quarantined": 4},
        examples={"corrections": 20, "rehearsal": 32},
        dropped={"held out": 3},
        practice=PracticeForetold(
            budget=8, tasks=10, hinted=2, complained=1, tries=40, workloads={"sums": 4, "gcd": 3}
        ),
        teacher=TeacherForetold(runs=5, right=4, examples=3),
        cost=cost,
    )
    console = Console(width=120, record=True)
    print_estimate(found, console)
    print_estimate(found.model_copy(update={"would_skip": True}), console)
    shown = console.export_text()
    for told in (
        "would train 52 rows from the champion",
        "20 trusted, 4 quarantined",
        "left out: held out",
        "90 s in all",
        "10 tasks (4 of sums, 3 of gcd, 2 for a user's hint, 1 for a user's complaint; budget 8), 40 tries",
        "5 runs, 4 of them right, 3 examples",
    ):
        assert told in shown
    assert "would skip itself" in shown
    print_estimate(found.model_copy(update={"cost": cost.model_copy(update={"practice_seconds": 25.0})}), console)
    first = {"measured": False, "train_seconds": None, "night_seconds": None}
    print_estimate(found.model_copy(update={"cost": cost.model_copy(update=first)}), console)
    later = console.export_text()
    assert "90 s in all, and practice, which was never timed" in shown
    assert "90 s in all, 25 s of them practice" in later
    assert "not known before the first night" in later
