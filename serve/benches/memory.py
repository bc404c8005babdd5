"""The benchmarks of memory: `nightschool bench retrieval | recall | usefulness`.

Owns what is compared with what. The labelled sets and rankings are in `evals.labelled` and `evals.retrieval`, the
stores under load in `serve.benches.store` (ours) and `evals.peers` (mem0, LangMem; in an environment of their own).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Any

from agent.run import ModelRef
from agent.state import AgentDeps
from evals.bench import BenchResult, Figure, result
from evals.labelled import FAMILIES, PRINCIPLES, family_sets, gsm8k, word_problems
from evals.load import percentile
from evals.peers.worker import ANSWER
from evals.retrieval import compare
from evals.runner import evaluate
from evals.stats import paired_difference, wilson
from evals.suites import TRAINED_FAMILIES, Suite, reasoning_gym_suite, reasoning_gym_tasks
from memory.embed import Embedder, load_embedder
from memory.errors import ConfigError, EngineError, NightschoolError, boundary
from memory.index import Index, drain
from memory.ledger import Ledger
from memory.night_records import Evaluation
from memory.recall import Memory, Recall, RecallConfig, Recaller, estimate_tokens
from memory.records import MemoryStatus, PastRun, Principle, PrincipleKind, Task
from serve.engine import ROOT
from serve.settings import Settings

EngineOf = Callable[[Settings, Path], AbstractAsyncContextManager[tuple[Any, Path]]]
"""The real engine, running, with the base model's folder."""

EMBEDDERS = ("wordllama", "sentence-transformers:all-MiniLM-L6-v2", "sentence-transformers:BAAI/bge-small-en-v1.5")
"""Compared by `retrieval` where they can be loaded, beside the one in force."""

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
FORMS = {
    "principle": RecallConfig(runs=0, principles=1),
    "two_principles": RecallConfig(runs=0, principles=2),
    "run_and_principle": RecallConfig(runs=1, principles=1),
    "one_run": RecallConfig(runs=1, principles=0),
}
"""What `usefulness` shows the model instead of the settings' choice: which form helps which model is measured."""
TIE = 1e-4
"""Texts whose similarity is as near to the last of the exact answer are as right as that one."""


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


class AllMemory:
    """A `Recaller` that recalls everything, whatever the question, as far as it fits."""

    def __init__(self, ledger: Ledger, tenant: str, token_budget: int) -> None:
        everything = [
            *ledger.principles(tenant, MemoryStatus.ACTIVE),
            *ledger.past_runs(tenant, MemoryStatus.ACTIVE),
        ]
        random.Random(0).shuffle(everything)  # what does not fit is of no kind in particular
        self._recall, left = Recall(), token_budget
        for item in everything:
            tokens = estimate_tokens(item)
            if tokens <= left:
                left -= tokens
                kept: list[Any] = self._recall.principles if isinstance(item, Principle) else self._recall.runs
                kept.append(item)

    def recall(self, task: Task, **_: Any) -> Recall:
        """The same for every task."""
        return self._recall


