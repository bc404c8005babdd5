"""`docs/api.md` names every endpoint, every request field and every error code that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serve.api import batches, embeddings, errors, feedback, fine_tuning, generations, keys, knowledge, memory
from serve.api.app import ROOMS
from serve.api.openai_types import ChatCompletionRequest, Extension
from serve.api.response_types import ResponseRequest
from serve.batch_lines import ENDPOINTS

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
PROSE = re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)
NAMED = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`[^`]+`", PROSE))))
"""Every word that stands in code marks, outside of examples."""


def routes() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        router: APIRouter = room.router
        for route in router.routes:
            assert isinstance(route, APIRoute)
            yield from ((method, route.path) for method in route.methods or ())


@pytest.mark.parametrize(("method", "path"), sorted(routes()))
def test_every_endpoint_is_in_the_table(method: str, path: str) -> None:
    rows = [row for row in DOCS.split("## Models")[0].splitlines() if row.startswith("| `")]
    mine = [row for row in rows if re.search(rf"{re.escape(path)}[`,]", row)]
    assert any(f"`{method}" in row for row in mine), f"{method} {path}"


@pytest.mark.parametrize(
    "model",
    [
        ChatCompletionRequest,
        Extension,
        ResponseRequest,
        embeddings.EmbeddingRequest,
        batches.BatchRequest,
        fine_tuning.JobRequest,
        fine_tuning.DpoHyperparameters,
        feedback.FeedbackRequest,
        feedback.TrustRequest,
        generations.EvaluationRequest,
        generations.PromotionRequest,
        keys.KeyRequest,
        memory.NewPrinciple,
        memory.Rewording,
        memory.Reason,
        memory.SearchRequest,
        memory.ReindexRequest,
        memory.ForgetRequest,
        knowledge.KnowledgeSearch,
    ],
)
def test_every_field_of_a_request_is_named(model: type[BaseModel]) -> None:
    fields = {info.alias or name for name, info in model.model_fields.items()}
    assert fields - NAMED == set()


def test_every_error_code_is_listed() -> None:
    codes = {code for _, _, code in errors._STATUS.values() if code} | set(errors._HTTP_CODES.values())
    assert codes - NAMED == set()


def test_every_endpoint_of_a_batch_is_named() -> None:
    said = DOCS.split("## Batches")[1].split("\n## ")[0]
    assert [endpoint for endpoint in ENDPOINTS if f"`{endpoint}`" not in said] == []
