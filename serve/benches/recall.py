"""`nightschool bench recall`: our memory beside mem0 and LangMem, each a process over the same texts.

The stores under load are `serve.benches.store` (ours) and `evals.peers` (theirs, in an environment of their own).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Any

from evals.bench import BenchResult, Figure, result
from evals.labelled import FAMILIES
from evals.load import percentile
from evals.peers.worker import ANSWER
from memory.embed import load_embedder
from memory.errors import ConfigError, EngineError, boundary
from serve.engine import ROOT
from serve.settings import Settings

PEERS = ("mem0ai==2.2.1", "langmem==0.0.30", "chromadb==1.5.9", "wordllama==0.4.0.post1", "tokenizers", "safetensors")
"""What is measured against, with what their runner scripts need."""

STORED_FAMILIES = (
    *("gsm_symbolic", "chain_sum", "products", "gcd", "lcm", "basic_arithmetic", "leg_counting", "bitwise_arithmetic"),
    *("decimal_arithmetic", "word_sorting", "time_intervals", "base_conversion", "calendar_arithmetic"),
    *("complex_arithmetic", "count_primes", "number_filtering", "number_sorting", "syllogism", "letter_counting"),
)
"""Kinds of questions that `recall` stores: those that have many different ones and make them fast."""

ASKED_SEED = 50_000_000
"""Far from the stored texts' seed: reasoning-gym adds a question's number to it."""

SIZES = (1_000, 10_000, 100_000)
ROUNDS = 3
QUERIES = 200
WRITES = 100
K = 5
FILL_S = 360.0
"""Filling time of each store, over all sizes: one that is not full by then is measured as full as it is, and the
figures say how full that was. Four stores and the rebuild end within half an hour."""

ADD_S = 60.0
SEARCH_S = 10.0
TIE = 1e-4
"""Texts whose similarity is as near to the last of the exact answer are as right as that one."""


@dataclass
class Contender:
    """A store in its own process, and what was measured of it at one size after the other."""

    name: str
    process: Popen[str]
    folder: Path
    log: Path
    left_s: float = FILL_S
    """Filling time; at 0 it is not asked to hold more."""
    stored: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def do(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for what it says. EngineError, with the log's end, when it died."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it died: `answer` tells
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer among whatever its libraries print."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        tail = self.log.read_text(errors="replace").strip()[-500:]
        raise EngineError(f"the store {self.name!r} ended with {self.process.wait()}: {tail}")


def recall(
    settings: Settings,
    sizes: Sequence[int] = SIZES,
    peers: Sequence[str] = ("mem0", "mem0_chroma", "langmem"),
    rounds: int = ROUNDS,
    queries: int = QUERIES,
    fill_s: float = FILL_S,
    search_s: float = SEARCH_S,
) -> BenchResult:
    """Speed and size of recall beside mem0 and LangMem: same texts, same embedder, no LLM, in rounds that alternate."""
    texts = _texts(max(sizes))
    stored = set(texts)  # a prompt is never shown its own question, so ours would leave it out
    asked = [text for text in _texts(2 * queries, seed=ASKED_SEED) if text not in stored][:queries]
    exact = _Exact(texts, asked, settings)
    figures: dict[str, Figure] = {"queries": len(asked), "rounds": rounds, "k": K}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        given = folder / "texts.json"
        given.write_text(json.dumps({"texts": texts, "queries": asked}))
        contenders = [stack.enter_context(_contender(name, given, folder, fill_s)) for name in ("ours", *peers)]
        for each in contenders:
            figures[f"{each.name}_empty_rss_mib"] = _rss_mib(each)
        for size in sizes:
            for each in contenders:
                figures |= _grow(each, size)
                print(f"{each.name}: {each.stored} of {size} stored", file=sys.stderr)
                each.rounds.clear()
            for _ in range(rounds):
                for each in contenders:
                    each.rounds.append(each.do(do="search", k=K, budget_s=search_s))
            figures |= (speed := _speed(contenders, size, exact))
            print("\n".join(f"{figure}: {value}" for figure, value in speed.items()), file=sys.stderr)
        print("rebuilding ours", file=sys.stderr)
        rebuilt = contenders[0].do(do="rebuild")
        figures[f"ours_rebuild_s_at_{max(sizes)}"] = round(rebuilt["seconds"], 2)
        figures["ours_rebuild_per_s"] = round(max(sizes) / rebuilt["seconds"])
    top = max(sizes)
    aims = {f"ours_p99_ms_at_{top}": "< 15", f"ours_recall@{K}_at_{top}": ">= 0.99"}
    aims |= {f"{name}_p50_over_ours_at_{top}": ">= 5" for name in peers}
    return result("recall", figures, aims)


def _texts(n: int, seed: int = 6) -> list[str]:
    """`n` different questions of `STORED_FAMILIES`, mixed; the last family fills up what the others lack."""
    import reasoning_gym

    found: dict[str, None] = {}
    share = n // len(STORED_FAMILIES) + 1
    for family in STORED_FAMILIES:
        wanted = n if family == STORED_FAMILIES[-1] else min(len(found) + share, n)
        with boundary(ConfigError, f"reasoning-gym cannot make questions of {family!r}"):
            made: Any = reasoning_gym.create_dataset(family, size=10 * n, seed=seed, **FAMILIES.get(family, {}))
            for i in range(2 * (wanted - len(found)) + 100):
                if len(found) == wanted:
                    break
                found[" ".join(made[i]["question"].split())] = None
    texts = list(found)
    random.Random(seed).shuffle(texts)
    return texts[:n]


class _Exact:
    """The exact answer to every query, to check the stores' against."""

    def __init__(self, texts: list[str], asked: list[str], settings: Settings) -> None:
        import numpy as np

        embedder = load_embedder("wordllama", settings.data_dir / "embedder")
        self._texts = np.concatenate(
            [np.array(embedder.embed(texts[i : i + 1000]), dtype=np.float32) for i in range(0, len(texts), 1000)]
        )
        self._asked = np.array(embedder.embed(asked), dtype=np.float32)

    def recall(self, found: list[list[int]], stored: int) -> float:
        """Share of the exact `K` best among the first `stored` texts that were found; ties count as found."""
        import numpy as np

        right = 0
        for query, positions in zip(self._asked, found, strict=False):
            similarities = self._texts[:stored] @ query
            last = np.partition(similarities, -K)[-K]
            right += sum(similarities[position] >= last - TIE for position in positions[:K])
        return float(right / (K * len(found)))


