"""What is served, and the way back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evals.live import LiveVerdict, WatchConfig
from memory import items
from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus
from memory.records import MemoryStatus
from serve import promotion
from serve.adapters import Residency, loaded
from serve.watching import act, watched
from tests.memory import samples
from tests.serve import test_adapters
from tests.serve.fakes import FakeResidency
from tests.serve.test_adapters import generation

engine = test_adapters.engine


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    promotion.ensure_base(opened, "test/model")
    for number in (1, 2):
        opened.add_generation(
            Generation(
                number=number,
                base_model="test/model",
                adapter_path=f"night-{number}",
                adapter_sha256=f"{number}" * 64,
                status=GenerationStatus.CANDIDATE,
            )
        )
    yield opened
    opened.close()


def promote(ledger: Ledger, number: int, residency: FakeResidency | None = None) -> None:
    asyncio.run(promotion.promote(ledger, residency or FakeResidency(), number, why="test", by="test"))  # type: ignore[arg-type]


def test_a_generation_is_proved_before_it_serves(ledger: Ledger) -> None:
    residency = FakeResidency()
    promote(ledger, 1, residency)
    assert residency.loaded == ["gen-1@111111111111"]
    assert ledger.champion().number == 1


def test_every_name_resolves_to_a_generation(ledger: Ledger) -> None:
    promote(ledger, 1)
    assert promotion.resolve(ledger, "nightschool")[1].number == 1
    assert promotion.resolve(ledger, "champion") == (False, ledger.generation(1))
    assert promotion.resolve(ledger, "nightschool:gen-0") == (True, ledger.generation(0))
    assert promotion.resolve(ledger, "gen-2") == (False, ledger.generation(2))
    for unknown in ("gpt-4", "gen-9", "nightschool:gen-9", "nightschool:latest", "gen-1x", ""):
        with pytest.raises(NotFoundError):
            promotion.resolve(ledger, unknown)


def test_rolling_back_twice_goes_two_steps_back_and_then_says_there_is_no_more(ledger: Ledger) -> None:
    promote(ledger, 1)
    promote(ledger, 2)

    def back() -> int:
        residency = FakeResidency()
        done = promotion.rollback(ledger, residency, why="worse", by="test")  # type: ignore[arg-type]
        return asyncio.run(done).to_generation

    assert [back(), back()] == [1, 0]
    with pytest.raises(ConflictError, match="nothing to roll back"):
        back()
    assert [p.to_generation for p in ledger.promotions()] == [1, 2, 1, 0]


def test_what_later_generations_did_without_comes_back_with_an_earlier_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = samples.principle("Count the letters."), samples.principle("Name the unit.")
    promote(ledger, 1)
    with monkeypatch.context() as long_ago:
        long_ago.setattr(items, "time", SimpleNamespace(time=lambda: 1000.0))
        ledger.add_principle(earlier)
        ledger.set_memory_status(earlier.id, MemoryStatus.INTERNALISED, "generation 1")
    ledger.add_principle(later)
    promote(ledger, 2)
    ledger.set_memory_status(later.id, MemoryStatus.INTERNALISED, "generation 2")
    promote(ledger, 1)
    standing = {p.id: p.status for p in ledger.principles()}
    assert standing == {earlier.id: MemoryStatus.INTERNALISED, later.id: MemoryStatus.ACTIVE}


def test_a_canary_judged_against_another_champion_gets_no_users(ledger: Ledger) -> None:
    promote(ledger, 1)
    begun = promotion.begin_canary(ledger, FakeResidency(), 2, 0.1, why="better", by="night", expected_from=0)  # type: ignore[arg-type]
    with pytest.raises(ConflictError, match="changed meanwhile"):
        asyncio.run(begun)
    assert ledger.canary() is None


def test_a_champion_that_changes_while_the_canary_is_loaded_leaves_it_without_users(ledger: Ledger) -> None:
    class Slow(FakeResidency):
        async def ensure(self, generation: Generation) -> None:
            if generation.number == 2:
                ledger.promote(1, why="an operator's", by="operator", expected_from=0)

    begun = promotion.begin_canary(ledger, Slow(), 2, 0.1, why="better", by="night", expected_from=0)  # type: ignore[arg-type]
    with pytest.raises(ConflictError, match="changed meanwhile"):
        asyncio.run(begun)
    assert ledger.canary() is None


def test_a_canary_that_was_ended_while_the_watch_let_it_serve_all_serves_nobody(ledger: Ledger) -> None:
    class Slow(FakeResidency):
        async def ensure(self, generation: Generation) -> None:
            if ledger.canary() is not None:
                ledger.end_canary("enough", "operator")

    ledger.begin_canary(2, 0.1, why="test", by="test")
    [pair] = watched(ledger)
    stood = LiveVerdict(worse=False, told="as good", evidence={}, compared=100, workloads=[])
    with pytest.raises(ConflictError, match="changed meanwhile"):
        asyncio.run(act(ledger, Slow(), pair, stood, WatchConfig()))  # type: ignore[arg-type]
    assert ledger.champion().number == 0
    # Ended before the watch came to it.
    with pytest.raises(ConflictError, match="changed meanwhile"):
        asyncio.run(act(ledger, FakeResidency(), pair, stood, WatchConfig()))  # type: ignore[arg-type]
    assert ledger.champion().number == 0


def test_what_was_rejected_or_serves_already_is_not_promoted(ledger: Ledger) -> None:
    ledger.advance_generation(2, GenerationStatus.REJECTED)
    with pytest.raises(ConflictError, match="rejected"):
        promote(ledger, 2)
    promote(ledger, 1)
    with pytest.raises(ConflictError, match="already"):
        promote(ledger, 1)


class Served:
    """Three generations on a real `Residency`; the first two were champion, one after the other."""

    def __init__(self, folder: Path, ledger: Ledger, engine: Any, max_loras: int) -> None:
        self.ledger, self.engine = ledger, engine
        self.residency = Residency(engine, folder, max_loras=max_loras)
        for number in (11, 12, 13):
            ledger.add_generation(generation(folder, number))

    async def promoted(self) -> None:
        for number in (11, 12):
            await promotion.promote(self.ledger, self.residency, number, why="test", by="test")

    async def canary(self) -> None:
        await promotion.begin_canary(self.ledger, self.residency, 13, 0.1, why="test", by="test")

    async def holds(self, *numbers: int) -> bool:
        """Whether the engine comes to hold these and no others."""
        names = {self.ledger.generation(number).served_name for number in numbers}
        for _ in range(100):
            if set(self.residency.resident) == await loaded(self.engine) == names:
                return True
            await asyncio.sleep(0.01)
        return False


async def by_hand(served: Served) -> None:
    await promotion.rollback(served.ledger, served.residency, why="enough", by="test")


async def by_the_watch(served: Served) -> None:
    [pair] = [pair for pair in watched(served.ledger) if pair.canary]
    verdict = LiveVerdict(worse=True, told="it fails", evidence={}, compared=20, workloads=[])
    await act(served.ledger, served.residency, pair, verdict, WatchConfig())


@pytest.mark.parametrize("end", [by_hand, by_the_watch])
def test_while_a_canary_runs_the_way_back_stays_loaded_and_an_ended_canary_goes(
    tmp_path: Path, ledger: Ledger, engine: test_adapters.Endpoint, end: Callable[[Served], Awaitable[None]]
) -> None:
    async def scenario() -> None:
        served = Served(tmp_path, ledger, engine, max_loras=3)
        await served.promoted()
        await served.canary()
        assert await served.holds(11, 12, 13)
        await end(served)
        assert await served.holds(11, 12)
        await by_hand(served)

    asyncio.run(scenario())
    assert ledger.champion().number == 11
    assert [call.split("@")[0] for call in engine.server.calls][:4] == [
        "load gen-11",
        "load gen-12",
        "load gen-13",
        "unload gen-13",
    ]


def test_where_there_is_no_place_for_both_the_way_back_makes_it_for_the_canary(
    tmp_path: Path, ledger: Ledger, engine: test_adapters.Endpoint
) -> None:
    async def scenario() -> None:
        served = Served(tmp_path, ledger, engine, max_loras=2)
        await served.promoted()
        # Somebody asks for it by name: the champion is now the one that was used longest ago.
        await served.residency.ensure(ledger.generation(11))
        await served.canary()
        assert await served.holds(12, 13)

    asyncio.run(scenario())
