"""`nightschool bench`: the registry of the benchmarks that need the composed service.

Each puts its baseline beside it in the same run and reports ratios: machines are noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.bench import Bench, registry
from evals.power import gate_bench
from serve.benches import (
    ablation,
    agent,
    curve,
    engine,
    escalation,
    front,
    recall,
    retrieval,
    second_night,
    swap,
    train,
    usefulness,
)
from serve.settings import Settings


def benches(settings: Settings, data: Path | None = None, arms: Sequence[str] = ()) -> dict[str, Bench]:
    """The benchmarks by name. `data`: a folder of real tasks, for those that read one. `arms`: for those with some."""
    return registry(
        Bench(
            "engine",
            "tokens/s through our client against direct calls to vLLM",
            lambda: lambda: engine.engine(settings),
        ),
        Bench(
            "train",
            "tokens/s and held-out success of each way to train against a stock TRL script (an hour)",
            lambda: lambda: train.train(settings),
        ),
        Bench(
            "gateway",
            "latency added by the plain-model path, against LiteLLM's proxy",
            lambda: lambda: front.gateway(settings),
        ),
        Bench(
            "batch",
            "lines/s of a 10,000-line batch against a fake upstream, and peak memory",
            lambda: lambda: front.batch(settings),
        ),
        Bench(
            "agent",
            "tokens/s of a load through the agent against its own calls sent straight to vLLM",
            lambda: lambda: agent.agent(settings, engine.live_engine),
        ),
        Bench(
            "retrieval",
            "recall@1, @5 and MRR of every embedder, BM25 and both together, on labelled questions",
            lambda: lambda: retrieval.retrieval(settings),
        ),
        Bench(
            "recall",
            "latency, writes/s and size of memory at 1k, 10k and 100k items, beside mem0 and LangMem",
            lambda: lambda: recall.recall(settings),
        ),
        Bench(
            "usefulness",
            "held-out success of the base model without memory, with all of it, and with ours",
            lambda: lambda: usefulness.usefulness(settings, engine.live_engine),
        ),
        Bench(
            "gate",
            "how often the gate promotes sound adapters and planted defects, simulated at the demo's sizes",
            lambda: gate_bench,
        ),
        Bench(
            "swap",
            "seconds to load, prove and unload an adapter; 20 switches and a rollback by the watch under 16 clients",
            lambda: lambda: swap.swap(settings),
        ),
        Bench(
            "curve",
            "five nights on six workloads, unattended: success, forgetting and prompt tokens night by night (an hour)",
            lambda: lambda: curve.curve(settings),
        ),
        Bench(
            "arrivals",
            "five nights on workloads that come one after the other: learning without forgetting (an hour)",
            lambda: lambda: curve.arrivals(settings),
        ),
        Bench(
            "ablation",
            "one night in many variants (--arm NAME) on the same day and exam, beside stock TRL (two hours)",
            lambda: lambda: ablation.ablation(settings, arms),
        ),
        Bench(
            "forgetting",
            "a second night on other workloads in variants (--arm NAME), and what it keeps of the first (an hour)",
            lambda: lambda: second_night.forgetting(settings, arms),
        ),
        Bench(
            "samples",
            "held-out success by the number of corrections, after one night each (half an hour)",
            lambda: lambda: ablation.samples(settings),
        ),
        Bench(
            "escalation",
            "how often each generation needs the teacher, where nobody but the teacher corrects (half an hour)",
            lambda: lambda: escalation.escalation(settings),
        ),
        Bench(
            "gsm8k",
            "base, night 1 and night 2 on real word problems with the calculator (--data FOLDER)",
            lambda: lambda: curve.gsm8k(settings, data),
        ),
    )
