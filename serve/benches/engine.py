"""`nightschool bench engine | train | swap`: the model server and the trainer, each beside its baseline."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from evals.bench import BenchResult, result
from memory.records import Example, ExampleKind, Task
from serve.settings import Settings

ACTION = r"Action: (calc|finish)\([^\n]{1,60}\)"
CALLS = 32
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


@asynccontextmanager
async def live_engine(settings: Settings, folder: Path) -> AsyncIterator[tuple[Any, Path]]:
    from serve.engine import Engine
    from serve.models import ensure_model

    base = await asyncio.to_thread(ensure_model, settings.model, settings.models_dir, print)
    running = Engine(settings.engine, model=base, data_dir=folder)
    await running.start()
    try:
        await running.wait_ready(900)
        yield running, base
    finally:
        await running.stop()


def engine(settings: Settings) -> BenchResult:
    """Completion tokens/s of the same constrained prompts: by bare HTTP, our client and LiteLLM, and on an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_bench_engine(settings, Path(folder)))


async def _bench_engine(settings: Settings, folder: Path) -> BenchResult:
    import httpx

    from agent.engine_client import EngineClient
    from agent.llm import ChatModel, ChatRequest, LiteLLMModel
    from serve import adapters

    prompts = [[{"role": "user", "content": f"Compute {i} + {i * 7}. Reply with one action."}] for i in range(CALLS)]
    sampling = {"temperature": 0.0, "max_tokens": 40}
    async with live_engine(settings, folder) as (running, base), httpx.AsyncClient(timeout=600) as http:
        await asyncio.to_thread(_random_adapter, settings, base, folder / "adapter", 1)
        await adapters.load(running, "adapter", folder / "adapter")
        client, litellm = EngineClient(running, settings.llm), LiteLLMModel(running, settings.llm)

        async def direct(messages: list[dict[str, Any]], model: str = "base") -> int:
            body = {"model": model, "messages": messages, **sampling, "structured_outputs": {"regex": ACTION}}
            headers = {"Authorization": f"Bearer {running.api_key}"}
            reply = await http.post(f"{running.base_url}/chat/completions", json=body, headers=headers)
            return reply.raise_for_status().json()["usage"]["completion_tokens"]

        def through(seam: ChatModel) -> Callable[[list[dict[str, Any]]], Any]:
            async def call(messages: list[dict[str, Any]]) -> int:
                return (await seam.complete(ChatRequest("base", messages, sampling, ACTION))).completion_tokens or 0

            return call

        async def adapted(messages: list[dict[str, Any]]) -> int:
            return await direct(messages, "adapter")

        async def speed(call: Callable[[list[dict[str, Any]]], Any]) -> float:
            started = time.perf_counter()
            tokens = sum(await asyncio.gather(*(call(messages) for messages in prompts)))
            return tokens / (time.perf_counter() - started)

        ways = {"direct": direct, "client": through(client), "litellm": through(litellm), "adapter": adapted}
        try:
            for way in ways.values():
                await speed(way)
            runs = [{name: await speed(way) for name, way in ways.items()} for _ in range(3)]
        finally:
            await client.close()
    figures: dict[str, float] = {f"{name}_tokens_per_s": round(median(run[name] for run in runs), 1) for name in ways}
    for name in ("client", "litellm", "adapter"):
        figures[f"{name}_over_direct"] = round(median(run[name] / run["direct"] for run in runs), 3)
    figures["concurrent"] = CALLS
    return result("engine", figures, {"client_over_direct": ">= 0.95"})


def _bench_examples(n: int) -> list[Example]:
    from evals.suites import TRAINED_FAMILIES, reasoning_gym_tasks

    return _corrected(reasoning_gym_tasks(TRAINED_FAMILIES, n // len(TRAINED_FAMILIES), 11, source="bench"))


def _corrected(tasks: Sequence[Task]) -> list[Example]:
    from agent.prompts import compose
    from serve.days import correct_value

    return [
        Example(
            recipe="bench",
            kind=ExampleKind.SFT,
            task_id=task.id,
            tools=["calculator"],
            messages=[*compose(task, ["calculator"], None), *better],
        )
        for task in tasks
        if (better := correct_value(task)) is not None
    ]


def train(settings: Settings, steps: int = 4) -> BenchResult:
    """Seconds per token of each profile and of stock TRL on the same rows; the stock script runs between them."""
    from typing import get_args

    from distill.train import launch
    from distill.train.config import Profile, TrainJob
    from serve.models import ensure_model

    base = ensure_model(settings.model, settings.models_dir, print)
    examples = _bench_examples(8 * steps)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "sft.jsonl").write_text("".join(e.model_dump_json() + "\n" for e in examples))
        stock = _stock(settings, base, examples, folder)
        for profile in get_args(Profile):
            config = settings.train.model_copy(update={"profile": profile, "epochs": 1, "checkpoint_steps": 0})
            job = TrainJob(dataset_dir=folder, base_model=base, out_dir=folder / profile, config=config)
            done = launch.run(job, settings.trainer_python, lambda _event: None)
            figures[f"{profile}_tokens_per_s"] = round(done.tokens_per_s, 1)
            figures[f"{profile}_over_stock"] = round(done.tokens_per_s / stock, 2)
            figures[f"{profile}_last_loss"] = round(done.losses["sft"][-1], 4)
    figures["stock_trl_tokens_per_s"] = round(stock, 1)
    return result("train", figures, {"upper-cached_over_stock": ">= 1.5"})


def stock_rows(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The oracle's corrections of the tasks as the conversations a stock script trains on."""
    return _plain(_corrected(tasks))


def _plain(examples: Sequence[Example]) -> list[dict[str, Any]]:
    from agent.codec import wire

    return [{"messages": [{k: m[k] for k in ("role", "content")} for m in wire(e.messages, e.tools)]} for e in examples]


def _stock(settings: Settings, base: Path, examples: list[Example], folder: Path) -> float:
    """Tokens per second of a plain TRL script with all-linear LoRA on the same conversations."""
    import json

    (folder / "rows.json").write_text(json.dumps(_plain(examples)))
    (folder / "stock.py").write_text(STOCK_SCRIPT)
    arguments = [folder / "stock.py", folder / "rows.json", base, folder / "stock", 1, settings.train.learning_rate]
    done = subprocess.run(
        [str(settings.trainer_python), *map(str, arguments)], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout.strip().splitlines()[-1])
    return report["tokens"] / report["seconds"]


def _random_adapter(settings: Settings, base: Path, out: Path, seed: int) -> None:
    """A LoRA with weights that change the answers, made in the trainer's interpreter."""
    script = (
        "import sys, torch\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.manual_seed(int(sys.argv[3]))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        f"config = LoraConfig(r={settings.train.rank}, lora_alpha={settings.train.alpha},\n"
        "    target_modules='all-linear', init_lora_weights=False, task_type='CAUSAL_LM')\n"
        "get_peft_model(model, config).save_pretrained(sys.argv[2])\n"
    )
    arguments = [str(settings.trainer_python), "-c", script, str(base), str(out), str(seed)]
    subprocess.run(arguments, check=True, capture_output=True)
