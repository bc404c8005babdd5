"""Where the index's Chroma is: a folder that this process owns, or a server that several may share.

Owns opening either safely, and the files of the folder. Owns no vectors and no builds (`memory.index`).

- One process owns the folder (a lock file), also with a server: Chroma shows a second process stale data or worse.
- A torn folder can crash a process that reads it, so a child process reads all of it first. One that fails is moved
  aside (`FOLDER.broken-…`).
- A server is opt-in: the embedded Chroma has no port that anybody could reach.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from memory.errors import ConfigError, IndexUnavailableError

log = logging.getLogger(__name__)

M_PERTURB = -6
"""glibc's malloc.h."""

PROBE_SECONDS = 120.0
PROBE_SECONDS_PER_MB = 1.0
"""A torn file can make its reader hang as well as crash; a large index on a busy machine only takes its time."""
PROBE = """
import struct
import sys
from pathlib import Path
import chromadb
import numpy as np
from chromadb.config import Settings
for links in Path(sys.argv[1]).rglob("link_lists.bin"):
    count = struct.unpack_from("<iQQQ", links.with_name("header.bin").read_bytes())[3]
    data, at, seen = links.read_bytes(), 0, 0
    while at < len(data):
        at, seen = at + 4 + struct.unpack_from("<I", data, at)[0], seen + 1
    if (at, seen) != (len(data), count):
        raise ValueError("the upper links do not fit the vectors")
client = chromadb.PersistentClient(sys.argv[1], settings=Settings(anonymized_telemetry=False))
for collection in client.list_collections():
    count = collection.count()
    for start in range(0, count, 1000):
        vectors = np.array(collection.get(limit=1000, offset=start, include=["embeddings"])["embeddings"])
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
            raise ValueError("vectors are not what was written")
    if count:
        found = collection.query(query_embeddings=vectors[:1], n_results=count, include=["distances"])
        if len(found["ids"][0]) < count // 2:
            raise ValueError("most vectors cannot be reached")
"""
"""Reads every vector and walks the whole graph: opening alone loads neither, and a torn one crashes its reader. Links
above the lowest level are counted by hand (hnswlib's format): a search without some of them only gets worse."""


class ChromaConfig(BaseModel):
    """Which Chroma holds the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None,
        description="a Chroma server (http://HOST:PORT) instead of the folder; let nobody but this service reach it",
    )
    database: str = Field(
        default="nightschool", min_length=3, max_length=60, description="on that server; no other installation's"
    )


class Place(Protocol):
    """Where Chroma's collections are."""

    def connect(self) -> Any:
        """A client."""
        ...

    def probe(self) -> Path | None:
        """Before the first `connect`: where what could not be read was moved; None when all is well."""
        ...

    def put_aside(self) -> Path | None:
        """After a fault: make room for a new start; where the old files went."""
        ...

    def sweep(self) -> None:
        """After collections were deleted: what they left behind goes too."""
        ...

    def wipe(self) -> None:
        """No trace of what was deleted is left, as far as this process can see to it. While nobody writes, and nothing
        written waits for a reader."""
        ...


def place_of(folder: Path, config: ChromaConfig) -> Place:
    """The folder, or the server of the configuration."""
    return Embedded(folder) if config.url is None else Remote(config.url, config.database)


