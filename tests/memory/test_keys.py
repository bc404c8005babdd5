"""API keys: shown once, found by whoever has the secret, ended for good."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import ValidationError
from sqlalchemy import select

from memory import keys
from memory.errors import ConflictError, NotFoundError
from memory.keys import ApiKey, Scope
from memory.ledger import Ledger
from memory.records import now
from memory.schema import api_keys


def key(**given: object) -> ApiKey:
    return ApiKey.model_validate({"name": "ann", "scopes": ["chat"]} | given)


def test_a_key_is_found_by_its_secret_and_by_no_other(ledger: Ledger) -> None:
    made = key(tenant="acme", requests_per_minute=60)
    secret = keys.mint(ledger.database, made)
    assert secret.startswith("sk-ns-")
    assert keys.find(ledger.database, secret) == made
    assert keys.find(ledger.database, secret[:-1]) is None
    assert keys.find(ledger.database, "") is None


def test_secrets_differ_and_are_stored_nowhere(sqlite_ledger: Ledger) -> None:
    made = [keys.mint(sqlite_ledger.database, key()) for _ in range(3)]
    assert len(set(made)) == 3
    with sqlite_ledger.database.reading() as connection:
        stored = " ".join(str(row) for row in connection.execute(select(api_keys)))
    assert not any(secret in stored or secret.removeprefix("sk-ns-") in stored for secret in made)


def test_the_first_key_is_made_once_even_when_it_was_revoked(sqlite_ledger: Ledger) -> None:
    secret = keys.mint_first(sqlite_ledger.database)
    assert secret is not None
    found = keys.find(sqlite_ledger.database, secret)
    assert found is not None
    assert found.scopes == [Scope.ADMIN]
    keys.revoke(sqlite_ledger.database, found.id)
    assert keys.mint_first(sqlite_ledger.database) is None


def test_a_revoked_key_stays_revoked_since_the_first_time(ledger: Ledger) -> None:
    made = key()
    secret = keys.mint(ledger.database, made)
    first = keys.revoke(ledger.database, made.id)
    assert keys.revoke(ledger.database, made.id) == first
    assert not first.usable(now())
    assert keys.find(ledger.database, secret) == first
    with pytest.raises(NotFoundError, match="key_nope"):
        keys.revoke(ledger.database, "key_nope")


def test_a_key_ends_when_it_expires() -> None:
    made = key(expires_at=now() + timedelta(minutes=1))
    assert made.usable(now())
    assert not made.usable(now() + timedelta(minutes=2))


def test_keys_are_listed_in_order_and_by_tenant(sqlite_ledger: Ledger) -> None:
    made = [key(tenant="a"), key(tenant="b"), key(tenant="a")]
    for each in made:
        keys.mint(sqlite_ledger.database, each)
    assert keys.all_keys(sqlite_ledger.database) == made
    assert keys.all_keys(sqlite_ledger.database, ["a"]) == [made[0], made[2]]


def test_an_id_stands_for_one_key(sqlite_ledger: Ledger) -> None:
    made = key()
    keys.mint(sqlite_ledger.database, made)
    for again in (made, key(id=made.id, name="eve")):
        with pytest.raises(ConflictError):
            keys.mint(sqlite_ledger.database, again)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "ann/bob"},
        {"name": "key:ann"},
        {"tenant": "a b"},
        {"scopes": []},
        {"scopes": ["fly"]},
        {"max_concurrent": 0},
    ],
)
def test_what_makes_no_key_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        key(**wrong)