@contextmanager
def _contender(name: str, given: Path, folder: Path, fill_s: float) -> Iterator[Contender]:
    commands = {
        "ours": ["serve.benches.store"],
        "mem0": ["evals.peers.mem0_store", "qdrant"],
        "mem0_chroma": ["evals.peers.mem0_store", "chroma"],
        "langmem": ["evals.peers.langmem_store"],
    }
    module, *rest = commands[name]
    python = sys.executable if name == "ours" else _peers_env() / "bin" / "python"
    home, log = folder / name, folder / f"{name}.log"
    home.mkdir()
    with log.open("w") as errors:
        process = Popen(
            [str(python), "-m", module, str(given), *rest],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    contender = Contender(name, process, home, log, fill_s)
    try:
        contender.answer()
        yield contender
    finally:
        process.kill()
        process.wait()


def _grow(each: Contender, size: int) -> dict[str, Figure]:
    """Fill up to the size, the last few one by one, each searchable before the next."""
    name, figures, before = each.name, {}, each.stored
    if each.left_s > 0:
        filled = each.do(do="fill", upto=size - WRITES, budget_s=each.left_s)
        each.stored = filled["stored"]
        figures[f"{name}_bulk_writes_per_s_at_{size}"] = round((each.stored - before) / filled["seconds"])
        added = each.do(do="add", upto=each.stored + WRITES, budget_s=ADD_S)
        figures[f"{name}_writes_per_s_at_{size}"] = round((added["stored"] - each.stored) / added["seconds"], 1)
        each.stored = added["stored"]
        each.left_s = each.left_s - filled["seconds"] if each.stored == size else 0.0
    figures[f"{name}_stored_at_{size}"] = each.stored
    figures[f"{name}_rss_mib_at_{size}"] = _rss_mib(each)
    kept = sum(file.stat().st_size for file in each.folder.rglob("*") if file.is_file())
    return figures | {f"{name}_disk_mib_at_{size}": round(kept / 2**20, 1)}


def _speed(contenders: Sequence[Contender], size: int, exact: _Exact) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    ours = contenders[0].rounds
    for each in contenders:
        for p in (50, 99):
            every = [ms for one in each.rounds for ms in one["ms"]]
            figures[f"{each.name}_p{p}_ms_at_{size}"] = round(percentile(every, p / 100), 2)
            if each is not contenders[0]:
                ratios = [
                    percentile(theirs["ms"], p / 100) / percentile(mine["ms"], p / 100)
                    for mine, theirs in zip(ours, each.rounds, strict=True)
                ]
                figures[f"{each.name}_p{p}_over_ours_at_{size}"] = round(median(ratios), 2)
        cpu = sum(one["cpu_ms"] for one in each.rounds) / sum(len(one["ms"]) for one in each.rounds)
        figures[f"{each.name}_cpu_ms_at_{size}"] = round(cpu, 2)
        figures[f"{each.name}_recall@{K}_at_{size}"] = round(exact.recall(each.rounds[0]["found"], each.stored), 4)
    return figures


def _rss_mib(each: Contender) -> int:
    import psutil

    return round(psutil.Process(each.process.pid).memory_info().rss / 2**20)


def _peers_env() -> Path:
    """The peers' own environment, made at the first use: their dependencies are not ours."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nightschool" / f"memory-peers-{hashlib.sha256(' '.join(PEERS).encode()).hexdigest()[:12]}"
    if (folder / "complete").exists():
        return folder
    print(f"installing {', '.join(PEERS)} from PyPI into {folder} (once, some 600 MB)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    uv = shutil.which("uv")
    make = [uv, "venv", "-q", "--python", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder]
    install = [uv, "pip", "install", "-q", "--python", folder / "bin" / "python"] if uv else None
    for command in (make, [*(install or [folder / "bin" / "pip", "install", "-q"]), *PEERS]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"mem0 and LangMem cannot be installed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return folder
