"""What is forgotten is in no row and in no file, others' data stays, and the generations that learned are named."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from memory import files, forget, shelf, uses
from memory.embed import Embedder
from memory.errors import ConflictError
from memory.forget import all_forgotten, must_start_from_base
from memory.index import Index, rebuild, sync
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus
from memory.records import (
    RECALLED,
    Example,
    ExampleKind,
    Feedback,
    FeedbackKind,
    MemoryKind,
    MemoryStatus,
    Recalled,
    Task,
    Trajectory,
)
from memory.scrub import Needles
from tests.memory import samples

SECRET = "my badger is called Ünderwood"
ANSWER = "Ünderwood the badger weighs eleven kilograms."


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, home: Path) -> Iterator[Ledger]:
    postgres = request.param == "postgresql"
    opened = Ledger.open(
        request.getfixturevalue("postgres_database") if postgres else f"sqlite:///{home}/ledger.sqlite"
    )
    yield opened
    opened.close()


def asked_by(user: str, question: str, tenant: str = "acme") -> Task:
    return samples.task(question, tenant).model_copy(update={"user": user})


def ran(ledger: Ledger, task: Task, answer: str) -> Trajectory:
    run = samples.trajectory(task, answer)
    ledger.add_run(task, run)
    return run


def live(ledger: Ledger, home: Path) -> dict[str, Trajectory]:
    """Ann and Bob work in one tenant: Ann's run is remembered, shown to Bob, and both teach a night."""
    ann, bob = asked_by("ann", f"How heavy is {SECRET}?"), asked_by("bob", "How heavy is my cow?")
    hers = ran(ledger, ann, ANSWER)
    # Imported items keep the ids they came with.
    remembered = samples.past_run(ann, ANSWER).model_copy(update={"id": 'run_é"1', "sources": [hers.id]})
    ledger.add_past_run(remembered)
    learned = samples.principle(f"Ask whether {SECRET}.", "acme", [hers.id]).model_copy(update={"id": "pri_é"})
    ledger.add_principle(learned)
    shown = [{**m, "name": RECALLED} for m in remembered.messages]
    system = {"role": "system", "content": f"Rules.\n<experience>\n- {learned.text}\n</experience>"}
    number = {"similarity": 1.0, "score": 0.5, "recency": 1.0, "rank": 1.0, "tokens": 9, "why": "near"}
    his = samples.trajectory(bob, "A cow weighs as much as it does, about 700 kg.")
    recalled = [Recalled(id=i, kind=MemoryKind.RUN, **number) for i in (remembered.id, learned.id)]
    his = his.model_copy(update={"messages": [system, *shown, *his.messages], "recalled": recalled})
    ledger.add_run(bob, his)
    with ledger.database.writing() as connection:
        uses.count(connection, [uses.Use(remembered.id, his.id, True)], tenant="acme")
    word = Feedback(
        trajectory_id=his.id, tenant="acme", kind=FeedbackKind.COMMENT, value=f"{SECRET} is heavier", author="ann"
    )
    ledger.add_feedback(word)

    night = Night()
    ledger.add_night(night)
    example = Example(
        recipe="successes", kind=ExampleKind.SFT, tenant="acme", task_id=bob.id, messages=his.messages, sources=[his.id]
    )
    plain = example.model_copy(update={"id": "ex_plain", "messages": bob.messages})
    ledger.set_examples(night.id, [example, plain])
    ledger.end_night(night.id, NightStatus.PROMOTED, ["better"])
    for number_, parent in ((0, None), (1, 0), (2, 1), (3, 0)):
        made = samples.generation(number_)
        night_id = night.id if number_ == 1 else None
        ledger.add_generation(made.model_copy(update={"parent": parent, "night_id": night_id}))

    dataset = home / "nights" / night.id / "dataset"
    dataset.mkdir(parents=True)
    (dataset / "sft.jsonl").write_text(json.dumps(example.model_dump(mode="json")) + "\n")
    (dataset / "manifest.json").write_text("{}")
    (home / "nights" / night.id / "report.html").write_text(f"<p>{ann.question}</p>", encoding="utf-8")
    (home / "server.log").write_text(f"one\nasked: {ann.question}\ntwo\n", encoding="utf-8")
    with sqlite3.connect(home / "checkpoints.sqlite") as saved:
        saved.execute("CREATE TABLE checkpoints (thread_id TEXT, checkpoint BLOB)")
        saved.execute("INSERT INTO checkpoints VALUES ('traj_dead', ?)", (f"so {ann.question}".encode(),))
        saved.execute("INSERT INTO checkpoints VALUES ('traj_alive', ?)", (b"about a cow",))
    saved.close()
    line = json.dumps({"body": {"user": "ann", "messages": ann.messages}})
    files.store(
        ledger.database,
        home / "files",
        [line.encode()],
        tenant="acme",
        purpose=files.FilePurpose.BATCH,
        filename="in.jsonl",
    )
    return {"ann": hers, "bob": his}


