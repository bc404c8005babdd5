"""The real vLLM: it starts, answers, survives its own death, and serves a real adapter.

Needs `make setup`; see conftest.py for the variables that name another engine or model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.train.proof import read_proof, write_proof
from memory.errors import EngineError
from memory.night_records import Generation, GenerationStatus
from serve.adapters import Residency, adapter_sha256, loaded
from serve.engine import Engine, request
from serve.engine_settings import EngineConfig
from serve.proving import probe
from tests.serve.conftest import PYTHON, needs_engine

pytestmark = needs_engine

PROMPT = {"model": "base", "messages": [{"role": "user", "content": "What is the capital of France?"}]}


def adapter(model: Path, root: Path, number: int, scale: float) -> Generation:
    """A rank-8 LoRA on all linear layers with random weights of the given scale."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(number)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    folder = root / f"adapter-{number}"
    lora.save_pretrained(folder)
    write_proof(model, folder)
    return Generation(
        number=number,
        base_model=str(model),
        adapter_path=folder.name,
        adapter_sha256=adapter_sha256(folder),
        status=GenerationStatus.CANDIDATE,
    )


def scaled(made: Generation, root: Path) -> Generation:
    """The same weights with twice the trained effect: an adapter that an engine applies wrongly."""
    config = root / str(made.adapter_path) / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"lora_alpha": 2 * told["lora_alpha"]}))
    return made.model_copy(update={"adapter_sha256": adapter_sha256(config.parent)})


def gone(pids: list[int], timeout_s: float = 30.0) -> bool:
    """Whether none of the processes runs any more; one that ended and was not reaped yet does not run."""
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.1)
    return not left


def test_the_real_engine_answers_survives_and_serves_adapters(tmp_path: Path, model: Path) -> None:
    registry = tmp_path / "adapters"
    registry.mkdir()
    generations = [adapter(model, registry, number, 0.05) for number in (1, 2)]
    proofs = [read_proof(registry / str(generation.adapter_path)) for generation in generations]
    no_op = adapter(model, registry, 3, 0.0)
    wrong = scaled(adapter(model, registry, 4, 0.05), registry)

    async def ask(engine: Engine, **fields: Any) -> dict[str, Any]:
        payload = PROMPT | {"temperature": 0, "max_tokens": 12, "logprobs": True} | fields
        return (await request(engine, "POST", "/v1/chat/completions", payload, timeout=300))["choices"][0]

    def logprobs(choice: dict[str, Any]) -> list[float]:
        return [token["logprob"] for token in choice["logprobs"]["content"]]

    async def scenario() -> list[int]:
        engine = Engine(EngineConfig(python=PYTHON, max_loras=2), model=model, data_dir=tmp_path)
        residency = Residency(engine, registry, max_loras=2)
        engine.on_ready = residency.restore
        await engine.start()
        try:
            await engine.wait_ready()
            # What two batches may differ by.
            rounding = 2e-2 if "float32" in engine.name else 0.25
            # It answers, constrained where asked, and tells its token ids.
            plain = await ask(engine)
            assert "Paris" in plain["message"]["content"]
            action = await ask(engine, structured_outputs={"regex": r"Action: finish\([a-z]{1,9}\)"}, max_tokens=30)
            assert action["message"]["content"].startswith("Action: finish(")
            assert (await ask(engine, return_token_ids=True))["token_ids"]

            # Every path asks for the key, also the ones that vLLM leaves open.
            engine_without_key = Engine(EngineConfig(url=engine.base_url), model=model, data_dir=tmp_path)
            for path in ("/tokenize", "/v1/completions"):
                with pytest.raises(EngineError, match="401"):
                    await request(engine_without_key, "POST", path, {"model": "base", "prompt": "x"})

            # Adapters are loaded and proved; one without effect is refused, and one with another than was trained.
            for generation in generations:
                proved = await residency.ensure(generation)
                assert proved is not None
                assert proved.max_delta > 0.01
                assert proved.strength == pytest.approx(1, abs=0.25)
                assert logprobs(await ask(engine, model=generation.served_name)) != logprobs(plain)
            await residency.drop(generations[1])
            with pytest.raises(EngineError, match="changes nothing"):
                await residency.ensure(no_op)
            with pytest.raises(EngineError, match="not served as it was trained"):
                await residency.ensure(wrong)
            await residency.ensure(generations[1])

            # With every place taken, in one batch with adapters, the base model still answers as itself.
            mixed = await asyncio.gather(*(ask(engine, model=g.served_name) for g in generations), ask(engine))
            assert logprobs(mixed[-1]) == pytest.approx(logprobs(plain), abs=rounding)

            # Proved in the middle of a load, many at once: the probes' own rows are mixed up with nobody's.
            crowd = [ask(engine, model=g.served_name) for g in generations for _ in range(12)]
            crowded: Any = (await asyncio.gather(*crowd, probe(engine, generations[0].served_name, proofs[0])))[-1]
            assert crowded.strength == pytest.approx(1, abs=0.25)

            # kill -9: it comes back with its adapters.
            assert engine.pid is not None
            old = [process.pid for process in psutil.Process(engine.pid).children(recursive=True)]
            os.kill(engine.pid, signal.SIGKILL)
            while engine.restarts == 0:
                await asyncio.sleep(0.1)
            await engine.wait_ready()
            assert await loaded(engine) == {generation.served_name for generation in generations}
            again = await ask(engine, model=generations[0].served_name)
            assert logprobs(again) == pytest.approx(logprobs(mixed[0]), abs=rounding)
            assert engine.pid is not None
            now = [process.pid for process in psutil.Process(engine.pid).children(recursive=True)]
            return [engine.pid, *old, *now]
        finally:
            await engine.stop()

    processes = asyncio.run(scenario())
    assert len(processes) > 2
    assert gone(processes)
