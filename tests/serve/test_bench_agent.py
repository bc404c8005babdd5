"""The agent's benchmark end to end, with the service as its own process and a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serve.benches import agent as bench_agent
from serve.benches.front import upstream
from serve.settings import Settings


@asynccontextmanager
async def fake_engine(_: Settings, folder: Path) -> AsyncIterator[tuple[Any, Path]]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    with upstream(folder, latency_ms=5) as target:
        yield SimpleNamespace(base_url=f"http://127.0.0.1:{target.port}/v1", api_key=target.key), folder / "model"


def test_the_agents_own_calls_are_sent_straight_to_the_engine(tmp_path: Path) -> None:
    engine = Settings().engine.model_copy(update={"max_num_seqs": 2})
    settings = Settings(data_dir=tmp_path, engine=engine)
    done = bench_agent.agent(settings, fake_engine, tasks=6)
    assert done.figures["tasks"] == done.figures["calls"] == 6 * bench_agent.ROUNDS
    assert float(done.figures["agent_over_direct"]) > 0
    assert "agent_over_direct" in done.met
