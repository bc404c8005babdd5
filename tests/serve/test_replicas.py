"""Several engines behind one service, on small stand-ins for vLLM that can be killed and started again."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.llm import ChatRequest, LLMConfig
from memory.errors import EngineError, ModelError
from memory.night_records import Generation
from serve import promotion
from serve.adapters import Residency
from serve.api.app import create_app
from serve.engine_settings import EngineConfig
from serve.night import NightSchool
from serve.replicas import CLEARLY_BUSIER, Replicas, ReplicasClient
from tests.serve.fake_engine import FakeVLLM
from tests.serve.fakes import OPERATOR_TOKEN, services_in, settings_in
from tests.serve.test_adapters import generation, prove


class Server(FakeVLLM):
    """A stand-in that dies with its connections, as a process does."""

    def __init__(self, log: Path, port: int = 0) -> None:
        super().__init__(port, "key")
        self.chat_log = log
        self.log = log
        self.sockets: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        found, address = super().get_request()
        self.sockets.append(found)
        return found, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        return None

    def kill(self) -> None:
        self.shutdown()
        self.server_close()
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.released.set()

    def again(self) -> Server:
        """A new process at the same address: it holds no adapter."""
        return Server(self.log, self.server_address[1])

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


class Cluster:
    """Two stand-ins, and the parts in front of them."""

    def __init__(self, folder: Path, attempts: int) -> None:
        self.servers = [Server(folder / f"asked-{n}") for n in range(2)]
        config = EngineConfig(url=", ".join(server.url for server in self.servers), api_key="key", health_every_s=0.02)
        self.replicas = Replicas(config, model=folder, data_dir=folder)
        self.residency = Residency(self.replicas, folder / "adapters", each=self.replicas.each)
        for replica in self.replicas.all:
            replica.on_ready = partial(self.residency.restore_at, replica)
        self.llm = ReplicasClient(self.replicas, LLMConfig(attempts=attempts, backoff_s=0.01))

    async def all_ready(self) -> None:
        await until(lambda: len(self.replicas.ready) == 2)

    async def say(self, text: str, generation: Generation | None = None) -> str:
        return (await self.llm.complete(asking(text, generation))).text

    async def kill(self, n: int) -> None:
        await asyncio.to_thread(self.servers[n].kill)

    @property
    def busy(self) -> int:
        """Which one computes something."""
        return next(n for n in range(2) if self.replicas.all[n].requests)


@asynccontextmanager
async def cluster(folder: Path, *expected: Generation, attempts: int = 1) -> AsyncIterator[Cluster]:
    made = Cluster(folder, attempts)
    made.residency.expect(*expected)
    await made.replicas.start()
    try:
        yield made
    finally:
        await made.llm.close()
        await made.replicas.stop()
        for server in made.servers:
            server.kill()


def asking(text: str, generation: Generation | None = None, *turns: str) -> ChatRequest:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    said += [{"role": "assistant", "content": turn} for turn in turns]
    return ChatRequest(generation.served_name if generation else "base", said)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_turns_of_a_run_go_to_one_replica_until_that_is_clearly_busier(tmp_path: Path) -> None:
    replicas = Replicas(EngineConfig(url="http://a,http://b, http://a/,"), model=tmp_path, data_dir=tmp_path)
    assert [replica.base_url for replica in replicas.all] == ["http://a/v1", "http://b/v1"]
    for replica in replicas.all:
        replica.status = "ready"
    home = replicas.choose(asking("A run"))
    assert home is not None
    other = next(replica for replica in replicas.all if replica is not home)
    home.requests = CLEARLY_BUSIER
    assert replicas.choose(asking("A run", None, "one", "two")) is home
    home.requests += 1
    assert replicas.choose(asking("A run")) is other
    other.leave("restarting", "it hung up")
    assert replicas.choose(asking("A run")) is home
    assert replicas.choose(asking("A run"), {home}) is None


def test_an_adapter_that_one_serves_wrongly_is_not_promoted_and_unloaded_everywhere(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    candidate = generation(tmp_path / "adapters", 1)
    prove(tmp_path / "adapters" / "adapter-1")

    async def scenario() -> None:
        with services_in(settings, lambda _: "unused", asyncio.get_running_loop()) as services:
            services.ledger.add_generation(candidate)
            async with cluster(tmp_path) as made:
                # First: it holds the loop up, and who then hears nothing of an engine takes it for dead.
                nights = NightSchool(services)
                app = create_app(replace(services, engine=made.replicas), nights, operator_token=OPERATOR_TOKEN)
                await made.all_ready()
                made.servers[1].harmed = True
                with pytest.raises(EngineError, match=f"^{made.servers[1].url}/v1: .*not served as it was trained"):
                    await promotion.promote(services.ledger, made.residency, 1, why="better", by="test")
                assert services.ledger.champion().number == 0
                assert [server.adapters for server in made.servers] == [{}, {}]
                assert made.residency.resident == []
                made.servers[1].harmed = False
                await promotion.promote(services.ledger, made.residency, 1, why="better", by="test")
                assert [set(server.adapters) for server in made.servers] == [{candidate.served_name}] * 2

                # Its reason names a file; the routes are open to whoever comes.
                (tmp_path / "adapters" / "adapter-1" / "adapter_config.json").unlink()
                await made.kill(0)
                await until(lambda: made.replicas.all[0].status == "restarting")
                made.servers[0] = made.servers[0].again()
                await until(lambda: made.replicas.all[0].status == "failed")
                transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]
                async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                    ready = await http.get("/readyz")
                    metrics = (await http.get("/metrics")).text
                first, second = (f"{server.url}/v1" for server in made.servers)
                assert ready.json()["replicas"] == [
                    {"url": first, "status": "failed"},
                    {"url": second, "status": "ready"},
                ]
                assert ready.status_code == 200
                assert str(tmp_path) not in ready.text
                assert f'nightschool_replica_ready{{url="{first}"}} 0.0' in metrics
                assert "nightschool_engine_ready 1.0" in metrics

    asyncio.run(scenario())


def test_when_one_dies_what_it_was_asked_is_answered_by_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as made:
            await made.all_ready()
            for server in made.servers:
                server.holds = "answer"
            asked = [asyncio.create_task(made.say(f"Question {n}")) for n in range(8)]
            await until(lambda: sum(each.requests for each in made.replicas.all) == 8)
            assert all(each.requests for each in made.replicas.all)
            await made.kill(0)
            asked += [asyncio.create_task(made.say(f"Later {n}")) for n in range(4)]
            made.servers[1].released.set()
            assert await asyncio.gather(*asked) == ["Hello there."] * 12
            assert len(made.servers[1].asked) == 12
            await until(lambda: [each.status for each in made.replicas.all] == ["restarting", "ready"])
            assert made.replicas.status == "ready"
            assert [each.requests for each in made.replicas.all] == [0, 0]

    asyncio.run(scenario())


def test_a_stream_that_had_only_its_head_is_asked_of_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as made:
            await made.all_ready()
            for server in made.servers:
                server.holds = "answer"
            stream = made.llm.stream(asking("A run"))
            first = asyncio.create_task(anext(stream))  # pyright: ignore[reportArgumentType]
            await until(lambda: any(server.holding.is_set() for server in made.servers))
            busy = made.busy
            made.servers[1 - busy].released.set()
            await made.kill(busy)
            assert await first == "Hel"
            assert [piece async for piece in stream if isinstance(piece, str)] == ["lo there."]

    asyncio.run(scenario())


def test_a_stream_that_began_is_cut_off_with_its_engine_and_the_next_one_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as made:
            await made.all_ready()
            for server in made.servers:
                server.holds = "rest"
            async with aclosing(made.llm.stream(asking("A run"))) as pieces:  # pyright: ignore[reportArgumentType]
                assert await anext(pieces) == "Hel"
                busy = made.busy
                await made.kill(busy)
                with pytest.raises(ModelError):
                    await anext(pieces)
            made.servers[1 - busy].released.set()
            said = [piece async for piece in made.llm.stream(asking("A run")) if isinstance(piece, str)]
            assert said == ["Hel", "lo there."]
            assert [each.requests for each in made.replicas.all] == [0, 0]

    asyncio.run(scenario())


def test_one_that_comes_back_serves_nothing_before_its_adapters_are_proved(tmp_path: Path) -> None:
    champion = generation(tmp_path / "adapters", 1)
    prove(tmp_path / "adapters" / "adapter-1")

    async def scenario() -> None:
        async with cluster(tmp_path, champion) as made:
            await made.all_ready()
            assert [set(server.adapters) for server in made.servers] == [{champion.served_name}] * 2
            await made.kill(0)
            await until(lambda: len(made.replicas.ready) == 1)
            back = made.servers[0] = made.servers[0].again()
            back.harmed = True
            await until(lambda: made.replicas.all[0].status == "failed")
            said = await asyncio.gather(*(made.say(f"Question {n}", champion) for n in range(8)))
            assert said == ["Hello there."] * 8
            assert (len(back.asked), len(made.servers[1].asked)) == (0, 8)
            back.harmed = False
            await made.all_ready()
            assert set(back.adapters) == {champion.served_name}
            await asyncio.gather(*(made.say(f"Then {n}", champion) for n in range(8)))
            assert back.asked

    asyncio.run(scenario())


def test_one_that_missed_a_promotion_is_given_that_adapter_when_it_is_back(tmp_path: Path) -> None:
    champion = generation(tmp_path / "adapters", 1)

    async def scenario() -> None:
        async with cluster(tmp_path) as made:
            await made.all_ready()
            made.servers[0].hangs_up = True
            await made.residency.ensure(champion)
            assert [each.status for each in made.replicas.all] == ["restarting", "ready"]
            made.servers[0].hangs_up = False
            await made.all_ready()
            assert set(made.servers[0].adapters) == {champion.served_name}

    asyncio.run(scenario())


def test_one_that_started_again_unnoticed_fails_no_request_and_is_given_its_adapters_again(tmp_path: Path) -> None:
    champion = generation(tmp_path / "adapters", 1)

    async def scenario() -> None:
        async with cluster(tmp_path, champion, attempts=6) as made:
            await made.all_ready()
            for server in made.servers:
                server.adapters.clear()
                assert await made.say("Question", champion) == "Hello there."
            await asyncio.gather(*(made.say(f"Question {n}", champion) for n in range(8)))
            await made.all_ready()
            assert [set(server.adapters) for server in made.servers] == [{champion.served_name}] * 2

    asyncio.run(scenario())


def test_when_none_may_serve_that_is_said_at_once_and_the_log_has_each_ones_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion = generation(tmp_path / "adapters", 1, "empty")

    async def scenario() -> None:
        async with cluster(tmp_path, champion) as made:
            await until(lambda: made.replicas.status == "failed")
            with pytest.raises(EngineError, match="none of the engines may serve"):
                await made.residency.ensure(champion)
            for server in made.servers:
                assert any(server.url in line and "changes nothing" in line for line in caplog.messages)

    asyncio.run(scenario())