def tables_of(ledger: Ledger) -> Path | None:
    """The folder of a PostgreSQL database's tables, written out as they are now."""
    if ledger.database.engine.dialect.name == "sqlite":
        return None
    with ledger.database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CHECKPOINT"))
        folder = Path(connection.execute(text("SHOW data_directory")).scalar_one())
        return (
            folder
            / "base"
            / str(
                connection.execute(text("SELECT oid FROM pg_database WHERE datname = current_database()")).scalar_one()
            )
        )


def files_with(home: Path, *texts: str) -> list[str]:
    spelled = {form.encode() for t in texts for form in (t, json.dumps(t)[1:-1])}
    everything = [path for path in home.rglob("*") if path.is_file()]
    return [str(path.relative_to(home)) for path in everything if any(s in path.read_bytes() for s in spelled)]


def test_a_users_words_are_in_no_file_afterwards(ledger: Ledger, home: Path, embedder: Embedder):
    runs = live(ledger, home)
    index = Index.open(home / "index", embedder)
    sync(ledger, index)
    broken = home / "index.broken-20260101T000000-abcdef"
    broken.mkdir()
    [hers] = [item.id for item in ledger.past_runs()]
    (broken / "chroma.sqlite3").write_text(hers)
    if (tables := tables_of(ledger)) is not None:
        with ledger.database.writing() as connection:
            connection.execute(text("ANALYZE"))  # as PostgreSQL does by itself: it keeps samples of what columns hold
        assert files_with(tables_of(ledger) or tables, SECRET)
    assert len(files_with(home, SECRET, ANSWER)) >= 5
    assert len(files_with(home / "index", hers)) == 1
    told = forget.forget(ledger.database, home, tenant="acme", user="ann", by="operator")
    rebuild(ledger, index)
    assert index.count() == ledger.count_active() == 0
    assert files_with(home, SECRET, "Ünderwood", runs["ann"].id, hers) == []
    if (tables := tables_of(ledger)) is not None:
        assert files_with(tables, SECRET, "Ünderwood") == []
    index.close()
    assert not broken.exists()
    assert (home / "server.log").read_text() == "one\ntwo\n"
    assert [
        row for row in sqlite3.connect(home / "checkpoints.sqlite").execute("SELECT thread_id FROM checkpoints")
    ] == [("traj_alive",)]
    assert told.counts["trajectories"] == told.counts["feedback"] == told.counts["night_examples"] == 1
    assert (told.counts["memory_items"], told.counts["cleared"], told.counts["files"]) == (2, 1, 1)


def test_postgresql_samples_no_words_for_its_planner(postgres_database: str):
    ledger = Ledger.open(postgres_database)
    sampled = """
        SELECT relname, attname FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
        WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace AND attnum > 0
        AND atttypid = 'text'::regtype AND attstattarget IS DISTINCT FROM 0 AND relname <> 'alembic_version'
    """
    with ledger.database.reading() as connection:
        assert connection.execute(text(sampled)).all() == []
    ledger.close()


def test_others_in_the_tenant_keep_what_is_theirs(ledger: Ledger, home: Path):
    runs = live(ledger, home)
    [night] = ledger.nights()
    forget.forget(ledger.database, home, tenant="acme", user="ann", by="operator")
    [kept] = ledger.trajectories(tenant="acme")
    assert (kept.id, kept.answer, kept.recalled) == (runs["bob"].id, runs["bob"].answer, [])
    assert kept.own_messages == runs["bob"].own_messages
    assert [example.id for example in ledger.examples(night.id)] == ["ex_plain"]


