"""Stored replies of the Responses API, on SQLite and on PostgreSQL."""

from __future__ import annotations

from typing import Any

import pytest

from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.responses import StoredResponse, add_response, delete_response, get_response


def stored(**change: Any) -> StoredResponse:
    fields: dict[str, Any] = {
        "id": "resp_1",
        "tenant": "acme",
        "trajectory_id": "traj_1",
        "conversation_id": "resp_1",
        "items": [{"type": "message", "role": "user"}],
        "reply": {"id": "resp_1", "output": []},
    }
    return StoredResponse(**fields | change)


def test_a_reply_comes_back_as_it_went_in(ledger: Ledger):
    add_response(ledger.database, stored())
    assert get_response(ledger.database, "resp_1", tenant="acme") == stored()


def test_the_same_reply_twice_is_one_and_another_under_its_id_is_a_conflict(ledger: Ledger):
    add_response(ledger.database, stored())
    add_response(ledger.database, stored())
    with pytest.raises(ConflictError):
        add_response(ledger.database, stored(reply={}))


def test_another_tenants_reply_is_not_there(ledger: Ledger):
    add_response(ledger.database, stored())
    with pytest.raises(NotFoundError):
        get_response(ledger.database, "resp_1", tenant="rival")
    with pytest.raises(NotFoundError):
        delete_response(ledger.database, "resp_1", tenant="rival")
    assert get_response(ledger.database, "resp_1", tenant="acme").id == "resp_1"


def test_a_deleted_reply_is_gone_and_the_others_stay(ledger: Ledger):
    add_response(ledger.database, stored())
    add_response(ledger.database, stored(id="resp_2"))
    delete_response(ledger.database, "resp_1", tenant="acme")
    with pytest.raises(NotFoundError):
        get_response(ledger.database, "resp_1", tenant="acme")
    with pytest.raises(NotFoundError):
        delete_response(ledger.database, "resp_1", tenant="acme")
    assert get_response(ledger.database, "resp_2", tenant="acme").id == "resp_2"
