"""The offline embedder and the choice by name."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from memory.embed import Embedder, load_embedder
from memory.errors import ConfigError, ModelError


def similarity(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_related_texts_are_nearer_than_others_and_all_have_length_one(embedder: Embedder):
    first, near, far = embedder.embed(["How many legs do cows have?", "Count the legs of cows.", "Invert a matrix."])
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
    for ours, theirs in zip(embedder.embed(texts), list(reference.embed(texts, norm=True)), strict=True):
        assert ours == pytest.approx(list(theirs), abs=1e-6)


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


class Endpoint(BaseHTTPRequestHandler):
    """An embedding endpoint that answers out of order, and refuses the text "bad"."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        rows = [{"object": "embedding", "index": i, "embedding": [3.0, float(len(t))]} for i, t in enumerate(texts)]
        reply = {
            "object": "list",
            "model": "tiny",
            "data": rows[::-1],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }
        body = json.dumps(reply).encode()
        self.send_response(400 if texts == ["bad"] else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_litellm_embedder_speaks_to_its_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    embedder = load_embedder("litellm:openai/tiny", tmp_path)
    assert embedder.dimensions == 2
    first, second = embedder.embed(["four", "x" * 10_000])
    assert first == pytest.approx([0.6, 0.8])
    assert math.isclose(similarity(second, second), 1.0)
    with pytest.raises(ModelError, match="'litellm:openai/tiny' failed"):
        embedder.embed(["bad"])
    server.shutdown()
    server.server_close()


def test_a_provider_that_litellm_does_not_know_is_named_when_it_is_loaded(tmp_path: Path):
    with pytest.raises(ConfigError, match="no provider of the embedding model 'nonsense': write 'litellm:PROVIDER"):
        load_embedder("litellm:nonsense", tmp_path)


def test_an_endpoint_that_is_away_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(ModelError, match="'litellm:openai/tiny' failed") as told:
        load_embedder("litellm:openai/tiny", tmp_path).embed(["text"])
    assert "\n" not in str(told.value)


def test_a_package_that_is_not_there_is_told_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # it may well be installed here
    with pytest.raises(ConfigError, match="needs: pip install sentence-transformers"):
        load_embedder("sentence-transformers:any", tmp_path)


STUB = """
class SentenceTransformer:
    def __init__(self, name, cache_folder, local_files_only=False):
        if name != "here" and local_files_only:
            raise OSError("not on this disk")
        if name != "here":
            raise AssertionError("it went on to the hub, which it would ask for minutes")

    def encode(self, texts):
        import numpy
        return numpy.array([[3.0, 4.0] for _ in texts])
"""


@pytest.fixture
def sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the package, which brings torch: it loads "here" from the disk and would fetch everything else."""
    (tmp_path / "sentence_transformers.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)


@pytest.mark.usefixtures("sentence_transformers")
def test_a_model_on_the_disk_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    embedder = load_embedder("sentence-transformers:here", tmp_path)
    assert embedder.dimensions == 2
    assert embedder.embed(["a", "b"]) == [pytest.approx([0.6, 0.8])] * 2


@pytest.mark.usefixtures("sentence_transformers")
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"the hub http://127\.0\.0\.1:9 cannot be reached") as told:
        load_embedder("sentence-transformers:elsewhere", tmp_path)
    assert time.monotonic() - began < 60
    assert "\n" not in str(told.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids"):
        load_embedder("sentence-transformers:elsewhere", tmp_path)
