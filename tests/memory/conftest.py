"""Ledgers on both databases, the real embedder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.embed import Embedder, load_embedder
from memory.ledger import Ledger


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty ledger on each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/ledger.db"
    return request.getfixturevalue("postgres_database")


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
