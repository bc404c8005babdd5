"""The index follows the ledger, and whatever happens to its folder it can be made again."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory.embed import Embedder
from memory.errors import IndexUnavailableError
from memory.index import Index, drain, rebuild, sync
from memory.ledger import ItemText, Ledger
from memory.records import MemoryKind, MemoryStatus
from tests.memory import samples

RUN = MemoryKind.RUN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index" / "chroma"


@pytest.fixture
def index(folder: Path, embedder: Embedder) -> Iterator[Index]:
    opened = Index.open(folder, embedder)
    yield opened
    opened.close()


class Other:
    """The same embedder under another name: its vectors must not be trusted."""

    def __init__(self, inner: Embedder) -> None:
        self.name = "other"
        self.dimensions = inner.dimensions // 2
        self._inner = inner

    def embed(self, texts: list[str]) -> list[list[float]]:
        return [vector[: self.dimensions] for vector in self._inner.embed(texts)]


def test_what_is_added_to_the_ledger_is_found_after_a_drain(sqlite_ledger: Ledger, index: Index):
    cows = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    samples.remember(sqlite_ledger, "Sort these words by length.")
    drain(sqlite_ledger, index)
    (nearest, similarity), (_, lesser) = index.query(RUN, "default", "How many legs do 7 cows have?", 5)
    assert nearest == cows.id
    assert 1.0 >= similarity > lesser >= -1.0
    assert sqlite_ledger.outbox(10) == []
    assert drain(sqlite_ledger, index) == 0


def test_a_retired_item_leaves_the_index_and_may_come_back(sqlite_ledger: Ledger, index: Index):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    sync(sqlite_ledger, index)
    sqlite_ledger.set_memory_status(run.id, MemoryStatus.RETIRED, "it misled")
    assert drain(sqlite_ledger, index) == 1
    assert index.query(RUN, "default", run.question, 5) == []
    sqlite_ledger.set_memory_status(run.id, MemoryStatus.ACTIVE, "it did not")
    drain(sqlite_ledger, index)
    assert [found for found, _ in index.query(RUN, "default", run.question, 5)] == [run.id]


def test_whatever_is_in_a_collection_can_be_found(index: Index):
    numbers = random.Random(1)
    texts = {f"run_{n}": f"What is {numbers.randrange(9999)} + {numbers.randrange(9999)}?" for n in range(300)}
    ids = list(texts)
    index.switch(index.begin())
    for tenant in range(20):
        for start in range(0, len(ids), 50):
            index.upsert(RUN, f"tenant {tenant}", [(item, texts[item]) for item in ids[start : start + 50]])
            index.query(RUN, f"tenant {tenant}", texts[ids[0]], 1)  # Chroma adds what came since the last question
    lost = [
        (tenant, item)
        for tenant in range(20)
        for item in ids
        if item not in [found for found, _ in index.query(RUN, f"tenant {tenant}", texts[item], 3)]
    ]
    assert lost == []


def test_a_question_during_which_the_build_changes_is_answered_by_the_new_one(
    sqlite_ledger: Ledger, index: Index, folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    sync(sqlite_ledger, index)
    index.close()
    reopened = Index.open(folder, embedder)
    embed = embedder.embed

    def and_meanwhile(texts: list[str]) -> list[list[float]]:
        monkeypatch.undo()
        rebuild(sqlite_ledger, reopened)
        return embed(texts)

    monkeypatch.setattr(embedder, "embed", and_meanwhile)
    assert [found for found, _ in reopened.query(RUN, "default", run.question, 5)] == [run.id]
    reopened.close()


def test_changes_followed_twice_or_late_come_to_the_same(sqlite_ledger: Ledger, index: Index):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    sync(sqlite_ledger, index)
    index.upsert(RUN, "default", [(run.id, run.question)])
    index.delete(RUN, "default", ["run_never_in", run.id])
    index.delete(RUN, "nobody", [run.id])
    sqlite_ledger.set_memory_status(run.id, MemoryStatus.RETIRED, "one")
    sqlite_ledger.set_memory_status(run.id, MemoryStatus.ACTIVE, "two")
    assert drain(sqlite_ledger, index, batch=1) == 2
    assert index.count() == 1


def test_tenants_and_kinds_are_kept_apart(sqlite_ledger: Ledger, index: Index):
    question = "How many legs do 4 cows have?"
    mine, theirs = samples.remember(sqlite_ledger, question, "ada"), samples.remember(sqlite_ledger, question, "bob")
    sqlite_ledger.add_principle(samples.principle(question, "ada"))
    sync(sqlite_ledger, index)
    assert [found for found, _ in index.query(RUN, "ada", question, 9)] == [mine.id]
    assert [found for found, _ in index.query(RUN, "bob", question, 9)] == [theirs.id]
    assert index.query(RUN, "ada/../bob", question, 9) == []
    assert len(index.query(MemoryKind.PRINCIPLE, "ada", question, 9)) == 1


def test_blank_texts_are_no_items_of_the_index(sqlite_ledger: Ledger, index: Index):
    samples.remember(sqlite_ledger, "  \n")
    assert sync(sqlite_ledger, index) == 0
    assert index.query(RUN, "default", " ", 5) == []


def test_a_folder_has_one_owner(folder: Path, index: Index, embedder: Embedder):
    with pytest.raises(IndexUnavailableError, match="open already"):
        Index.open(folder, embedder)


def test_an_index_opened_again_holds_what_it_held(sqlite_ledger: Ledger, folder: Path, embedder: Embedder):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    first = Index.open(folder, embedder)
    assert first.needs_rebuild
    sync(sqlite_ledger, first)
    first.close()
    with pytest.raises(IndexUnavailableError):
        first.query(RUN, "default", run.question, 1)
    second = Index.open(folder, embedder)
    assert not second.needs_rebuild
    assert [found for found, _ in second.query(RUN, "default", run.question, 1)] == [run.id]
    second.close()


def test_another_embedder_asks_for_a_rebuild_and_gets_it(sqlite_ledger: Ledger, folder: Path, embedder: Embedder):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    first = Index.open(folder, embedder)
    sync(sqlite_ledger, first)
    first.close()
    second = Index.open(folder, Other(embedder))
    assert second.needs_rebuild
    with pytest.raises(IndexUnavailableError, match="rebuilt"):
        second.query(RUN, "default", run.question, 1)
    drain(sqlite_ledger, second)
    assert [found for found, _ in second.query(RUN, "default", run.question, 1)] == [run.id]
    second.close()


def test_an_index_that_lost_items_is_rebuilt_at_start(sqlite_ledger: Ledger, index: Index):
    runs = [samples.remember(sqlite_ledger, f"How many legs do {i} cows have?") for i in range(3)]
    sync(sqlite_ledger, index)
    index.delete(RUN, "default", [runs[1].id])
    assert sync(sqlite_ledger, index) == 3


def test_a_first_build_that_was_cut_short_is_asked_for_again(sqlite_ledger: Ledger, folder: Path, embedder: Embedder):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    first = Index.open(folder, embedder)
    first.upsert(RUN, "default", [(run.id, run.question)], first.begin())
    first.close()
    second = Index.open(folder, embedder)
    assert second.needs_rebuild
    assert rebuild(sqlite_ledger, second) == 1
    assert not second.needs_rebuild
    second.close()


def test_a_rebuild_that_was_cut_short_leaves_the_old_build_answering(
    sqlite_ledger: Ledger, folder: Path, embedder: Embedder
):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    first = Index.open(folder, embedder)
    sync(sqlite_ledger, first)
    first.upsert(RUN, "default", [("run_half", "half of it")], first.begin())
    assert [found for found, _ in first.query(RUN, "default", run.question, 9)] == [run.id]
    first.close()
    second = Index.open(folder, embedder)
    assert not second.needs_rebuild
    assert sync(sqlite_ledger, second) == 1
    assert [found for found, _ in second.query(RUN, "default", run.question, 9)] == [run.id]
    second.close()


def test_the_index_answers_by_its_former_embedder_until_it_is_rebuilt(
    sqlite_ledger: Ledger, folder: Path, embedder: Embedder
):
    run = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    first = Index.open(folder, embedder)
    sync(sqlite_ledger, first)
    first.close()
    asked: list[str] = []

    def load(name: str) -> Embedder:
        asked.append(name)
        return embedder

    second = Index.open(folder, Other(embedder), load)
    assert (asked, second.needs_rebuild, second.state) == (["wordllama"], True, "rebuilding")
    assert [found for found, _ in second.query(RUN, "default", run.question, 1)] == [run.id]
    assert rebuild(sqlite_ledger, second) == 1
    assert (second.needs_rebuild, second.state) == (False, "ready")
    assert [found for found, _ in second.query(RUN, "default", run.question, 1)] == [run.id]
    second.close()


def test_what_changes_during_a_rebuild_is_in_the_new_build(
    sqlite_ledger: Ledger, index: Index, monkeypatch: pytest.MonkeyPatch
):
    runs = [samples.remember(sqlite_ledger, f"How many legs do {n} cows have?") for n in range(3)]
    sync(sqlite_ledger, index)
    late: list[str] = []
    pages = sqlite_ledger.active_texts

    def meanwhile(after_seq: int, limit: int) -> list[ItemText]:
        page = pages(after_seq, limit)
        if not page and not late:
            late.append(samples.remember(sqlite_ledger, "How many legs do 9 hens have?").id)
            sqlite_ledger.set_memory_status(runs[0].id, MemoryStatus.RETIRED, "it misled")
            drain(sqlite_ledger, index)  # the old build follows, and acknowledges
        return page

    monkeypatch.setattr(sqlite_ledger, "active_texts", meanwhile)
    assert rebuild(sqlite_ledger, index) == 3
    found = {item for item, _ in index.query(RUN, "default", "legs", 9)}
    assert found == {runs[1].id, runs[2].id, late[0]}


def delete_all(folder: Path) -> None:
    shutil.rmtree(folder)


def cut(folder: Path, name: str) -> None:
    for path in folder.rglob(name):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(folder: Path, name: str) -> None:
    for path in folder.rglob(name):
        path.write_bytes(bytes(i * 37 % 251 for i in range(path.stat().st_size)))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    """A ledger and an index past the size at which Chroma writes its vector files."""
    home = tmp_path_factory.mktemp("filled")
    ledger = Ledger.open(f"sqlite:///{home}/ledger.db")
    for i in range(1100):
        ledger.add_principle(samples.principle(f"Rule {i}: cows have {i} legs in puzzle {i * 7}."))
    index = Index.open(home / "chroma", embedder)
    assert sync(ledger, index) == 1100
    index.close()
    ledger.close()
    return home


FILES = ["chroma.sqlite3", "data_level0.bin", "header.bin", "index_metadata.pickle", "length.bin", "link_lists.bin"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_index_may_be_torn_and_is_noticed_before_it_is_used(
    filled: Path, tmp_path: Path, embedder: Embedder, name: str
):
    # The two ways take turns over the files: each open costs a process.
    harm = cut if FILES.index(name) % 2 else overwrite
    folder = shutil.copytree(filled / "chroma", tmp_path / "chroma")
    assert list(folder.rglob(name)), f"Chroma writes no {name} any more: what does it write?"
    harm(folder, name)
    index = Index.open(folder, embedder)
    assert index.moved_aside is not None
    assert index.moved_aside.is_dir()
    assert (index.needs_rebuild, index.state) == (True, "rebuilding")
    index.close()


def test_all_files_of_the_index_are_known(filled: Path):
    assert {path.name for path in (filled / "chroma").rglob("*") if path.is_file()} == {*FILES, "ready.json"}


@pytest.mark.parametrize("harm", [lambda folder: shutil.rmtree(folder), lambda folder: cut(folder, "ready.json")])
def test_a_folder_that_is_gone_or_unnamed_is_made_again(
    filled: Path, tmp_path: Path, embedder: Embedder, harm: Callable[[Path], None]
):
    home = shutil.copytree(filled, tmp_path / "home")
    harm(home / "chroma")
    ledger = Ledger.open(f"sqlite:///{home}/ledger.db")
    index = Index.open(home / "chroma", embedder)
    assert (index.moved_aside, index.needs_rebuild) == (None, True)
    assert sync(ledger, index) == 1100
    text = ledger.principles()[500].text
    assert index.query(MemoryKind.PRINCIPLE, "default", text, 1)[0][0] == ledger.principles()[500].id
    index.close()
    ledger.close()


def test_room_for_vectors_to_come_holds_nothing_of_the_process_memory(
    sqlite_ledger: Ledger, folder: Path, index: Index
):
    # Chroma's room for 100 vectors is memory as it was given: glibc's filling, or what was freed before.
    kept = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    sync(sqlite_ledger, index)
    assert rebuild(sqlite_ledger, index) == 1
    rooms = [*folder.rglob("data_level0.bin"), *folder.rglob("length.bin")]
    assert len(rooms) == 2, "Chroma makes its files later than it did"
    assert {byte for room in rooms for byte in room.read_bytes()} == {0}
    for i in range(1200):
        samples.remember(sqlite_ledger, f"How many wheels do {i} cars have?")
    drain(sqlite_ledger, index)
    assert index.query(RUN, "default", "How many legs do 4 cows have?", 1)[0][0] == kept.id
    assert {room.stat().st_size for room in rooms} != {0}
    index.close()
    again = Index.open(folder, index.embedder)
    assert (again.moved_aside, sync(sqlite_ledger, again)) == (None, 1201)
    assert again.query(RUN, "default", "How many legs do 4 cows have?", 1)[0][0] == kept.id
    again.close()


def test_a_former_build_leaves_no_vectors_on_the_disk(filled: Path, tmp_path: Path, embedder: Embedder):
    home = tmp_path / "home"
    shutil.copytree(filled, home)
    ledger = Ledger.open(f"sqlite:///{home}/ledger.db")
    index = Index.open(home / "chroma", embedder)
    before = {path.name for path in (home / "chroma").iterdir() if path.is_dir()}
    assert rebuild(ledger, index) == 1100
    after = {path.name for path in (home / "chroma").iterdir() if path.is_dir()}
    assert before
    assert len(after) == 1
    assert not before & after
    text = ledger.principles()[500].text
    assert index.query(MemoryKind.PRINCIPLE, "default", text, 1)[0][0] == ledger.principles()[500].id
    index.close()
    again = Index.open(home / "chroma", embedder)
    assert not again.needs_rebuild
    assert sync(ledger, again) == 1100
    again.close()
    ledger.close()


def test_an_index_killed_while_it_follows_catches_up(tmp_path: Path, embedder: Embedder):
    script = """
import os, signal, sys, threading
from pathlib import Path
from memory.embed import load_embedder
from memory.index import Index, drain, sync
from memory.ledger import ItemText, Ledger
from tests.memory import samples
home = Path(sys.argv[1])
ledger = Ledger.open(f"sqlite:///{home}/ledger.db")
index = Index.open(home / "chroma", load_embedder("wordllama", home))
sync(ledger, index)
for i in range(300):
    ledger.add_principle(samples.principle(f"Rule {i}: cows have {i} legs."))
acknowledge = ledger.ack_outbox
def die(seq):
    acknowledge(seq)
    os.kill(os.getpid(), signal.SIGKILL)
ledger.ack_outbox = die
drain(ledger, index, batch=50)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    assert len(ledger.outbox(500)) == 250
    index = Index.open(tmp_path / "chroma", embedder)
    assert sync(ledger, index) == 300
    index.close()
    ledger.close()
