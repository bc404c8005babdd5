"""Switches under a constant load: nobody notices, and every reply is from the generation that it names."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx

from agent.engine_client import EngineClient
from evals.live import WatchConfig
from memory.night_records import Generation, GenerationStatus
from serve import watching
from serve.adapters import Residency, adapter_sha256, loaded
from serve.api.app import create_app
from serve.benches.swap import Load, rolled_back, rolled_back_by_the_watch, under_load
from serve.night import NightSchool
from serve.settings import ServerConfig
from tests.serve.fake_engine import FakeVLLM
from tests.serve.fakes import services_in, settings_in
from tests.serve.test_adapters import Endpoint


def generation(root: Path, number: int) -> Generation:
    folder = root / f"night-{number}"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
    (folder / "says.txt").write_text(str(number))
    return Generation(
        number=number,
        base_model="test/model",
        adapter_path=folder.name,
        adapter_sha256=adapter_sha256(folder),
        status=GenerationStatus.CANDIDATE,
    )


def asked(n: int) -> dict[str, Any]:
    """By turns of the agent and of the plain model."""
    model = ("nightschool", "champion")[n % 2]
    return {"model": model, "messages": [{"role": "user", "content": f"Question {n}"}]}


def test_twenty_swaps_under_sixteen_clients_lose_no_request_and_mix_up_no_reply(tmp_path: Path) -> None:
    server = FakeVLLM(0, "key")
    server.chat_s = 0.02
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    settings = settings_in(tmp_path, server=ServerConfig(keys=False, max_concurrent=16))

    async def scenario() -> tuple[Load, set[str], list[str], list[str]]:
        with services_in(settings, lambda _: "unused", asyncio.get_running_loop()) as made:
            engine: Any = Endpoint(server)
            llm = EngineClient(engine)
            residency = Residency(engine, settings.adapters_dir, max_loras=3)
            deps = replace(made.deps, llm=llm)
            services = replace(made, engine=engine, residency=residency, llm=llm, deps=deps)
            for number in (1, 2, 3, 4):
                services.ledger.add_generation(generation(settings.adapters_dir, number))
            app = create_app(services, NightSchool(services))
            transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]
            async with httpx.AsyncClient(transport=transport, base_url="http://swap", timeout=60) as http:
                load = await under_load(http, list(islice(cycle((1, 2, 3, 4)), 20)), asked, between=4)
                names = [services.ledger.generation(number).served_name for number in (4, 3)]
                async with asyncio.timeout(60):
                    while len(await loaded(engine)) > len(names):
                        await asyncio.sleep(0.01)
                left, before = await loaded(engine), len(server.calls)
                assert await rolled_back(http, asked(0)) > 0
                for_the_way_back = server.calls[before:]
                async with watching.kept(services):
                    watched = await rolled_back_by_the_watch(http, services.ledger, 4, asked, WatchConfig())
            assert services.ledger.champion().number == 3
            row = services.ledger.promotions()[-1]
            assert (row.from_generation, row.to_generation, row.by) == (4, 3, "watch")
            switched, answered, met = watched
            assert 0 < switched < answered
            assert met.failed == []
            await llm.close()
            return load, left, names, for_the_way_back

    try:
        load, left, names, for_the_way_back = asyncio.run(scenario())
    finally:
        server.shutdown()
        server.server_close()
    assert load.failed == []
    assert len(load.swap_s) == 20
    assert len(load.answered) >= 20 * 4
    assert {reply.generation for reply in load.answered} >= {1, 2, 3, 4}
    wrong = [r for r in load.answered if r.generation and r.text != str(r.generation)]
    assert wrong == []
    assert left == set(names), "only what serves and what a rollback would bring back stays loaded"
    assert for_the_way_back == [], "a rollback is a switch, not a load"
    assert sum(call.startswith("unload") for call in server.calls) >= 12
