"""The ledger's database: connections, transactions, migrations and the translation of their errors.

Owns how SQLite and PostgreSQL are opened and how one writes to them. Owns no tables (`memory.schema`)
and no records (`memory.ledger`).

One writer at a time on both databases (SQLite: BEGIN IMMEDIATE; PostgreSQL: one advisory lock), so a
`seq` is given in commit order: whoever has read up to a watermark has missed nothing below it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from memory.errors import ConfigError, LedgerError

CHECKPOINT_TRIES = 100
"""Times a tenth of a second."""

WRITER_LOCK = 0x6E696768
"""PostgreSQL's advisory lock of whoever writes ("nigh")."""

_migrating = threading.Lock()
"""Alembic keeps its context in module globals: one migration at a time in a process."""


class Database:
    """A pool of connections with read and write transactions. Safe to share between threads."""

    def __init__(self, engine: Engine, wait_s: float) -> None:
        self.engine = engine
        self.place = engine.url.render_as_string(hide_password=True)
        self._wait_s = wait_s

    @classmethod
    def open(cls, url: str, wait_s: float) -> Database:
        """Connect and bring the tables up to date.

        `wait_s`: seconds to wait for another writer. Raises `ConfigError` for a URL that cannot be
        used and `LedgerError` for a database that cannot be opened or is of a newer version.
        """
        database = cls(_engine(_read_url(url), wait_s), wait_s)
        try:
            database.migrate()
        except BaseException:
            database.engine.dispose()
            raise
        return database

    def migrate(self) -> None:
        """Run the revisions that the database has not seen, all of them or none."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        folder = Path(__file__).parent / "migrations"
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        with _migrating, self.writing() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as exc:
                raise LedgerError(
                    f"the ledger {self.place} was made by another version of Nightschool ({exc}): "
                    "install that version, or open another ledger"
                ) from exc

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view; raises `LedgerError`."""
        with self._translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: all of it is on disk when the block ends, or none. Raises `LedgerError`."""
        engine = self.engine.execution_options(writes=True)
        with self._translated(), engine.begin() as connection:
            yield connection

    def compact(self) -> None:
        """Write the database anew, so that no free page keeps what was deleted. Raises `LedgerError`.

        PostgreSQL's own log keeps it until its segments are recycled.
        """
        engine = self.engine.execution_options(isolation_level="AUTOCOMMIT") if not self._sqlite else self.engine
        with self._translated():
            if not self._sqlite:
                with engine.connect() as connection:
                    connection.execute(text("VACUUM (FULL)"))
                return
            # Neither statement runs inside a transaction, and SQLAlchemy's connections always are in one.
            connection = engine.raw_connection()
            try:
                cursor = connection.cursor()
                cursor.execute("VACUUM")
                for _ in range(CHECKPOINT_TRIES):
                    if cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                        break
                    time.sleep(0.1)  # somebody reads an older state still
                else:
                    raise LedgerError(f"the ledger {self.place} is read without a pause: try again when it is quieter")
                cursor.close()
            except sqlite3.Error as exc:
                raise LedgerError(f"the ledger {self.place} cannot be compacted: {exc}") from exc
            finally:
                connection.close()

    @property
    def _sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as exc:
            raise LedgerError(f"the ledger {self.place} {_reason(exc, self._wait_s)}") from exc
        except ValueError as exc:  # a value with no JSON or no UTF-8 form, or a body that is no record
            raise LedgerError(f"the ledger {self.place} cannot hold or read a value: {_line(exc)}") from exc


def _read_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except SQLAlchemyError as exc:
        raise ConfigError(f"ledger URL {url!r} is no database URL: use sqlite:////path/to/ledger.db") from exc
    backend = parsed.drivername.split("+")[0]
    if backend == "postgres" or backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"ledger URL with {backend!r}: only sqlite and postgresql are supported")
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("the ledger must be a file: use sqlite:////path/to/ledger.db")
    return parsed


def _engine(url: URL, wait_s: float) -> Engine:
    options: dict[str, Any] = {"pool_size": 8, "max_overflow": 24}
    if url.get_backend_name() == "sqlite":
        folder = Path(url.database or "").parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise LedgerError(f"cannot make the ledger's folder {folder}: {exc.strerror}") from exc
        engine = create_engine(url, connect_args={"timeout": wait_s}, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        engine = create_engine(url, pool_pre_ping=True, **options)
    except ImportError as exc:
        raise ConfigError("a PostgreSQL ledger needs psycopg: pip install 'psycopg[binary]'") from exc

    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.execute(text(f"SET LOCAL lock_timeout = {int(wait_s * 1000)}"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})"))

    event.listen(engine, "begin", begin)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    # Python's sqlite3 would begin transactions by itself, and always deferred ones: a reader that
    # turns writer then fails at once instead of waiting. `_begin_sqlite` begins them instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _reason(exc: SQLAlchemyError, wait_s: float) -> str:
    original = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
    line = _line(original)
    state = getattr(original, "sqlstate", None)
    if "is locked" in line or state == "55P03":
        return f"is locked by another writer (waited {wait_s:g} s): end that process, or try again"
    if "disk is full" in line or state == "53100":
        return "has no room on its disk: free some space and try again; nothing was half-written"
    if "unable to open" in line:
        return "cannot be opened: check that its folder exists and may be written"
    return f"refused: {line}"


def _line(exc: BaseException) -> str:
    """An error's text as one line."""
    return " ".join(str(exc).split()) or type(exc).__name__
