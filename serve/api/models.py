"""`/v1/models`: the names that a request may ask for, each with the generation behind it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from memory.night_records import Generation
from serve import promotion
from serve.api.auth import Scope, requires
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.CHAT)])
EMBEDDER_MODEL = "embedder"
"""The name under which `/v1/embeddings` serves the configured embedder."""


def model_object(services: Services, name: str) -> dict[str, Any]:
    """OpenAI's `model`, ours under `nightschool`. UnknownModelError for a name that is not served."""
    if name == EMBEDDER_MODEL:
        embedder = services.index.embedder
        created = services.ledger.generation(0).created_at
        about = {"kind": "embedder", "embedder": embedder.name, "dimensions": embedder.dimensions}
        return _object(name, int(created.timestamp()), about)
    with_agent, generation = promotion.resolve(services.ledger, name)
    about = {"kind": "agent" if with_agent else "plain", **_about(generation)}
    return _object(name, int(generation.created_at.timestamp()), about)


def _object(name: str, created: int, about: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "nightschool", "nightschool": about}


def _about(generation: Generation) -> dict[str, Any]:
    return {
        "generation": generation.number,
        "parent": generation.parent,
        "served_by": generation.served_name,
        "status": generation.status,
        "base_model": generation.base_model,
        "adapter_sha256": generation.adapter_sha256,
        "night": generation.night_id,
    }


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """Every name, the agents and plain models of all generations, and the embedder."""
    services: Services = request.app.state.services
    names = [*promotion.model_names(services.ledger), EMBEDDER_MODEL]
    return {"object": "list", "data": [model_object(services, name) for name in names]}


@router.get("/v1/models/{model}")
def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return model_object(request.app.state.services, model)
