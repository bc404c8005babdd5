"""Ledgers on both databases, a throw-away PostgreSQL, the real embedder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.embed import Embedder, load_embedder
from memory.ledger import Ledger


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a cluster of its own, without the database's name; skipped where PostgreSQL is not installed."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on PATH")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    as_root = os.geteuid() == 0
    if as_root and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not start as root, and there is no runuser")
    before = ["runuser", "-u", "postgres", "--"] if as_root else []
    folder = Path(tempfile.mkdtemp(prefix="nightschool-pg-"))
    if as_root:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run([*before, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty ledger on each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/ledger.db"
    import psycopg

    cluster = request.getfixturevalue("postgres")
    name = f"ledger_{secrets.token_hex(4)}"
    with psycopg.connect(f"{cluster}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{cluster}/{name}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    """An empty ledger on each database."""
    opened = Ledger.open(url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger on SQLite, for what does not depend on the database."""
    opened = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """The bundled one."""
    return load_embedder("wordllama", tmp_path_factory.mktemp("embedder"))
