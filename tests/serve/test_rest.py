"""The engine out of the trainer's way, on the stand-in for vLLM: asleep or stopped, proved before it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from memory.errors import ConfigError, EngineError
from memory.night_records import Generation, GenerationStatus
from serve.adapters import Residency, adapter_sha256, loaded
from serve.engine import request
from serve.engine_settings import EngineConfig, engine_arguments, engine_environment
from serve.rest import rest, wake
from tests.serve.test_engine import running


def trained(root: Path) -> Generation:
    folder = root / "night_1"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    fields: dict[str, Any] = {"base_model": "b", "adapter_path": "night_1", "adapter_sha256": adapter_sha256(folder)}
    return Generation(number=1, status=GenerationStatus.CHAMPION, **fields)


@asynccontextmanager
async def serving(folder: Path, how: str) -> AsyncIterator[tuple]:
    """A ready engine with one adapter that requests use."""
    champion = trained(folder / "adapters")
    async with running(folder, during_training=how) as engine:
        residency = Residency(engine, folder / "adapters")
        engine.on_ready = residency.restore
        await residency.ensure(champion)
        yield engine, residency, champion


@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_while_it_rests_requests_wait_and_then_find_the_adapter_proved(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, how) as (engine, residency, champion):
            pid = engine.pid
            await rest(engine)
            assert engine.status == "resting"
            assert engine.pid == (pid if how == "sleep" else None)
            with pytest.raises(EngineError, match="still resting"):
                await engine.wait_ready(0.1)
            waiting = asyncio.create_task(engine.wait_ready(60))
            await wake(engine, residency)
            await waiting
            assert residency.resident == [champion.served_name]
            assert await loaded(engine) == {champion.served_name}
            assert (await request(engine, "GET", "/health")) == {}
            assert (engine.pid == pid) is (how == "sleep")

    asyncio.run(scenario())


def test_an_engine_that_lost_its_adapters_in_its_sleep_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_FAKE", json.dumps({"sleep_harms": True}))

    async def scenario() -> None:
        async with serving(tmp_path, "sleep") as (engine, residency, champion):
            pid = engine.pid
            await rest(engine)
            await wake(engine, residency)
            await engine.wait_ready(60)
            assert engine.pid not in (None, pid)
            probe = await residency.ensure(champion)
            assert probe.max_delta > 0, "served is only what is proved"

    asyncio.run(scenario())


def test_an_engine_of_another_service_is_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as engine:
            engine.config = EngineConfig(url="http://127.0.0.1:9", during_training="sleep")
            with pytest.raises(ConfigError, match="must be `share`"):
                await rest(engine)

    asyncio.run(scenario())


def test_vllm_offers_sleep_only_where_the_settings_want_it(tmp_path: Path) -> None:
    for how, wanted in (("share", False), ("stop", False), ("sleep", True)):
        config = EngineConfig.model_validate({"during_training": how})
        assert ("--enable-sleep-mode" in engine_arguments(config, tmp_path, 1, True, "bfloat16")) is wanted
        assert engine_environment(config, "key", tmp_path, True)["VLLM_SERVER_DEV_MODE"] == str(int(wanted))
