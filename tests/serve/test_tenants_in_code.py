"""Routes name the tenant in every read of what users own: the ledger's own filter is optional, for nights."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from memory.ledger import Ledger

API = Path(__file__).parents[2] / "serve" / "api"
OWNED = {"get_task", "get_trajectory", "trajectories", "conversation", "feedback"}
"""The ledger's reads of users' data that a route may use; each takes a tenant."""

NOT_FOR_ROUTES = {
    "tasks",
    "principles",
    "past_runs",
    "get_principle",
    "get_past_run",
    "examples",
    "item_texts",
    "active_texts",
    "set_memory_status",
    "credit_use",
    "set_trust",
}
"""They know no tenant: `memory.shelf` and its like do."""


def untenanted(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not ast.unparse(node.func.value).split(".")[-1].endswith("ledger"):
            continue
        name = node.func.attr
        if name in NOT_FOR_ROUTES or (name in OWNED and "tenant" not in {word.arg for word in node.keywords}):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sorted(API.glob("*.py")), ids=lambda path: path.name)
def test_a_route_reads_users_data_of_a_named_tenant_only(path: Path):
    assert untenanted(path.read_text(encoding="utf-8")) == []


def test_the_check_sees_what_it_is_for():
    assert (
        len(untenanted("services.ledger.get_task(x)\nledger.principles(tenant=t)\nledger.get_task(x, tenant=t)")) == 2
    )
    assert all(hasattr(Ledger, name) for name in OWNED | NOT_FOR_ROUTES)
