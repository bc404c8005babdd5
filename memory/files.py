"""Uploaded and produced files: the record in the ledger, the bytes in a folder under the file's id.

Bytes are on disk under their final name before the record is committed, and the record goes before the
bytes do: a record always has its bytes. `sweep` removes what a crash left without a record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from pydantic import Field
from sqlalchemy import Connection, delete, select

from memory import rows
from memory.database import Database
from memory.errors import LedgerError, NotFoundError, boundary
from memory.records import Record, new_id, now
from memory.schema import files as files_table

PART = ".part"
"""Ends the name of bytes that are not whole yet."""

CHUNK_BYTES = 1 << 20


class FilePurpose(StrEnum):
    """What a file is for, in OpenAI's words."""

    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"
    FINE_TUNE = "fine-tune"
    USER_DATA = "user_data"
    EVALS = "evals"


class FileStatus(StrEnum):
    """OpenAI's states; a file is stored whole or not at all, so it is `processed` from the start."""

    PROCESSED = "processed"


def new_file_id() -> str:
    """A sortable id in OpenAI's form, e.g. `file-0192f…`."""
    return new_id("file").replace("_", "-")


class StoredFile(Record):
    """A file of one tenant."""

    id: str = Field(default_factory=new_file_id)
    tenant: str
    purpose: FilePurpose
    filename: str
    bytes: int
    sha256: str
    status: FileStatus = FileStatus.PROCESSED
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime | None = None
    """From then on it is not found, and the next `sweep` removes it."""

    @property
    def expired(self) -> bool:
        """Its time is over."""
        return self.expires_at is not None and self.expires_at <= now()


class Draft:
    """Bytes on their way to becoming a file: `write`, then `seal`; `discard` when nothing comes of them."""

    def __init__(self, folder: Path, file_id: str) -> None:
        """Raises `LedgerError` when the folder cannot be written to."""
        self.file_id = file_id
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._final = folder / file_id
        self._part = folder / f"{file_id}{PART}"
        with boundary(LedgerError, f"cannot write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")

    def write(self, data: bytes) -> None:
        """Append. Raises `LedgerError` when the disk refuses."""
        with boundary(LedgerError, "the file cannot be stored"):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def seal(self) -> str:
        """Put the bytes on disk under the file's id; their sha256. Raises `LedgerError`."""
        with boundary(LedgerError, "the file cannot be stored"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._final)
            _sync_folder(self._final.parent)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Forget what was not sealed."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def store(
    database: Database,
    folder: Path,
    chunks: Iterable[bytes],
    *,
    tenant: str,
    purpose: FilePurpose,
    filename: str,
) -> StoredFile:
    """A new file of these bytes, on disk and committed."""
    draft = Draft(folder, new_file_id())
    try:
        for chunk in chunks:
            draft.write(chunk)
        return add(database, draft, tenant=tenant, purpose=purpose, filename=filename)
    finally:
        draft.discard()


def add(
    database: Database,
    draft: Draft,
    *,
    tenant: str,
    purpose: FilePurpose,
    filename: str,
    expires_at: datetime | None = None,
) -> StoredFile:
    """Seal a draft and commit it as a file."""
    sha256 = draft.seal()
    stored = StoredFile(
        id=draft.file_id,
        tenant=tenant,
        purpose=purpose,
        filename=filename,
        bytes=draft.bytes,
        sha256=sha256,
        expires_at=expires_at,
    )
    with database.writing() as connection:
        insert_file(connection, stored)
    return stored


def insert_file(connection: Connection, stored: StoredFile) -> None:
    """The record of sealed bytes, within the caller's transaction."""
    rows.add(
        connection, files_table, stored, "file", {"id": stored.id}, tenant=stored.tenant, purpose=stored.purpose.value
    )


def get(database: Database, file_id: str, *, tenant: str) -> StoredFile:
    """The file; NotFoundError for an unknown or expired one, or another tenant's."""
    with database.reading() as connection:
        stored = rows.find(connection, files_table, StoredFile, "file", {"id": file_id, "tenant": tenant})
    if stored.expired:
        raise NotFoundError(f"file {file_id!r} has expired")
    return stored


def page(
    database: Database,
    *,
    tenant: str,
    purpose: FilePurpose | None = None,
    after: str | None = None,
    limit: int = 10_000,
    newest_first: bool = True,
) -> tuple[list[StoredFile], bool]:
    """A page of a tenant's files from behind the id `after`, and whether more follow.

    An expired file that is not swept yet is left out. NotFoundError when `after` names no file of the list.
    """
    key = {"tenant": tenant} | ({"purpose": purpose.value} if purpose else {})
    with database.reading() as connection:
        found, more = rows.page(
            connection, files_table, StoredFile, key, after=after, limit=limit, newest_first=newest_first
        )
    return [stored for stored in found if not stored.expired], more


def remove(database: Database, folder: Path, file_id: str, *, tenant: str) -> None:
    """Delete a file; NotFoundError for an unknown one or another tenant's."""
    key = {"id": file_id, "tenant": tenant}
    with database.writing() as connection:
        rows.require(connection, files_table, "file", key)
        connection.execute(delete(files_table).where(files_table.c.id == file_id))
    (folder / file_id).unlink(missing_ok=True)


def read_chunks(folder: Path, stored: StoredFile) -> Iterator[bytes]:
    """The bytes, a megabyte at a time; LedgerError, at once, when they are gone."""
    with boundary(LedgerError, f"cannot read file {stored.id}"):
        file = (folder / stored.id).open("rb")
    return _chunks(file)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def sweep(database: Database, folder: Path) -> int:
    """Delete expired files, and bytes without a record; how many. Only while nobody uploads."""
    if not folder.exists():
        return 0
    known: set[str] = set()
    with database.writing() as connection:
        for stored in rows.read(connection, StoredFile, select(files_table.c.body)):
            if stored.expired:
                connection.execute(delete(files_table).where(files_table.c.id == stored.id))
            else:
                known.add(stored.id)
    gone = [path for path in folder.iterdir() if path.name not in known]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
