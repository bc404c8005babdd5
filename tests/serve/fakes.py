"""A service whose only fakes are the model, the engine's process and the trainer's process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.llm import ChatRequest, ScriptedModel
from agent.state import AgentDeps
from distill.train.config import RESULT, TrainJob, TrainResult
from memory.embed import load_embedder
from memory.index import Index, sync
from memory.ledger import Ledger
from memory.library import Documents
from memory.night_records import Generation
from memory.recall import Memory, RecallConfig
from memory.search import by_index
from serve import promotion
from serve.escalation import make_teacher
from serve.settings import ServerConfig, Settings
from serve.wiring import Services, announce, open_ledger
from tests.serve.fake_trainer import made_result


@dataclass
class FakeEngine:
    """An engine that is up."""

    status: str = "ready"
    name: str = "fake"
    base_url: str = "http://127.0.0.1:1/v1"
    api_key: str = "key"

    async def wait_ready(self, timeout: float) -> None:
        return None


@dataclass
class FakeResidency:
    """Remembers what was loaded."""

    loaded: list[str] = field(default_factory=list)
    swapping: bool = False

    async def ensure(self, generation: Generation) -> None:
        self.loaded.append(generation.served_name)

    def settle(self, *generations: Generation) -> None:
        return None

    @asynccontextmanager
    async def using(self, generation: Generation) -> AsyncIterator[None]:
        await self.ensure(generation)
        yield


def settings_in(folder: Path, **overrides: Any) -> Settings:
    """Settings over a temporary data folder, without keys."""
    # Whether a run is shown what was recalled follows from its id: what is not about that shows all of it.
    given: dict[str, Any] = {"server": ServerConfig(keys=False), "recall": RecallConfig(withhold_share=0), **overrides}
    return Settings(data_dir=folder / "data", model="test/model", **given)


@contextmanager
def services_in(
    settings: Settings, script: Callable[[ChatRequest], str | Exception], loop: asyncio.AbstractEventLoop
) -> Iterator[Services]:
    """Real ledger, index, embedder and memory; scripted model."""
    ledger: Ledger = open_ledger(settings)
    promotion.ensure_base(ledger, settings.model)
    index = Index.open(settings.data_dir / "index", load_embedder("wordllama", settings.data_dir / "embedder"))
    sync(ledger, index)
    memory = Memory(ledger, index, settings.recall)
    model = ScriptedModel(script)
    library = Documents(ledger.database, by_index(ledger, index), settings.knowledge)
    share = settings.recall.withhold_share
    deps = AgentDeps(llm=model, recaller=memory, library=library, config=settings.agent, withhold_share=share)
    engine: Any = FakeEngine()
    residency: Any = FakeResidency()
    teacher = make_teacher(settings.teacher, ledger, index.embedder)
    try:
        yield Services(
            settings, ledger, index, memory, engine, residency, model, deps, loop, settings.data_dir, teacher
        )
    finally:
        index.close()
        ledger.close()


def fake_training(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
    """What the trainer leaves behind, without training."""
    job.out_dir.mkdir(parents=True, exist_ok=True)
    (job.out_dir / "adapter_config.json").write_text(json.dumps({"r": 16}))
    (job.out_dir / "adapter_model.safetensors").write_bytes(b"weights of " + job.out_dir.name.encode())
    result = made_result(job, rows=1)
    (job.out_dir / RESULT).write_text(result.model_dump_json())
    return result


@dataclass
class Running:
    """A service in a thread: where it is, its parts, and its Uvicorn server."""

    url: str
    services: Services
    server: Any


OPERATOR_TOKEN = "the operator's token"


@contextmanager
def running(settings: Settings, script: Callable[[ChatRequest], str | Exception]) -> Iterator[tuple[str, Services]]:
    """The real app on a real port in a thread, nights included; yields its URL and parts."""
    with running_server(settings, script) as started:
        yield started.url, started.services


@contextmanager
def running_server(settings: Settings, script: Callable[[ChatRequest], str | Exception]) -> Iterator[Running]:
    """As `running`; signals are given by calling the server's `handle_exit`."""
    import uvicorn

    from serve import batch_run, durable, watching
    from serve.api.app import create_app
    from serve.night import NightSchool
    from serve.server import bind, drain_first, uvicorn_config

    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started: threading.Event = threading.Event()
    held: dict[str, Any] = {}

    async def main() -> None:
        with services_in(settings, script, asyncio.get_running_loop()) as services:
            await asyncio.to_thread(durable.launch, services)
            nights = NightSchool(services)
            await asyncio.to_thread(nights.resume)
            await asyncio.to_thread(batch_run.resume, services)
            app = create_app(services, nights, OPERATOR_TOKEN)
            server = uvicorn.Server(uvicorn_config(app, "error"))
            drain_first(server, app.state.gate, asyncio.get_running_loop())
            held.update(server=server, services=services)
            started.set()
            try:
                async with watching.kept(services):
                    await server.serve(sockets=[listener])
            finally:
                await asyncio.to_thread(durable.shut_down)

    def live() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:
            held["error"] = exc
            started.set()
            raise

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert started.wait(180), "the service did not start within three minutes"
    if "services" not in held:
        raise held["error"]
    try:
        yield Running(url, held["services"], held["server"])
    finally:
        held["server"].should_exit = True
        thread.join(30)


__all__ = [
    "OPERATOR_TOKEN",
    "FakeEngine",
    "FakeResidency",
    "Running",
    "announce",
    "fake_training",
    "running",
    "running_server",
    "services_in",
    "settings_in",
]
