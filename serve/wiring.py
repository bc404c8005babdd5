"""Puts the parts together: the only constructor of concrete classes.

One service owns a data folder at a time (a file lock), because Chroma's folder, the engine and the
nights each have one owner. Other processes find it by `service.json` and talk to it over HTTP.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agent.engine_client import EngineClient
from agent.llm import ChatModel
from agent.state import AgentDeps
from distill.recipes import load as load_recipes
from memory import forget
from memory.embed import load_embedder
from memory.errors import ConfigError, ConflictError, LedgerError, boundary
from memory.index import Index
from memory.indexer import Indexer
from memory.ledger import Ledger
from memory.library import Documents
from memory.recall import Memory
from memory.records import Task
from memory.search import by_index
from serve import promotion
from serve.adapters import Residency
from serve.engine import Engine
from serve.escalation import Teacher, make_teacher
from serve.models import ensure_model
from serve.replicas import Replicas, ReplicasClient
from serve.settings import Settings

LOCK_FILE = "service.lock"
INFO_FILE = "service.json"


@dataclass(frozen=True)
class Services:
    """The running parts, as routes and nights are handed them."""

    settings: Settings
    ledger: Ledger
    index: Index
    memory: Memory
    engine: Engine | Replicas
    residency: Residency
    llm: ChatModel
    deps: AgentDeps
    loop: asyncio.AbstractEventLoop
    base_model: Path
    teacher: Teacher | None = None


def open_ledger(settings: Settings) -> Ledger:
    """The ledger with its data folder, made on first use. One clear error when the folder is unusable."""
    with boundary(LedgerError, f"cannot use the data folder {settings.data_dir}"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    return Ledger.open(settings.database_url)


def keep_task(ledger: Ledger, task: Task) -> None:
    """Commit a task once, however often it is asked; ConflictError when its id stands for another task."""
    try:
        ledger.add_task(task)
    except ConflictError:
        if not ledger.get_task(task.id).asks_the_same(task):
            raise


@asynccontextmanager
async def build(settings: Settings, on_event: Callable[[str], None] = lambda _: None) -> AsyncIterator[Services]:
    """Everything, started: the engine is still loading when this yields (`engine.wait_ready`). ConfigError for a recipe
    of the settings that there is not: a night would find out hours later."""
    load_recipes(settings.night.recipes)
    async with AsyncExitStack() as stack:
        ledger = open_ledger(settings)
        stack.callback(ledger.close)
        stack.callback(_own(settings.data_dir))
        await asyncio.to_thread(forget.finish, ledger.database)
        base = await asyncio.to_thread(ensure_model, settings.model, settings.models_dir, on_event)
        promotion.ensure_base(ledger, settings.model)
        load = partial(load_embedder, cache_dir=settings.data_dir / "embedder")
        embedder = await asyncio.to_thread(load, settings.embedder)
        index = await asyncio.to_thread(Index.open, settings.data_dir / "index", embedder, load, settings.chroma)
        stack.callback(index.close)
        indexer = Indexer(ledger, index)
        indexer.start()
        stack.callback(indexer.close)
        memory = Memory(ledger, index, settings.recall, embedder)
        teacher = make_teacher(settings.teacher, ledger, embedder)
        engine, residency, llm = _serving(settings, base)
        promotion.expect_serving(ledger, residency)
        await engine.start()
        stack.push_async_callback(engine.stop)
        checkpointer = await stack.enter_async_context(_checkpointer(settings.data_dir / "checkpoints.sqlite"))
        stack.push_async_callback(llm.close)
        deps = AgentDeps(
            llm=llm,
            recaller=memory,
            library=Documents(ledger.database, by_index(ledger, index), settings.knowledge),
            config=settings.agent,
            checkpointer=checkpointer,
            withhold_share=settings.recall.withhold_share,
        )
        loop = asyncio.get_running_loop()
        if teacher is not None:
            stack.callback(asyncio.create_task(teacher.warm()).cancel)
        yield Services(settings, ledger, index, memory, engine, residency, llm, deps, loop, base, teacher)


def _serving(settings: Settings, base: Path) -> tuple[Engine | Replicas, Residency, EngineClient | ReplicasClient]:
    """The engine (several, where the settings name them), its adapters and its client."""
    config = settings.engine
    room: dict[str, Any] = {"max_loras": config.max_loras, "tolerance": config.proof_tolerance}
    if len(config.urls) > 1:
        replicas = Replicas(config, model=base, data_dir=settings.data_dir)
        residency = Residency(replicas, settings.adapters_dir, each=replicas.each, **room)
        for replica in replicas.all:
            replica.on_ready = partial(residency.restore_at, replica)
        return replicas, residency, ReplicasClient(replicas, settings.llm)
    engine = Engine(config, model=base, data_dir=settings.data_dir)
    residency = Residency(engine, settings.adapters_dir, **room)
    engine.on_ready = residency.restore
    return engine, residency, EngineClient(engine, settings.llm)


@asynccontextmanager
async def _checkpointer(path: Path) -> AsyncIterator[Any]:
    # LangGraph's default would rebuild arbitrary classes from a tampered checkpoint (CVE-2025-64439).
    os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
        await saver.setup()
        yield saver


def _own(data_dir: Path) -> Callable[[], None]:
    """Lock the data folder for this process; ConfigError, naming the owner, when it is taken."""
    lock = (data_dir / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        owner = running_service(data_dir) or {}
        at = f" at {owner['url']} (pid {owner['pid']})" if owner else ""
        raise ConfigError(f"the data folder {data_dir} is in use by another Nightschool{at}; stop it first") from exc
    (data_dir / INFO_FILE).unlink(missing_ok=True)

    def release() -> None:
        (data_dir / INFO_FILE).unlink(missing_ok=True)
        lock.close()

    return release


def announce(data_dir: Path, url: str, token: str) -> None:
    """Tell other processes of this user where the service listens, and the token that opens everything there."""
    temporary = data_dir / f"{INFO_FILE}.new"
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps({"url": url, "pid": os.getpid(), "token": token}))
    temporary.replace(data_dir / INFO_FILE)


def running_service(data_dir: Path) -> dict[str, Any] | None:
    """{"url", "pid", "token"} of the service that owns the folder; None when there is none (a dead one's file counts
    for nothing)."""
    try:
        info = json.loads((data_dir / INFO_FILE).read_text())
        with (data_dir / LOCK_FILE).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return info
    except (OSError, ValueError):
        return None
    return None
