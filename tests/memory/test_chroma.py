"""The index on a Chroma server: opt-in, warned of, in a database of its own; away, it costs no answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.chroma import ChromaConfig
from memory.embed import Embedder
from memory.errors import ConfigError, IndexUnavailableError
from memory.index import Index, rebuild, sync
from memory.ledger import Ledger
from memory.recall import Memory, RecallConfig
from memory.records import MemoryKind, MemoryStatus
from tests.memory import samples

QUESTION = "How many legs do 4 cows have?"
RUN = MemoryKind.RUN


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Chroma's own server, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("chroma")
    command = [str(program), "run", "--path", str(tmp_path / "server"), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "Chroma's server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def test_a_server_holds_the_index_of_this_installation_only_and_recall_goes_on_without_it(
    server: tuple[str, subprocess.Popen[bytes]],
    sqlite_ledger: Ledger,
    embedder: Embedder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    url, process = server
    mine, theirs = (samples.remember(sqlite_ledger, QUESTION, tenant) for tenant in ("ada", "bob"))
    config = ChromaConfig(url=url, database="first")
    index = Index.open(tmp_path / "index", embedder, chroma=config)
    assert "versions 1.0.0 to 1.5.9 run code of anybody" in caplog.text
    other = Index.open(tmp_path / "other", embedder, chroma=ChromaConfig(url=url, database="second"))
    assert (sync(sqlite_ledger, index), rebuild(sqlite_ledger, other), other.count()) == (2, 2, 2)
    for tenant, run in (("ada", mine), ("bob", theirs)):
        assert [found for found, _ in index.query(RUN, tenant, QUESTION, 9)] == [run.id]
    sqlite_ledger.set_memory_status(theirs.id, MemoryStatus.RETIRED, "it misled")
    assert (rebuild(sqlite_ledger, index), index.count(), other.count()) == (1, 1, 2)
    other.close()
    index.close()
    index = Index.open(tmp_path / "index", embedder, chroma=config)
    assert not index.needs_rebuild
    process.kill()
    process.wait()
    memory = Memory(sqlite_ledger, index, RecallConfig())
    asked = samples.task("How many legs do 7 cows have?", "ada")
    assert memory.recall(asked).runs == [mine]
    assert index.state.startswith("broken")
    with pytest.raises(IndexUnavailableError):
        rebuild(sqlite_ledger, index)
    assert memory.recall(asked).runs == [mine]
    index.close()


def test_a_server_that_is_away_is_one_line(embedder: Embedder, tmp_path: Path):
    with pytest.raises(IndexUnavailableError, match=r"the Chroma server http://127.0.0.1:9 cannot be used") as told:
        Index.open(tmp_path / "index", embedder, chroma=ChromaConfig(url="http://127.0.0.1:9"))
    assert "\n" not in str(told.value)
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        Index.open(tmp_path / "index", embedder, chroma=ChromaConfig(url="chroma.local"))
