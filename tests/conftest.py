"""What all rooms' tests share: a throw-away PostgreSQL, and the same generated examples at every run of CI."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A release must not fail by the luck of the draw; whoever works on the code draws anew at every run. Nobody's run fails
# because the machine does other work.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the engine begins first: it is the longest, and waits more than it computes."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side (`-n 2`) a file stays together, and all that needs the engine is one group: two would starve each
    other. (xdist 3.8's own groups do nothing under pytest 9.2: it writes node ids that pytest no longer reads.)"""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engine" if "needs_engine" in (config.rootpath / file).read_text(encoding="utf-8") else file

    return Files(config, log)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a cluster of its own, without the database's name; skipped where PostgreSQL is not installed."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on PATH")
    as_root = os.geteuid() == 0
    if as_root and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not start as root, and there is no runuser")
    before = ["runuser", "-u", "postgres", "--"] if as_root else []
    folder = Path(tempfile.mkdtemp(prefix="nightschool-pg-"))
    if as_root:
        shutil.chown(folder, "postgres")

    def run(*command: str) -> None:
        subprocess.run([*before, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_database(postgres: str) -> str:
    """URL of an empty database in it."""
    import psycopg

    name = f"ledger_{secrets.token_hex(4)}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{postgres}/{name}"
