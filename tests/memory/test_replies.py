"""Stored replies: a key stands for one request, and its first answer stays until it is forgotten."""

from __future__ import annotations

from memory import replies
from memory.ledger import Ledger
from memory.replies import Reply

DAY = 86_400


def test_a_key_stands_for_its_first_request(ledger: Ledger) -> None:
    first = replies.claim(ledger.database, "t", "k", "one", DAY)
    assert first == Reply(fingerprint="one")
    assert replies.claim(ledger.database, "t", "k", "two", DAY) == first
    assert replies.claim(ledger.database, "other", "k", "two", DAY).fingerprint == "two"


def test_the_first_answer_stays(ledger: Ledger) -> None:
    replies.claim(ledger.database, "t", "k", "one", DAY)
    said = Reply(fingerprint="one", status=200, content_type="application/json", body='{"a": "é\\u0000"}')
    replies.keep(ledger.database, "t", "k", said)
    replies.keep(ledger.database, "t", "k", said.model_copy(update={"status": 500}))
    assert replies.claim(ledger.database, "t", "k", "one", DAY) == said


def test_a_key_is_forgotten_after_its_time(ledger: Ledger) -> None:
    replies.claim(ledger.database, "t", "k", "one", DAY)
    assert replies.claim(ledger.database, "t", "k", "two", 0).fingerprint == "two"


def test_an_answer_to_a_forgotten_key_is_dropped(sqlite_ledger: Ledger) -> None:
    replies.keep(sqlite_ledger.database, "t", "k", Reply(fingerprint="one", status=200))
    assert replies.claim(sqlite_ledger.database, "t", "k", "two", DAY).status is None
