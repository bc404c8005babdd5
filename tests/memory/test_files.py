"""Files: bytes before records, one tenant's from another's, nothing left behind."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest

from memory import files
from memory.errors import NotFoundError
from memory.files import Draft, FilePurpose, StoredFile
from memory.ledger import Ledger
from memory.records import now


def stored(ledger: Ledger, folder: Path, data: bytes = b"hello", tenant: str = "a") -> StoredFile:
    return files.store(
        ledger.database, folder, [data], tenant=tenant, purpose=FilePurpose.BATCH, filename="lines.jsonl"
    )


def test_a_file_is_found_with_its_bytes_and_their_hash(ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    made = files.store(
        ledger.database, folder, [b"one ", b"two"], tenant="a", purpose=FilePurpose.FINE_TUNE, filename="x"
    )
    assert made.id.startswith("file-")
    assert files.get(ledger.database, made.id, tenant="a") == made
    assert b"".join(files.read_chunks(folder, made)) == b"one two"
    assert (made.bytes, made.sha256) == (7, hashlib.sha256(b"one two").hexdigest())


def test_another_tenants_file_is_not_found(ledger: Ledger, tmp_path: Path) -> None:
    made = stored(ledger, tmp_path)
    with pytest.raises(NotFoundError):
        files.get(ledger.database, made.id, tenant="b")
    with pytest.raises(NotFoundError):
        files.remove(ledger.database, tmp_path, made.id, tenant="b")
    assert files.page(ledger.database, tenant="b") == ([], False)
    assert (tmp_path / made.id).exists()


def test_pages_follow_each_other_in_both_orders(ledger: Ledger, tmp_path: Path) -> None:
    ids = [stored(ledger, tmp_path, str(i).encode()).id for i in range(5)]
    stored(ledger, tmp_path, tenant="b")
    first, more = files.page(ledger.database, tenant="a", limit=2)
    assert ([f.id for f in first], more) == ([ids[4], ids[3]], True)
    rest, more = files.page(ledger.database, tenant="a", limit=3, after=ids[3])
    assert ([f.id for f in rest], more) == ([ids[2], ids[1], ids[0]], False)
    oldest, _ = files.page(ledger.database, tenant="a", limit=2, newest_first=False, after=ids[0])
    assert [f.id for f in oldest] == [ids[1], ids[2]]
    assert files.page(ledger.database, tenant="a", purpose=FilePurpose.EVALS) == ([], False)
    with pytest.raises(NotFoundError, match="after"):
        files.page(ledger.database, tenant="b", after=ids[0])


def test_a_removed_file_leaves_no_bytes(sqlite_ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    made = stored(sqlite_ledger, folder)
    files.remove(sqlite_ledger.database, folder, made.id, tenant="a")
    assert list(folder.iterdir()) == []
    with pytest.raises(NotFoundError):
        files.get(sqlite_ledger.database, made.id, tenant="a")


def test_a_draft_is_no_file_until_it_is_sealed(sqlite_ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    draft = Draft(folder, "file-1")
    draft.write(b"half")
    assert not (folder / "file-1").exists()
    draft.discard()
    assert list(folder.iterdir()) == []


def test_the_sweep_removes_what_expired_and_what_a_crash_left_and_nothing_else(
    sqlite_ledger: Ledger, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    kept = stored(sqlite_ledger, folder)
    draft = Draft(folder, files.new_file_id())
    draft.write(b"old")
    past = now() - timedelta(seconds=1)
    old = files.add(sqlite_ledger.database, draft, tenant="a", purpose=FilePurpose.BATCH, filename="x", expires_at=past)
    with pytest.raises(NotFoundError, match="expired"):
        files.get(sqlite_ledger.database, old.id, tenant="a")
    assert [f.id for f in files.page(sqlite_ledger.database, tenant="a")[0]] == [kept.id]
    (folder / "file-orphan").write_bytes(b"sealed, but never committed")
    (folder / "file-half.part").write_bytes(b"never sealed")
    assert files.sweep(sqlite_ledger.database, folder) == 3
    assert [path.name for path in folder.iterdir()] == [kept.id]
