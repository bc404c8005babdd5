"""`nightschool bench engine`: the model server behind our client, beside bare HTTP and LiteLLM."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from evals.bench import BenchResult, result
from serve.settings import Settings

ACTION = r"Action: (calc|finish)\([^\n]{1,60}\)"
CALLS = 32


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
