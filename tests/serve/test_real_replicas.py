"""Two real vLLMs behind one service: both prove an adapter before it serves, and either may be killed.

Minutes of its own on two cores: `make kills` runs it. What happens in detail is `test_replicas`', on stand-ins.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from agent.llm import ChatReply, ChatRequest, LLMConfig
from memory.errors import EngineError
from memory.night_records import Generation
from serve.adapters import Residency, loaded
from serve.engine import LAUNCHER, free_port
from serve.engine_settings import EngineConfig, engine_arguments, engine_environment
from serve.replicas import Replicas, ReplicasClient
from tests.serve.conftest import PYTHON, needs_engine
from tests.serve.test_real_engine import adapter, gone, scaled

pytestmark = [*needs_engine, pytest.mark.slow]

KEY = "the key of both"


class Process:
    """A vLLM that nobody supervises, as somebody else's is: it can be killed and started again at its address."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        # One thread each: vLLM on its own would put both on the same core.
        config = EngineConfig(python=PYTHON, max_loras=2, omp_threads=1, kv_cache_gb=1)
        self._command = [
            str(PYTHON),
            "-P",
            str(LAUNCHER),
            *engine_arguments(config, model, self.port, False, "float32"),
        ]
        self._environment = engine_environment(config, KEY, folder, False)
        folder.mkdir(parents=True)
        self.start()

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._running = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> list[int]:
        """`kill -9`; its processes, none of which may stay."""
        pids = [self._running.pid]
        with suppress(psutil.NoSuchProcess):
            pids += [child.pid for child in psutil.Process(self._running.pid).children(recursive=True)]
        with suppress(ProcessLookupError):
            os.kill(self._running.pid, signal.SIGKILL)
        self._running.wait()
        return pids


@contextmanager
def two(model: Path, folder: Path) -> Iterator[list[Process]]:
    processes = [Process(model, folder / name) for name in ("one", "other")]
    try:
        yield processes
    finally:
        pids = [pid for process in processes for pid in process.kill()]
        assert gone(pids)


async def until_ready(replicas: Replicas, count: int) -> None:
    async with asyncio.timeout(600):
        while len(replicas.ready) != count:
            assert "failed" not in [replica.status for replica in replicas.all]
            await asyncio.sleep(0.1)


async def answered(url: str) -> int:
    """Requests that this vLLM has finished, by its own count."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
        lines = (await http.get(f"{url}/metrics")).text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total")))


def test_two_real_engines_prove_each_adapter_share_the_work_and_cover_for_each_other(
    tmp_path: Path, model: Path
) -> None:
    registry = tmp_path / "adapters"
    registry.mkdir()
    generations = [adapter(model, registry, number, 0.02) for number in (1, 2)]
    wrong = scaled(adapter(model, registry, 3, 0.02), registry)

    async def scenario(processes: list[Process]) -> None:
        config = EngineConfig(url=",".join(each.url for each in processes), api_key=KEY, health_every_s=0.5)
        replicas = Replicas(config, model=model, data_dir=tmp_path)
        residency = Residency(replicas, registry, max_loras=2, each=replicas.each)
        for replica in replicas.all:
            replica.on_ready = partial(residency.restore_at, replica)
        llm = ReplicasClient(replicas, LLMConfig(backoff_s=0.1))

        async def ask(n: int, generation: Generation | None = None) -> ChatReply:
            name = generation.served_name if generation else "base"
            messages = [{"role": "user", "content": f"What is {n} plus {n + 1}?"}]
            return await llm.complete(
                ChatRequest(name, messages, {"temperature": 0, "max_tokens": 16, "logprobs": True})
            )

        async def both_hold(*wanted: Generation) -> bool:
            held = [await loaded(replica) for replica in replicas.all]
            return held == [{generation.served_name for generation in wanted}] * 2

        await replicas.start()
        try:
            await until_ready(replicas, 2)
            for generation in generations:
                proved = await residency.ensure(generation)
                assert proved is not None
                assert proved.error is not None
                assert proved.error < 0.1 * proved.mean_delta
            assert await both_hold(*generations)
            await residency.drop(generations[1])
            with pytest.raises(EngineError, match=r"^http.*not served as it was trained"):
                await residency.ensure(wrong)
            assert await both_hold(generations[0])
            await residency.ensure(generations[1])

            before = [await answered(each.url) for each in processes]
            replies = await asyncio.gather(*(ask(n, generations[n % 2]) for n in range(16)))
            shares = [await answered(each.url) - had for each, had in zip(processes, before, strict=True)]
            assert sum(shares) == 16
            assert min(shares) > 0

            # kill -9 in the middle of a load: nobody is told, and what serves is what served.
            asked = [asyncio.create_task(ask(n, generations[n % 2])) for n in range(16)]
            while not replicas.all[0].requests:
                await asyncio.sleep(0.01)
            assert gone(processes[0].kill())
            again = await asyncio.gather(*asked)
            assert [reply.text for reply in again] == [reply.text for reply in replies]
            await until_ready(replicas, 1)

            # Started again by whoever runs it, it holds no adapter, and serves once it has proved both.
            processes[0].start()
            await until_ready(replicas, 2)
            assert await both_hold(*generations)
            before = await answered(processes[0].url)
            later = await asyncio.gather(*(ask(n, generations[n % 2]) for n in range(16)))
            assert await answered(processes[0].url) > before
            assert Counter(reply.text for reply in later) == Counter(reply.text for reply in replies)
        finally:
            await llm.close()
            await replicas.stop()

    with two(model, tmp_path / "engines") as processes:
        asyncio.run(scenario(processes))
