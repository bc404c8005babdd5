"""`nightschool bench train`: ways to train on the same rows, beside a stock TRL script: how fast, and how good.

The rows are the oracle's corrections of the demo's workloads, without memory; every way trains on them to its end and
is examined on the same held-out tasks by the engine. Resumable: what was trained and examined is kept in
`DATA_DIR/bench/train`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.codec import wire
from agent.prompts import compose
from distill.train.config import TrainConfig
from evals.bench import BenchResult, Figure, result
from evals.gate import pair_outcomes
from evals.stats import paired_difference, wilson
from evals.suites import CALCULATOR, TRAINED_FAMILIES, reasoning_gym_suite, reasoning_gym_tasks
from memory.night_records import Evaluation
from memory.records import Example, ExampleKind, Task
from serve.benches.engine import live_engine
from serve.benches.exams import examine, exams_of, rate
from serve.days import correct_value
from serve.settings import Settings

PER_WORKLOAD = 14
HELD_OUT = 60
"""Tasks of each workload in the exam: five points between two ways can be seen."""
SEED, HELD_OUT_SEED = 2_101, 72_001
STOCK = "stock TRL"
BLOCKS = (10, 16, 20, 30)
"""Trained blocks, from the top, with the head at loss tokens only and what lies below computed once."""
STOCK_SCRIPT = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
import time, torch
rows, base, out = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
epochs, rate = int(sys.argv[4]), float(sys.argv[5])
config = SFTConfig(output_dir=out, per_device_train_batch_size=8, num_train_epochs=epochs, learning_rate=rate,
    report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
    gradient_checkpointing=False, disable_tqdm=True, logging_steps=1)
peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(model=model, processing_class=tokenizer, args=config,
    train_dataset=Dataset.from_list(rows), peft_config=peft)
started = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - started
trainer.save_model(out)
texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
tokens = epochs * sum(len(tokenizer(text)["input_ids"]) for text in texts)
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""


def train(settings: Settings) -> BenchResult:
    """Tokens/s and held-out success of each way, over those of the stock script; the script is timed again at the end,
    so that a machine whose speed drifts shows."""
    from serve.models import ensure_model

    console, folder = Console(), settings.data_dir / "bench" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    base = ensure_model(settings.model, settings.models_dir, print)
    tasks = reasoning_gym_tasks(TRAINED_FAMILIES, PER_WORKLOAD, SEED, source="bench")
    speeds: dict[str, float] = {}
    speeds[STOCK] = stock(settings, base, tasks, folder / "stock", settings.train.epochs)
    for name, config in ways(settings.train).items():
        console.print(f"training: {name}", style="dim", highlight=False)
        speeds[name] = _speed(settings, base, tasks, folder / _slug(name), config)
    again = stock(settings, base, tasks, folder / "stock-again", 1)
    adapters = {name: folder / ("stock" if name == STOCK else _slug(name)) / "adapter" for name in speeds}
    found = asyncio.run(_exams(settings, folder, adapters, tasks, console))
    ours = blocks(settings.train.layers)
    figures: dict[str, Figure] = {f"{STOCK}, again: tokens/s": round(again, 1)}
    for name, speed in speeds.items():
        figures |= _figures(name, speed, speeds[STOCK], found[name], found[STOCK])
    aims = {f"{ours}: tokens/s over stock": ">= 1.5", f"{ours}: points over stock, low": ">= -3"}
    return result("train", figures, {name: aim for name, aim in aims.items() if name in figures})


def ways(config: TrainConfig) -> dict[str, TrainConfig]:
    """Ours by name: the standard profile, and the fast one with more and more blocks; only the settings' SFT."""
    plain = config.model_copy(update={"interpolate": (), "checkpoint_steps": 0})
    counts = sorted({*BLOCKS, config.layers})
    fast = {blocks(n): plain.model_copy(update={"profile": "upper-cached", "layers": n}) for n in counts}
    return {**fast, "standard": plain.model_copy(update={"profile": "standard"})}


def blocks(count: int) -> str:
    """The name of the fast profile that trains so many blocks."""
    return f"{count} blocks"