def test_the_generations_that_learned_are_named_and_not_trained_on(ledger: Ledger, home: Path):
    live(ledger, home)
    [night] = ledger.nights()
    assert not must_start_from_base(ledger.database, ledger.generation(2))
    told = forget.forget(ledger.database, home, tenant="acme", user="ann", by="operator")
    assert (told.nights, told.generations) == ([night.id], [1, 2])
    assert [must_start_from_base(ledger.database, ledger.generation(n)) for n in range(4)] == [False, True, True, False]
    assert all_forgotten(ledger.database, tenant="acme") == [told]
    assert all_forgotten(ledger.database, tenant="other") == []


def test_a_tenant_is_forgotten_whole_and_another_one_not_at_all(ledger: Ledger, home: Path):
    live(ledger, home)
    other = ran(ledger, asked_by("ann", "How heavy is our llama at the zoo?", "zoo"), "A llama weighs 150 kg.")
    rule = samples.principle("Weigh a llama twice.", "zoo", [other.id])
    ledger.add_principle(rule)
    forget.forget(ledger.database, home, tenant="acme", by="operator")
    assert files_with(home, SECRET, "Ünderwood", "my cow") == []
    assert (ledger.trajectories(), ledger.principles()) == ([other], [rule])
    assert files.page(ledger.database, tenant="acme") == ([], False)


def test_one_who_is_unknown_leaves_everything_as_it_is(ledger: Ledger, home: Path):
    runs = live(ledger, home)
    told = forget.forget(ledger.database, home, tenant="acme", user="eve", by="operator")
    assert (told.counts, told.files, told.generations) == ({}, [], [])
    assert {t.id for t in ledger.trajectories()} == {run.id for run in runs.values()}
    assert files_with(home, SECRET)


def test_nothing_is_forgotten_under_a_running_night(ledger: Ledger, home: Path):
    live(ledger, home)
    ledger.add_night(Night())
    with pytest.raises(ConflictError, match="is running"):
        forget.forget(ledger.database, home, tenant="acme", by="operator")
    assert ledger.principles()


def test_a_lesson_merged_into_a_forgotten_one_stands_for_itself_again(ledger: Ledger, home: Path):
    runs = live(ledger, home)
    own = samples.principle("Put the animal on a scale.", "acme", [runs["bob"].id])
    ledger.add_principle(own)
    [hers] = [p for p in ledger.principles() if p.id != own.id]
    shelf.merge(ledger.database, hers.id, own.id, "the same", tenant="acme")
    forget.forget(ledger.database, home, tenant="acme", user="ann", by="operator")
    [kept] = ledger.principles()
    assert (kept.id, kept.status, kept.merged_into) == (own.id, MemoryStatus.ACTIVE, None)


def test_a_forgetting_that_died_before_the_pages_were_wiped_is_finished_later(
    ledger: Ledger, home: Path, monkeypatch: pytest.MonkeyPatch
):
    live(ledger, home)
    with monkeypatch.context() as patched:
        patched.setattr(type(ledger.database), "compact", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forget.forget(ledger.database, home, tenant="acme", by="operator")
    assert ledger.trajectories() == []
    assert (forget.finish(ledger.database), forget.finish(ledger.database)) == (1, 0)
    assert files_with(home, SECRET) == []


def test_many_needles_are_found_as_each_by_itself_would_be():
    texts = [f"needle number {n} in the hay" for n in range(500)] + ["in the hay or out of it, hay"]
    hay = b"hay " * 1000 + texts[7].encode() + b" or out of it, hay" + texts[499].encode() + b"x"
    assert set(Needles(["7 in"], texts).among(hay)) == {n.encode() for n in ["7 in", *texts] if n.encode() in hay}
    assert Needles((), texts).among(b"short") == []
    assert not Needles((), ())


def test_what_a_key_asked_is_found_under_the_name_by_which_it_signs(ledger: Ledger, home: Path):
    alone, behind, other = (samples.task(f"{who}: how heavy is {SECRET}?", "acme") for who in ("a", "b", "c"))
    alone = alone.model_copy(update={"caller": "key:shop"})
    behind = behind.model_copy(update={"caller": "key:shop", "user": "ann"})
    other = other.model_copy(update={"caller": "key:shopper"})
    for task in (alone, behind, other):
        ran(ledger, task, ANSWER)
    assert forget.forget(ledger.database, home, tenant="acme", user="key:shop", by="op").counts["tasks"] == 1
    assert set(ledger.tasks([alone.id, behind.id, other.id])) == {behind.id, other.id}
    assert forget.forget(ledger.database, home, tenant="acme", user="ann", by="op").counts["tasks"] == 1
    assert set(ledger.tasks([behind.id, other.id])) == {other.id}
