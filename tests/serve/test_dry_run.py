"""A dry run says what the night then does, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import select

from memory.errors import ConfigError
from memory.records import Trust
from memory.schema import metadata
from serve.client import Client
from serve.days import correct_value
from serve.dry_run import Cost, Estimate, PracticeForetold, TeacherForetold, print_estimate
from serve.settings import Settings
from serve.wiring import Services
from tests.serve.fakes import running
from tests.serve.test_loop import day, live, pupil, settings, sleep_through

__all__ = ["settings"]

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