def corrected(tasks: Sequence[Task]) -> list[Example]:
    """The oracle's corrections of the tasks as examples without memory; tasks that it cannot do are left out."""
    return [
        Example(
            recipe="bench",
            kind=ExampleKind.SFT,
            task_id=task.id,
            tools=[CALCULATOR],
            messages=[*compose(task, [CALCULATOR], None), *better],
        )
        for task in tasks
        if (better := correct_value(task)) is not None
    ]


def stock(settings: Settings, base: Path, tasks: Sequence[Task], folder: Path, epochs: int) -> float:
    """Tokens per second of a plain TRL script, all-linear LoRA, on the tasks' corrections; its adapter lies in
    `folder/adapter`. Done once."""
    finished = folder / "speed.json"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"messages": [{k: m[k] for k in ("role", "content")} for m in wire(e.messages, e.tools)]}
            for e in corrected(tasks)
        ]
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "stock.py").write_text(STOCK_SCRIPT)
        script = [folder / "stock.py", folder / "rows.json", base, folder / "adapter"]
        arguments = map(str, [*script, epochs, settings.train.learning_rate])
        done = subprocess.run([str(settings.trainer_python), *arguments], capture_output=True, text=True, check=True)
        finished.write_text(done.stdout.strip().splitlines()[-1])
    told: dict[str, Any] = json.loads(finished.read_text())
    return told["tokens"] / told["seconds"]


def _speed(settings: Settings, base: Path, tasks: Sequence[Task], folder: Path, config: TrainConfig) -> float:
    """Tokens per second of one of ours; its adapter lies in `folder/adapter`. Done once."""
    from distill.train import launch
    from distill.train.config import SFT_FILE, TrainJob

    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(e.model_dump_json() + "\n" for e in corrected(tasks))
    (folder / SFT_FILE).write_text(lines, encoding="utf-8")
    job = TrainJob(dataset_dir=folder, base_model=base, out_dir=folder / "adapter", config=config)
    return launch.run(job, settings.trainer_python, lambda _event: None).tokens_per_s


async def _exams(
    settings: Settings, folder: Path, adapters: dict[str, Path], tasks: Sequence[Task], console: Console
) -> dict[str, Evaluation]:
    """Every adapter on the same held-out tasks; read back when it was examined before."""
    taught = frozenset(task.fingerprint for task in tasks)
    suite = reasoning_gym_suite(TRAINED_FAMILIES, HELD_OUT, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    kept = {name: adapter.with_name("exam.json") for name, adapter in adapters.items()}
    if missing := [name for name, path in kept.items() if not path.exists()]:
        async with live_engine(settings, folder) as (engine, _):
            for name in missing:
                console.print(f"examining: {name}", style="dim", highlight=False)
                (evaluation,) = await examine(settings, engine, _slug(name), adapters[name], [suite])
                kept[name].write_text(evaluation.model_dump_json())
    return {name: Evaluation.model_validate_json(path.read_text()) for name, path in kept.items()}


def _figures(name: str, speed: float, stock: float, found: Evaluation, plain: Evaluation) -> dict[str, Figure]:
    hits, n = exams_of([found])["held out"]
    low, high = wilson(hits, n)
    told: dict[str, Figure] = {
        f"{name}: tokens/s": round(speed, 1),
        f"{name}: held out": f"{rate((hits, n)):.1%} [{low:.1%}, {high:.1%}] ({hits}/{n})",
    }
    if name == STOCK:
        return told
    pairs = pair_outcomes(plain, found)
    gain = paired_difference(
        [a.success for a, _ in pairs], [b.success for _, b in pairs], strata=[a.workload for a, _ in pairs]
    )
    return {
        **told,
        f"{name}: tokens/s over stock": round(speed / stock, 2),
        f"{name}: points over stock": round(gain.points, 1),
        f"{name}: points over stock, low": round(gain.low, 1),
        f"{name}: points over stock, high": round(gain.high, 1),
        f"{name}: exact p": round(gain.p_value, 4),
    }


def _slug(name: str) -> str:
    return name.replace(" ", "-")