async def compare_memories(
    ledger: Ledger,
    ours: Recaller,
    suite: Suite,
    model: ModelRef,
    deps: AgentDeps,
    *,
    context: int,
    concurrency: int,
    forms: Mapping[str, Recaller] | None = None,
) -> dict[str, Figure]:
    """Held-out success without memory, with all of it and with what recall chooses, and the paired differences.

    `forms`: recallers that show other kinds of items than `ours`. `context`: tokens of prompt and answer together.
    Raises as `evals.runner.evaluate`.
    """
    # Room for the system prompt, the question and every turn; the estimate of an item's tokens is a rough one.
    room = max(0, int(0.8 * (context - 300 - deps.config.max_turns * deps.config.max_tokens)))
    arms: dict[str, Recaller | None] = {
        "none": None,
        "all": AllMemory(ledger, suite.tasks[0].task.tenant, room),
        "ours": ours,
        **(forms or {}),
    }
    done: dict[str, Evaluation] = {}
    for arm, recaller in arms.items():
        armed = deps if recaller is None else replace(deps, recaller=recaller)
        done[arm], _ = await evaluate(
            suite,
            model,
            armed,
            memory=recaller is not None,
            memory_watermark=ledger.memory_watermark(),
            concurrency=concurrency,
            on_progress=lambda _done, _total: None,
        )
    figures: dict[str, Figure] = {"tasks": len(suite.tasks), "items": ledger.count_active(), "context": context}
    for arm, evaluation in done.items():
        hits, n = sum(outcome.success for outcome in evaluation.outcomes), len(evaluation.outcomes)
        low, high = wilson(hits, n)
        figures[f"{arm}_success"] = f"{hits / n:.0%} [{low:.0%}, {high:.0%}] ({hits}/{n})"
        figures[f"{arm}_prompt_tokens_per_task"] = round(sum(o.prompt_tokens for o in evaluation.outcomes) / n)
        figures[f"{arm}_seconds"] = round(evaluation.seconds, 1)
    workloads = [outcome.workload for outcome in done["ours"].outcomes]
    for other in [arm for arm in arms if arm != "ours"]:
        theirs, mine = ([o.success for o in done[arm].outcomes] for arm in (other, "ours"))
        gain = paired_difference(theirs, mine, strata=workloads)
        figures[f"ours_over_{other}_points"] = round(gain.points, 1)
        figures[f"ours_over_{other}_interval"] = f"[{gain.low:+.1f}, {gain.high:+.1f}], p {gain.p_value:.3f}"
    return figures


def fill_memory(ledger: Ledger, taught: Sequence[Task]) -> None:
    """What a day of corrections leaves behind: a past run for each task that the oracle solves, and the principles."""
    from serve.days import correct_value

    for task in taught:
        if (better := correct_value(task)) is not None:
            messages = [{"role": "user", "content": task.question}, *better]
            ledger.add_past_run(PastRun(task_id=task.id, workload=task.workload, messages=messages))
    for workload in dict.fromkeys(task.workload for task in taught):
        ledger.add_principle(
            Principle(kind=PrincipleKind.GUIDING, workload=workload, text=PRINCIPLES[workload], sources=[])
        )


def usefulness(settings: Settings, engine: EngineOf, taught: int = 7, held_out: int = 12) -> BenchResult:
    """The base model on the real engine: no memory, all memory, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_usefulness(settings, engine, Path(folder), taught, held_out))


async def _usefulness(settings: Settings, engine: EngineOf, folder: Path, taught: int, held_out: int) -> BenchResult:
    from agent.engine_client import EngineClient

    tasks = reasoning_gym_tasks(TRAINED_FAMILIES, taught, 101, source="bench")
    known = frozenset(task.fingerprint for task in tasks)
    suite = reasoning_gym_suite(TRAINED_FAMILIES, held_out, 70_001, "held_out", "held_out", exclude=known)
    with ExitStack() as stack:
        ledger = Ledger.open(f"sqlite:///{folder / 'ledger.sqlite'}")
        stack.callback(ledger.close)
        fill_memory(ledger, tasks)
        index = Index.open(folder / "index", load_embedder(settings.embedder, folder / "embedder"))
        stack.callback(index.close)
        drain(ledger, index)
        async with engine(settings, folder) as (running, _base):
            llm = EngineClient(running, settings.llm)
            try:
                figures = await compare_memories(
                    ledger,
                    Memory(ledger, index, settings.recall),
                    suite,
                    ModelRef(0, "base"),
                    AgentDeps(llm=llm, config=settings.agent),
                    context=settings.engine.max_model_len,
                    concurrency=settings.night.concurrency,
                    forms={name: Memory(ledger, index, config) for name, config in FORMS.items()},
                )
            finally:
                await llm.close()
    return result("usefulness", figures, {"ours_over_none_points": "> 0", "ours_over_all_points": "> 0"})