class Embedded:
    """A folder, read by this process only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def connect(self) -> Any:
        """Opens or creates the folder."""
        import chromadb
        from chromadb.config import Settings

        _overwrite_freed_memory()
        # Chroma adds a batch to its graph on every core, and vectors added at the same moment do not see each other:
        # one collection in five then held a vector that no search could reach. Its pool starts at the first batch.
        os.environ["RAYON_NUM_THREADS"] = "1"
        return chromadb.PersistentClient(str(self._folder), settings=Settings(anonymized_telemetry=False))

    def probe(self) -> Path | None:
        """A child process reads it first."""
        return move_aside_if_broken(self._folder)

    def put_aside(self) -> Path | None:
        """Moves the folder out of the way."""
        if not self._folder.exists():
            return None
        aside = _aside(self._folder)
        self._folder.rename(aside)
        return aside

    def sweep(self) -> None:
        """Remove the vector files that Chroma leaves behind when it deletes a collection."""
        # Listed first: a folder that is in use has had its row before it came to be.
        present = [path for path in self._folder.iterdir() if path.is_dir()]
        with closing(sqlite3.connect(f"file:{self._folder / 'chroma.sqlite3'}?mode=ro", uri=True)) as connection:
            living = {row[0] for row in connection.execute("SELECT id FROM segments")}
        for path in present:
            if path.name not in living:
                shutil.rmtree(path, ignore_errors=True)

    def wipe(self) -> None:
        """Write Chroma's database anew: its free pages keep the ids and vectors of what was deleted or forgotten. And
        blank the room for vectors to come."""
        for header in self._folder.glob("*/header.bin"):
            _blank_unused(header)
        try:
            database = self._folder / "chroma.sqlite3"
            with closing(sqlite3.connect(database, timeout=15, isolation_level=None)) as connection:
                connection.execute("VACUUM")
        except sqlite3.Error as exc:
            log.warning("the index %s keeps free pages until it is made anew: %s", self._folder, exc)


class Remote:
    """A database of its own on a Chroma server. Its files, backups and free pages are the server's."""

    def __init__(self, url: str, database: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"chroma.url {url!r} is no address of a server: write http://HOST:PORT")
        self._url, self._database = url, database
        self._host, self._ssl = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._ssl else 8000)

    def connect(self) -> Any:
        """Connects, makes the database on first use, and says what speaks against a server."""
        import chromadb
        from chromadb.config import Settings
        from chromadb.errors import NotFoundError

        where: dict[str, Any] = {
            "chroma_server_host": self._host,
            "chroma_server_http_port": self._port,
            "chroma_server_ssl_enabled": self._ssl,
            "anonymized_telemetry": False,
        }
        try:
            admin = chromadb.AdminClient(Settings(chroma_api_impl="chromadb.api.fastapi.FastAPI", **where))
            try:
                admin.get_database(self._database)
            except NotFoundError:
                admin.create_database(self._database)
            settings = Settings(anonymized_telemetry=False)
            client = chromadb.HttpClient(
                host=self._host, port=self._port, ssl=self._ssl, database=self._database, settings=settings
            )
            client.heartbeat()
        except Exception as exc:
            said = " ".join(str(exc).split())[:200]
            raise IndexUnavailableError(f"the Chroma server {self._url} cannot be used: {said}") from exc
        # No version is asked for: 1.5.9 answers "1.0.0", like every server since.
        log.warning(
            "the index is on the Chroma server %s: whoever reaches it can read and change what is near to what, and "
            "Python servers of versions 1.0.0 to 1.5.9 run code of anybody who does, without a key, so let nobody but "
            "this service reach it; files and backups with what is forgotten are its owner's to clean",
            self._url,
        )
        return client

    def probe(self) -> Path | None:
        """The server's own business."""
        return None

    def put_aside(self) -> Path | None:
        """Nothing: the next build drops what is there."""
        return None

    def sweep(self) -> None:
        """Nothing."""

    def wipe(self) -> None:
        """Nothing that a client could do."""


def _overwrite_freed_memory() -> None:
    """Chroma writes a new collection's files as their memory was given to it, with whatever lay there before: texts
    too, forgotten ones among them. glibc fills what is given and freed when asked to; other systems have that done when
    the next build is `wipe`d."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_PERTURB, 0xA5)


def _blank_unused(header: Path) -> None:
    """A new collection's files are its memory as malloc gave it, room for 100 vectors: whatever was there before stays
    on the disk until that many came. hnswlib's format: version, offset, room, vectors, bytes a vector."""
    try:
        count, size = struct.unpack_from("<iQQQQ", header.read_bytes())[3:]
        for name, width in (("data_level0.bin", size), ("length.bin", 4)):
            path = header.with_name(name)
            if (beyond := path.stat().st_size - count * width) > 0:
                with path.open("r+b") as file:
                    file.seek(count * width)
                    file.write(bytes(beyond))
    except (OSError, struct.error) as exc:
        log.warning("%s keeps what the memory of its process held: %s", header.parent, exc)


def own(folder: Path) -> IO[str]:
    """Take the folder's lock, which ends with the process; the lock file is beside the folder."""
    import fcntl

    lock = folder.with_name(f"{folder.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise IndexUnavailableError(
            f"the index {folder} is open already, here or in another process: close that one first"
        ) from exc
    return lock


def move_aside_if_broken(folder: Path) -> Path | None:
    """Try the folder in a child process; returns where a broken one went."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    command = [sys.executable, "-c", PROBE, str(folder)]
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    patience = PROBE_SECONDS + PROBE_SECONDS_PER_MB * size / 2**20
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=environment)
    except subprocess.TimeoutExpired:
        reason = f"was not read within {patience:.0f} s"
    else:
        if child.returncode == 0:
            return None
        said = child.stderr.strip().splitlines()
        reason = f"exit code {child.returncode}" + (f", {said[-1]}" if said else "")
    aside = _aside(folder)
    folder.rename(aside)
    log.warning("the index %s is broken (%s): moved to %s, a new one is built from the ledger", folder, reason, aside)
    return aside


def _aside(folder: Path) -> Path:
    """Where a broken folder goes. Only the last one is kept: it is for looking at, and nothing is lost with it."""
    for former in folder.parent.glob(f"{folder.name}.broken-*"):
        shutil.rmtree(former, ignore_errors=True)
    return folder.with_name(f"{folder.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}")
