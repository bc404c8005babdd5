"""Embeddings and models as the official OpenAI client meets them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from memory.embed import MAX_CHARS
from memory.errors import ModelError
from memory.night_records import Generation, GenerationStatus
from serve.wiring import Services
from tests.serve.fakes import running, settings_in


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("embeddings")), lambda _: "Hello.") as started:
        yield started


@pytest.fixture
def client(service: tuple[str, Services]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(service: tuple[str, Services], **change: Any) -> httpx.Response:
    body = json.dumps({"model": "embedder", "input": "a cat"} | change)  # httpx's own JSON holds no half surrogates
    return httpx.post(f"{service[0]}/v1/embeddings", content=body, headers={"content-type": "application/json"})


def test_alike_texts_lie_closer_and_every_vector_has_length_one(client: openai.OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    reply = client.embeddings.create(model="embedder", input=texts)
    cat, kitten, rates = (row.embedding for row in reply.data)
    assert [row.index for row in reply.data] == [0, 1, 2]
    assert math.isclose(sum(x * x for x in cat), 1.0, rel_tol=1e-5)
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, rates, strict=True))


def test_base64_is_what_the_sdk_reads_and_equals_the_floats(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    packed = client.embeddings.create(model="embedder", input="a cat").data[0].embedding
    plain = post(service, encoding_format="float").json()
    assert CreateEmbeddingResponse.model_validate(plain, strict=True).data[0].embedding == pytest.approx(packed)
    assert isinstance(post(service, encoding_format="base64").json()["data"][0]["embedding"], str)


def test_tokens_are_those_of_the_embedders_own_tokenizer(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="embedder", input="unbelievably").usage
    two = client.embeddings.create(model="embedder", input=["unbelievably", "unbelievably"]).usage
    assert one.prompt_tokens > 1
    assert two.total_tokens == 2 * one.total_tokens


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "nightschool"}, 404, "makes no embeddings"),
        ({"input": []}, 400, "1 to 2048"),
        ({"input": ["x"] * 2049}, 400, "1 to 2048"),
        ({"input": ""}, 400, "not empty"),
        ({"input": ["a", None]}, 400, "item 1"),
        ({"input": "x" * (MAX_CHARS + 1)}, 400, "at most"),
        ({"input": [1, 2, 3]}, 400, "token arrays"),
        ({"input": [[1, 2], [3]]}, 400, "token arrays"),
        ({"input": "\ud800"}, 400, "surrogate"),
        ({"dimensions": 64}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"truncate": "END"}, 400, "truncate"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    service: tuple[str, Services], change: dict[str, Any], status: int, said: str
) -> None:
    reply = post(service, **change)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"]


def test_the_embedders_own_dimensions_may_be_asked_for(service: tuple[str, Services]) -> None:
    assert len(post(service, dimensions=256).json()["data"][0]["embedding"]) == 256


def test_an_embedder_that_is_away_is_503(service: tuple[str, Services], monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: object, __: list[str]) -> list[list[float]]:
        raise ModelError("the embedder cannot be reached")

    monkeypatch.setattr(type(service[1].index.embedder), "embed", away)
    assert post(service).status_code == 503


def test_models_are_listed_and_retrieved_with_their_generation(
    client: openai.OpenAI, service: tuple[str, Services]
) -> None:
    rejected = Generation(
        number=1, parent=0, base_model="test/model", adapter_sha256="ab" * 32, status=GenerationStatus.REJECTED
    )
    service[1].ledger.add_generation(rejected)
    names = [model.id for model in client.models.list()]
    assert names == ["nightschool", "champion", "nightschool:gen-0", "nightschool:gen-1", "gen-0", "gen-1", "embedder"]
    for name in names:
        assert client.models.retrieve(name).id == name
    about: Any = client.models.retrieve("nightschool:gen-1").model_extra
    assert about["nightschool"] == {
        "kind": "agent",
        "generation": 1,
        "parent": 0,
        "served_by": f"gen-1@{'ab' * 6}",
        "status": "rejected",
        "base_model": "test/model",
        "adapter_sha256": "ab" * 32,
        "night": None,
    }
    embedder: Any = client.models.retrieve("embedder").model_extra
    assert embedder["nightschool"] == {"kind": "embedder", "embedder": "wordllama", "dimensions": 256}


@pytest.mark.parametrize("name", ["gpt-4", "gen-7", "nightschool:gen-7", "nightschool:", "gen-x"])
def test_a_name_that_is_not_served_is_model_not_found_everywhere(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as retrieved:
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as asked:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert retrieved.value.code == asked.value.code == "model_not_found"
