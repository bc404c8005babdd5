"""The OpenAPI document, and Schemathesis over it: what is generated from it meets no 5xx and no undocumented reply."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory import keys
from serve.api.document import ERRORS, EXAMPLES
from serve.wiring import Services
from tests.serve.fakes import running, settings_in
from tests.serve.fuzz import fuzz, pupil


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("schema")), pupil) as started:
        yield started


@pytest.fixture(scope="module")
def key(service: tuple[str, Services]) -> str:
    """The secret of an admin key; ignored where keys are off."""
    return keys.mint(service[1].ledger.database, keys.ApiKey(name="schema", scopes=[keys.Scope.ADMIN]))


@pytest.fixture(scope="module")
def document(service: tuple[str, Services]) -> dict[str, Any]:
    return httpx.get(f"{service[0]}/openapi.json").json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_route_of_the_api_documents_its_errors_in_openais_shape(document: dict[str, Any]) -> None:
    routes = [(path, operation) for _, path, operation in operations(document) if path.startswith("/v1/")]
    assert len(routes) > 25
    for path, operation in routes:
        replies = operation["responses"]
        assert "422" not in replies, path
        for status in ERRORS:
            schema = replies[str(status)]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}, path


def test_every_route_says_what_it_replies(document: dict[str, Any]) -> None:
    vague = [
        f"{method} {path}"
        for method, path, operation in operations(document)
        for content in operation["responses"]["200"]["content"].values()
        if not {"$ref", "type"} & set(content["schema"]) or content["schema"].get("additionalProperties") is True
    ]
    assert vague == []


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for (_, path), examples in EXAMPLES.items() for body in examples.values()],
    ids=[f"{path} {name}" for (_, path), examples in EXAMPLES.items() for name in examples],
)
def test_the_examples_of_the_document_work(
    path: str, body: dict[str, Any], service: tuple[str, Services], key: str
) -> None:
    reply = httpx.post(f"{service[0]}{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert reply.status_code == 200, reply.text


def test_generated_requests_meet_no_5xx_and_no_undocumented_reply(
    service: tuple[str, Services], key: str, tmp_path: Path
) -> None:
    report = fuzz(service[0], key, tmp_path, per_operation=8, seed=20261123, phases="examples,fuzzing")
    assert report.failures == [], report.output
    assert report.cases >= 200
