"""The index is lost, torn or outgrown while it is in use: recall goes on, and its keeper makes it anew."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from memory.embed import Embedder, load_embedder
from memory.errors import IndexUnavailableError
from memory.index import READY, Index, sync
from memory.indexer import Indexer
from memory.ledger import Ledger
from memory.recall import Memory, RecallConfig
from memory.records import MemoryKind
from tests.memory import samples

QUESTION = "How many legs do 4 cows have?"
RUN = MemoryKind.RUN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "chroma"


@pytest.fixture
def index(folder: Path, embedder: Embedder) -> Iterator[Index]:
    opened = Index.open(folder, embedder)
    yield opened
    opened.close()


@pytest.fixture
def indexer(sqlite_ledger: Ledger, index: Index) -> Iterator[Indexer]:
    keeper = Indexer(sqlite_ledger, index)
    yield keeper
    keeper.close()


def ids(index: Index) -> list[str]:
    return [found for found, _ in index.query(RUN, "default", QUESTION, 9)]


def test_the_index_is_built_in_the_background_and_follows_when_it_is_woken(
    sqlite_ledger: Ledger, index: Index, indexer: Indexer
):
    first = samples.remember(sqlite_ledger, QUESTION)
    assert index.state == "rebuilding"
    indexer.start()
    assert indexer.wait(60)
    assert (index.state, ids(index)) == ("ready", [first.id])
    samples.remember(sqlite_ledger, "How many legs do 6 hens have?")
    indexer.wake()
    assert indexer.wait(60)
    assert len(ids(index)) == 2


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_the_database(folder: Path) -> None:
    (folder / "chroma.sqlite3").write_bytes(b"")


def garble_the_database(folder: Path) -> None:
    path = folder / "chroma.sqlite3"
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256))


def lose_the_mark(folder: Path) -> None:
    (folder / READY).unlink()


@pytest.mark.parametrize("harm", [delete, empty_the_database, garble_the_database, lose_the_mark])
def test_a_folder_harmed_in_use_is_noticed_and_made_again_while_recall_goes_on(
    sqlite_ledger: Ledger, folder: Path, index: Index, indexer: Indexer, harm, caplog: pytest.LogCaptureFixture
):
    run = samples.remember(sqlite_ledger, QUESTION)
    indexer.start()
    assert indexer.wait(60)
    harm(folder)
    memory = Memory(sqlite_ledger, index, RecallConfig())
    # Chroma keeps some of a small index in memory, so it may take a write until it stumbles.
    samples.remember(sqlite_ledger, "Sort these words by length.")
    assert memory.recall(samples.task("How many legs do 7 cows have?")).runs == [run]
    indexer.wake()
    assert indexer.wait(60)
    assert index.state == "ready"
    assert len(ids(index)) == 2
    assert memory.recall(samples.task("How many legs do 7 cows have?")).runs == [run]
    if harm in (delete, lose_the_mark):
        assert "is gone from the disk" in caplog.text


def test_a_broken_index_says_so(sqlite_ledger: Ledger, folder: Path, index: Index, indexer: Indexer):
    samples.remember(sqlite_ledger, QUESTION)
    indexer.start()
    assert indexer.wait(60)
    indexer.close()
    shutil.rmtree(folder)
    with pytest.raises(IndexUnavailableError, match="gone from the disk"):
        ids(index)
    assert index.state.startswith("broken: ")
    assert index.needs_rebuild


def test_a_reindex_changes_nothing_but_the_build(sqlite_ledger: Ledger, index: Index, indexer: Indexer):
    run = samples.remember(sqlite_ledger, QUESTION)
    indexer.start()
    assert indexer.wait(60)
    indexer.reindex()
    assert ids(index) == [run.id]
    assert indexer.wait(60)
    assert (index.count(), ids(index)) == (1, [run.id])


class Letters(BaseHTTPRequestHandler):
    """An OpenAI-compatible embeddings endpoint: how often each of some letters occurs. It waits where it is told to."""

    open = threading.Event()

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        if len(texts) > 1:
            self.open.wait(60)
        rows = [
            {"object": "embedding", "index": i, "embedding": [1.0 + text.count(letter) for letter in "aceghilmnorst"]}
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        body = json.dumps({"object": "list", "model": "letters", "data": rows, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_endpoint_takes_over_from_wordllama_while_the_old_index_answers(
    sqlite_ledger: Ledger, folder: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Letters)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    run, other = (samples.remember(sqlite_ledger, text) for text in (QUESTION, "Sort these words by length."))
    first = Index.open(folder, embedder)
    sync(sqlite_ledger, first)
    first.close()
    load = partial(load_embedder, cache_dir=tmp_path)
    index = Index.open(folder, load("litellm:openai/letters"), load)
    keeper = Indexer(sqlite_ledger, index)
    keeper.start()
    memory = Memory(sqlite_ledger, index, RecallConfig())
    asked = samples.task("How many legs do 7 cows have?")
    assert index.state == "rebuilding"
    assert memory.recall(asked).runs == [run]
    assert index.query(RUN, "default", QUESTION, 9)[0][0] == run.id
    Letters.open.set()
    assert keeper.wait(60)
    assert (index.state, memory.recall(asked).runs) == ("ready", [run])
    assert json.loads((folder / READY).read_text())["embedder"] == "litellm:openai/letters"
    assert {found for found, _ in index.query(RUN, "default", QUESTION, 9)} == {run.id, other.id}
    keeper.close()
    index.close()
    server.shutdown()
    server.server_close()
