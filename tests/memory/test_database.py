"""Opening, migrating and failing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, event, inspect, text

from memory import runs
from memory.database import Database
from memory.errors import ConfigError, LedgerError
from memory.ledger import Ledger
from memory.records import Outcome, OutcomeSource, Purpose
from memory.schema import metadata
from tests.memory import samples


def test_the_migrations_make_the_tables_of_the_schema(url: str):
    database = Database.open(url, 5.0)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_both_databases_number_rows_by_themselves_and_allow_one_champion(url: str):
    database = Database.open(url, 5.0)
    with database.reading() as connection:
        found = inspect(connection).get_indexes("generations")
    assert [(index["name"], bool(index["unique"])) for index in found] == [("uq_generations_champion", True)]
    database.close()


def test_opening_again_keeps_what_was_there(url: str):
    task = samples.task()
    first = Ledger.open(url)
    first.add_task(task)
    first.close()
    second = Ledger.open(url)
    assert second.get_task(task.id) == task
    second.close()


def test_a_database_of_a_newer_version_is_refused_untouched(url: str):
    database = Database.open(url, 5.0)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(LedgerError, match="another version of Nightschool") as caught:
        Ledger.open(url)
    assert "\n" not in str(caught.value)


def test_a_ledger_of_an_older_version_counts_its_runs_like_a_new_one(url: str):
    ledger = Ledger.open(url)
    task = samples.task("\u0000")
    ledger.add_task(task)
    judged = (None, Outcome(score=0.5, by=OutcomeSource.VERIFIER), Outcome(score=1.0, by=OutcomeSource.VERIFIER))
    for generation, outcome in enumerate(judged):
        # A text may end in what looks like half of an escape.
        run = samples.trajectory(task, "\ud83d \u0000 C:\\ud8").model_copy(
            update={"generation": generation, "outcome": outcome}
        )
        ledger.add_trajectory(run)
    with ledger.database.writing() as connection:
        before = connection.execute(text("SELECT generation, success FROM trajectories ORDER BY seq")).all()
        for statement in (
            "DROP INDEX ix_trajectories_purpose_seq_generation_success",
            "DROP INDEX ix_memory_item_uses_use_key",
            "CREATE INDEX ix_trajectories_purpose_seq ON trajectories (purpose, seq)",
            "ALTER TABLE trajectories DROP COLUMN generation",
            "ALTER TABLE trajectories DROP COLUMN success",
            "UPDATE alembic_version SET version_num = '0003'",
        ):
            connection.execute(text(statement))
    ledger.close()
    again = Ledger.open(url)
    with again.database.reading() as connection:
        after = connection.execute(text("SELECT generation, success FROM trajectories ORDER BY seq")).all()
    assert [tuple(row) for row in after] == [tuple(row) for row in before] == [(0, None), (1, False), (2, True)]
    assert runs.count(again.database, Purpose.SERVE) == runs.Counted(3, 1)
    again.close()


def test_sqlite_is_opened_for_safety(tmp_path: Path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db", 3.0)
    with database.reading() as connection:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]
    assert values == ["wal", 2, 1, 3000]
    database.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "no database URL"),
        ("mysql://host/db", "only sqlite and postgresql"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
    ],
)
def test_an_unusable_url_is_named(url: str, says: str):
    with pytest.raises(ConfigError, match=says):
        Ledger.open(url)


def test_a_file_that_is_no_ledger_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is not a database, and it is long enough to be read as one" * 20)
    with pytest.raises(LedgerError, match="not a database") as caught:
        Ledger.open(f"sqlite:///{path}")
    assert "\n" not in str(caught.value)


def test_a_password_is_not_shown():
    with pytest.raises(LedgerError) as caught:
        Ledger.open("postgresql://ada:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_locked_ledger_says_so(tmp_path: Path):
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(f"sqlite:///{path}", wait_s=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked by another writer") as caught:
        ledger.add_task(samples.task())
    assert "\n" not in str(caught.value)
    assert ledger.trajectories() == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    ledger.add_task(samples.task())
    ledger.close()


def test_a_writer_on_postgresql_waits_no_longer_than_told(postgres: str):
    holder = Database.open(f"{postgres}/postgres", 5.0)
    ledger = Ledger.open(f"{postgres}/postgres", wait_s=0.05)
    with (
        holder.writing(),
        pytest.raises(LedgerError, match="locked by another writer"),
    ):
        ledger.add_task(samples.task())
    ledger.close()
    holder.close()


def test_a_full_disk_says_so_and_leaves_nothing_half_written(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = Ledger.open(url)
    small = samples.task()
    ledger.add_task(small)

    def fill(connection: Any) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    event.listen(Engine, "begin", fill)
    try:
        big = samples.task("x" * 200_000)
        with pytest.raises(LedgerError, match="no room on its disk") as caught:
            ledger.add_task(big)
    finally:
        event.remove(Engine, "begin", fill)
    assert "\n" not in str(caught.value)
    assert ledger.tasks([small.id, big.id]) == {small.id: small}
    ledger.close()


def test_what_was_written_survives_a_killed_process(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    script = """
import os, signal, sys
from memory.ledger import Ledger
from tests.memory import samples
ledger = Ledger.open(sys.argv[1])
task = samples.task()
ledger.add_task(task)
print(task.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", script, url], cwd=root, capture_output=True, text=True, timeout=60)
    ledger = Ledger.open(url)
    assert ledger.get_task(child.stdout.strip()).reference == "5"
    ledger.close()


def test_foreign_keys_hold_under_the_ledger_too(tmp_path: Path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db", 5.0)
    row = "INSERT INTO feedback (id, trajectory_id, tenant, digest, body) VALUES ('a', 'none', 't', '', '{}')"
    with pytest.raises(LedgerError, match="FOREIGN KEY"), database.writing() as connection:
        connection.execute(text(row))
    database.close()


def test_two_threads_may_open_the_same_new_ledger(tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    url = f"sqlite:///{tmp_path}/ledger.db"
    with ThreadPoolExecutor(4) as pool:
        ledgers = list(pool.map(lambda _: Ledger.open(url), range(4)))
    for ledger in ledgers:
        ledger.close()
    with create_engine(url).connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "0004"
