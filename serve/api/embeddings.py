"""`POST /v1/embeddings`: the embedder that memory itself searches with."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, field_validator

from memory.embed import MAX_CHARS, count_tokens
from memory.errors import ConfigError, ModelError, ModelUnavailableError, UnknownModelError
from serve.api.auth import Scope, requires
from serve.api.models import EMBEDDER_MODEL
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.CHAT)])
MAX_INPUTS = 2048


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _input_is_texts(cls, given: Any) -> Any:
        texts = _listed(given)
        if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_INPUTS:
            raise ValueError(f"expected a text or a list of 1 to {MAX_INPUTS} texts")
        for i, text in enumerate(texts):
            if isinstance(text, int | list):
                raise ValueError("token arrays are not supported: send texts")
            if not isinstance(text, str) or not text:
                raise ValueError(f"item {i}: expected a text that is not empty")
            if len(text) > MAX_CHARS:
                raise ValueError(f"item {i}: {len(text)} characters; the embedder reads {MAX_CHARS} at most")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"item {i}: half a surrogate pair is no text")
        return given


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """One vector of length 1 for each text, in order."""
    return await embed(request.app.state.services, body)


async def embed(services: Services, body: EmbeddingRequest) -> dict[str, Any]:
    """The reply to an embeddings request, a batch's as well."""
    if body.model != EMBEDDER_MODEL:
        raise UnknownModelError(f"The model {body.model!r} makes no embeddings; {EMBEDDER_MODEL!r} does")
    return await asyncio.to_thread(_embedded, services, body)


def _embedded(services: Services, body: EmbeddingRequest) -> dict[str, Any]:
    embedder = services.index.embedder
    if body.dimensions not in (None, embedder.dimensions):
        raise ConfigError(f"dimensions: {embedder.name!r} makes {embedder.dimensions} and cannot be shortened")
    texts = _listed(body.input)
    try:
        vectors = embedder.embed(texts)
    except ModelError as exc:
        # The texts were checked: what failed is the embedder, or the way to it.
        raise ModelUnavailableError(str(exc)) from exc
    tokens = count_tokens(embedder, texts)
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    # OpenAI's base64 is of little-endian float32s.
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector
