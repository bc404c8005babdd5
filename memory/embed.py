"""Embedders: texts to unit vectors.

Owns the choice by name and the offline default. Owns no storage of vectors (`memory.index`).

Not covered: text beyond `MAX_CHARS` is not read (a static embedding of a whole book says little).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from memory.errors import ConfigError, ModelError, boundary

MAX_CHARS = 8192
DEFAULT = "wordllama"
HUB_TIMEOUT_S = 5.0


class Embedder(Protocol):
    """Turns texts into vectors that can be compared by their dot product."""

    @property
    def name(self) -> str:
        """What made the vectors: an index of one name is useless to another."""
        ...

    @property
    def dimensions(self) -> int:
        """Length of every vector."""
        ...

    def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector of length 1 for each text, in order. Raises `ModelError`."""
        ...


def load_embedder(name: str, cache_dir: Path) -> Embedder:
    """The embedder of that name.

    `wordllama`: bundled static embeddings, offline. `litellm:MODEL`: an embedding endpoint.
    `sentence-transformers:NAME`: a model of that library, kept under `cache_dir`.
    Raises `ConfigError` for an unknown name or provider, a package that is not installed, or a model that cannot be
    had. An endpoint is called only when something is embedded.
    """
    family, _, model = name.partition(":")
    if name == DEFAULT:
        return _word_llama()
    if family == "litellm" and model:
        return _Remote(name, _litellm(model))
    if family == "sentence-transformers" and model:
        return _Remote(name, _sentence_transformers(model, cache_dir))
    known = "'wordllama', 'litellm:MODEL' or 'sentence-transformers:NAME'"
    raise ConfigError(f"unknown embedder {name!r}: expected {known}")


def count_tokens(embedder: Embedder, texts: list[str]) -> int:
    """Tokens of the texts by the embedder's own tokenizer; words, for one that keeps its tokenizer to itself."""
    if isinstance(embedder, WordLlamaEmbedder):
        return embedder.tokens(texts)
    return sum(len(text.split()) for text in texts)


class WordLlamaEmbedder:
    """Mean of static token vectors (WordLlama), read from the installed wheel: no network, no torch."""

    def __init__(self, tokenizer: Any, vectors: Any) -> None:
        self._tokenizer = tokenizer
        self._vectors = vectors

    @property
    def name(self) -> str:
        """`wordllama`."""
        return DEFAULT

    @property
    def dimensions(self) -> int:
        """256 for the wheel's weights."""
        return int(self._vectors.shape[1])

    def tokens(self, texts: list[str]) -> int:
        """Tokens that `embed` would read."""
        encodings = self._tokenizer.encode_batch([text[:MAX_CHARS] for text in texts], add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)

    def embed(self, texts: list[str]) -> list[list[float]]:
        """About 0.2 ms a text."""
        if not texts:
            return []
        cut = [text[:MAX_CHARS] for text in texts]
        with boundary(ModelError, "WordLlama could not embed"):
            encodings = self._tokenizer.encode_batch(cut, add_special_tokens=False)
            return [_unit(self._mean(encoding.ids), self.dimensions) for encoding in encodings]

    def _mean(self, ids: list[int]) -> list[float]:
        return self._vectors[ids].mean(axis=0).tolist() if ids else []


def _word_llama() -> WordLlamaEmbedder:
    # WordLlama's own loader looks for its tokenizer in a folder that the wheel names differently and
    # then asks a model hub for it; the two files are all that it needs.
    found = importlib.util.find_spec("wordllama")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the embedder 'wordllama' is not installed: pip install wordllama")
    folder = Path(found.submodule_search_locations[0])
    with boundary(ConfigError, f"the wordllama package in {folder} lacks its weights or tokenizer"):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        weights = load_file(folder / "weights" / "l2_supercat_256.safetensors")
        return WordLlamaEmbedder(tokenizer, weights["embedding.weight"].astype("float32"))


class _Remote:
    """An embedder behind a function whose dimensions show only when it is called."""

    def __init__(self, name: str, function: Callable[[list[str]], list[Sequence[float]]]) -> None:
        self.name = name
        self._function = function
        self._dimensions: int | None = None

    @property
    def dimensions(self) -> int:
        if self._dimensions is None:
            self._dimensions = len(self.embed(["dimensions"])[0])
        return self._dimensions

    def embed(self, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        with boundary(ModelError, f"the embedder {self.name!r} failed"):
            vectors = self._function([text[:MAX_CHARS] or " " for text in texts])
            if len(vectors) != len(texts):
                raise ModelError(f"the embedder {self.name!r} gave {len(vectors)} vectors for {len(texts)} texts")
            return [_unit(vector, len(vector)) for vector in vectors]


def _litellm(model: str) -> Callable[[list[str]], list[Sequence[float]]]:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import fetches a price list
    import litellm

    litellm.suppress_debug_info = True  # else it prints advice beside every error
    try:
        litellm.get_llm_provider(model)
    except Exception as exc:
        raise ConfigError(
            f"LiteLLM knows no provider of the embedding model {model!r}: write 'litellm:PROVIDER/MODEL'"
        ) from exc

    def call(texts: list[str]) -> list[Sequence[float]]:
        reply: Any = litellm.embedding(model=model, input=texts, num_retries=2, timeout=30)
        return [row["embedding"] for row in sorted(reply.data, key=lambda row: row["index"])]

    return call


def _sentence_transformers(model: str, cache_dir: Path) -> Callable[[list[str]], list[Sequence[float]]]:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(f"the embedder 'sentence-transformers:{model}' needs: pip install sentence-transformers")
    with boundary(ConfigError, f"the sentence-transformers model {model!r} cannot be loaded"):
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

        encoder: Any
        try:
            # What is on the disk needs no hub; one that is away would be asked again for minutes.
            encoder = SentenceTransformer(model, cache_folder=str(cache_dir), local_files_only=True)
        except Exception:
            _reach_the_hub(model, cache_dir)
            encoder = SentenceTransformer(model, cache_folder=str(cache_dir))
    return lambda texts: encoder.encode(texts).tolist()


def _reach_the_hub(model: str, cache_dir: Path) -> None:
    """ConfigError, soon, when nothing can be fetched."""
    import httpx
    from huggingface_hub import constants

    missing = f"the sentence-transformers model {model!r} is not in {cache_dir}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{missing}, and HF_HUB_OFFLINE forbids fetching it")
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError as exc:
        raise ConfigError(
            f"{missing}, and the hub {constants.ENDPOINT} cannot be reached ({type(exc).__name__}): put it there, "
            f"or use {DEFAULT!r}, which needs no network"
        ) from exc


def _unit(vector: Sequence[float], dimensions: int) -> list[float]:
    """The vector at length 1; one that has no direction becomes the first axis, as every such text does."""
    length = math.sqrt(sum(x * x for x in vector))
    if length == 0.0 or not math.isfinite(length):
        return [1.0] + [0.0] * (dimensions - 1)
    return [x / length for x in vector]
