"""The offline embedder and the choice by name."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest

from memory.embed import Embedder, load_embedder
from memory.errors import ConfigError, ModelError


def similarity(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_related_texts_are_nearer_than_others_and_all_have_length_one(embedder: Embedder):
    first, near, far = embedder.embed(
        ["How many legs do cows have?", "Count the legs of 3 cows.", "Invert this matrix."]
    )
    assert similarity(first, near) > similarity(first, far)
    assert len(first) == embedder.dimensions == 256
    for vector in (first, near, far):
        assert math.isclose(similarity(vector, vector), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("text", ["", " ", "\x00", "\U0001f600", "日本語", "x" * 100_000])
def test_any_text_has_a_vector_of_length_one(embedder: Embedder, text: str):
    (vector,) = embedder.embed([text])
    assert math.isclose(similarity(vector, vector), 1.0, rel_tol=1e-6)


def test_it_says_the_same_as_wordllamas_own_code(embedder: Embedder, tmp_path: Path):
    import shutil

    import wordllama

    tokenizers = tmp_path / "tokenizers"
    tokenizers.mkdir()
    shutil.copy(Path(wordllama.__file__).parent / "tokenizers" / "l2_supercat_tokenizer_config.json", tokenizers)
    reference = wordllama.WordLlama.load(cache_dir=tmp_path, disable_download=True)
    texts = ["What is 12 * 3?", "A much longer sentence about nothing in particular, at all."]
    for ours, theirs in zip(embedder.embed(texts), reference.embed(texts, norm=True).tolist(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_it_loads_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    # A patch because there is no other way to prove that nothing is fetched.
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_embedder("wordllama", tmp_path).embed(["offline"])


@pytest.mark.parametrize("name", ["", "word2vec", "litellm:", "sentence-transformers"])
def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="expected 'wordllama'"):
        load_embedder(name, tmp_path)


def test_a_remote_embedder_that_cannot_be_reached_is_a_model_error(tmp_path: Path):
    embedder = load_embedder("litellm:no-such-provider/model", tmp_path)
    assert embedder.name == "litellm:no-such-provider/model"
    with pytest.raises(ModelError, match="no-such-provider"):
        embedder.embed(["hello"])
