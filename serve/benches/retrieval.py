"""`nightschool bench retrieval`: which embedder finds the items of a question's own kind, beside BM25."""

from __future__ import annotations

import time

from evals.bench import BenchResult, Figure, result
from evals.labelled import PRINCIPLES, family_sets, gsm8k, word_problems
from evals.retrieval import compare
from memory.embed import Embedder, load_embedder
from memory.errors import NightschoolError
from serve.settings import Settings

EMBEDDERS = ("wordllama", "sentence-transformers:all-MiniLM-L6-v2", "sentence-transformers:BAAI/bge-small-en-v1.5")
"""Compared by `retrieval` where they can be loaded, beside the one in force."""


def retrieval(settings: Settings, per_family: int = 8, problems: int = 255) -> BenchResult:
    """recall@1, recall@5 and MRR of every embedder that can be loaded here, of BM25, and of both together."""
    figures: dict[str, Figure] = {}
    embedders: dict[str, Embedder] = {}
    for name in dict.fromkeys([*EMBEDDERS, settings.embedder]):
        try:
            embedders[name] = load_embedder(name, settings.data_dir / "embedder")
            started = time.perf_counter()
            embedders[name].embed(list(PRINCIPLES.values()))
            figures[f"{name}_ms_per_text"] = round(1000 * (time.perf_counter() - started) / len(PRINCIPLES), 3)
        except NightschoolError as exc:
            embedders.pop(name, None)
            figures[f"{name}_skipped"] = str(exc)
    for labelled in [*family_sets(per_family, per_family), word_problems(problems, problems)]:
        figures |= compare(labelled, embedders)
    folder = settings.data_dir / "bench" / "gsm8k"
    real = gsm8k(folder)
    figures |= compare(real, embedders) if real else {"gsm8k_skipped": f"no train.jsonl and dev.jsonl in {folder}"}
    return result("retrieval", figures, {})
