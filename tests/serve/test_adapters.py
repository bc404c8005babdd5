"""Adapters against a small engine on loopback: files checked, weights proved, places shared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.train.proof import PROOF, WEIGHTS, Proof, ProofRow, sha256_of
from memory.errors import EngineError
from memory.night_records import Generation, GenerationStatus
from serve import adapters
from serve.adapters import Residency, adapter_sha256, load, loaded, unload, verify
from serve.proving import probe
from tests.serve.fake_engine import FakeVLLM


class Endpoint:
    """Where the fake lives."""

    def __init__(self, server: FakeVLLM) -> None:
        self.server = server
        self.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        self.api_key = server.key

    async def wait_ready(self, timeout: float) -> None:
        return None


@pytest.fixture
def engine() -> Iterator[Endpoint]:
    server = FakeVLLM(0, "key")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Endpoint(server)
    server.shutdown()
    thread.join()
    server.server_close()


def generation(root: Path, number: int, folder: str | None = None) -> Generation:
    path = root / (folder or f"adapter-{number}")
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text('{"r": 16}')
    (path / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
    return Generation(
        number=number,
        base_model="model",
        adapter_path=path.name,
        adapter_sha256=adapter_sha256(path),
        status=GenerationStatus.CANDIDATE,
    )


def prove(folder: Path, *, base: float = 0.0, adapted: float = 0.25) -> None:
    """What the trainer would have written, had it found the adapter to shift log-probs so much."""
    rows = [
        ProofRow(
            token_ids=ids,
            base=[-1.0 - token - base for token in ids[1:]],
            adapted=[-1.0 - token - adapted for token in ids[1:]],
        )
        for ids in ([5, 6, 7, 8], [9, 3])
    ]
    proof = Proof(weights_sha256=sha256_of(folder / WEIGHTS), dtype="float32", rows=rows)
    (folder / PROOF).write_text(proof.model_dump_json())


BASE = Generation(number=0, base_model="model", status=GenerationStatus.CHAMPION)


def test_the_hash_is_of_the_config_and_the_weights(tmp_path: Path) -> None:
    one = generation(tmp_path, 1)
    folder = tmp_path / "adapter-1"
    (folder / "README.md").write_text("peft writes this")
    assert adapter_sha256(folder) == one.adapter_sha256
    (folder / "adapter_config.json").write_text('{"r": 8}')
    assert adapter_sha256(folder) != one.adapter_sha256


def test_an_adapter_whose_bytes_changed_is_not_loaded(tmp_path: Path) -> None:
    one = generation(tmp_path, 1)
    assert verify(one, tmp_path) == (tmp_path / "adapter-1").resolve()
    (tmp_path / "adapter-1" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(EngineError, match="changed on disk"):
        verify(one, tmp_path)


def test_an_adapter_outside_the_registry_is_not_loaded(tmp_path: Path) -> None:
    one = generation(tmp_path / "elsewhere", 1)
    outside = one.model_copy(update={"adapter_path": "../elsewhere/adapter-1"})
    with pytest.raises(EngineError, match="outside"):
        verify(outside, tmp_path / "registry")


def test_a_pickle_beside_the_weights_is_refused(tmp_path: Path) -> None:
    one = generation(tmp_path, 1)
    (tmp_path / "adapter-1" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(EngineError, match="only safetensors"):
        verify(one, tmp_path)


def test_a_link_out_of_the_adapters_folder_is_refused(tmp_path: Path) -> None:
    one = generation(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "adapter-1" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(EngineError, match="may not be"):
        verify(one, tmp_path)


def test_a_missing_adapter_says_what_to_do(tmp_path: Path) -> None:
    one = generation(tmp_path, 1).model_copy(update={"adapter_path": "gone"})
    with pytest.raises(EngineError, match="roll back"):
        verify(one, tmp_path)


def test_load_probe_and_unload(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        one = generation(tmp_path, 1)
        await load(engine, one.served_name, tmp_path / "adapter-1")
        await load(engine, one.served_name, tmp_path / "adapter-1")
        assert await loaded(engine) == {one.served_name}
        result = await probe(engine, one.served_name)
        assert result.max_delta == pytest.approx(0.25)
        assert result.tokens == 6
        await unload(engine, one.served_name)
        await unload(engine, one.served_name)
        assert await loaded(engine) == set()

    asyncio.run(scenario())
    assert [call.split()[0] for call in engine.server.calls] == ["load", "unload"]


def test_an_adapter_that_changes_nothing_is_refused_and_unloaded(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        residency = Residency(engine, tmp_path)
        with pytest.raises(EngineError, match="changes nothing"):
            await residency.ensure(generation(tmp_path, 1, "empty"))
        assert await loaded(engine) == set()
        assert residency.resident == []

    asyncio.run(scenario())


def test_an_adapter_that_answers_as_it_was_trained_is_proved_by_the_trainers_figures(
    engine: Endpoint, tmp_path: Path
) -> None:
    one = generation(tmp_path, 1)
    prove(tmp_path / "adapter-1", adapted=0.251)
    found = asyncio.run(Residency(engine, tmp_path).ensure(one))
    assert found is not None
    assert (found.error, found.strength) == (pytest.approx(0.001), pytest.approx(0.25 / 0.251))
    assert (found.max_delta, found.tokens) == (pytest.approx(0.25), 4)


def test_an_adapter_without_the_trainers_figures_is_served_on_the_weaker_proof_which_is_said(
    engine: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = asyncio.run(Residency(engine, tmp_path).ensure(generation(tmp_path, 1)))
    assert found is not None
    assert found.error is None
    assert "has no proof.json" in caplog.text


@pytest.mark.parametrize(
    ("folder", "proved", "why"),
    [
        ("wrong", {}, "not served as it was trained.* 0.5 nats.* 3.00 times as strong"),
        ("adapter-1", {"base": 0.3, "adapted": 0.55}, "another base model"),
        ("adapter-1", {"adapted": 0.19}, "not served as it was trained"),
        ("empty", {"adapted": 0.04}, "not served as it was trained"),
        # What two batches differ by in bfloat16 is no effect.
        ("weak", {"base": 0.02, "adapted": 0.03}, "cannot be told from the base model"),
        ("weak", {"base": 0.003, "adapted": 0.0034}, "changes nothing"),
    ],
)
def test_an_adapter_that_answers_otherwise_than_it_was_trained_is_refused_and_unloaded(
    engine: Endpoint, tmp_path: Path, folder: str, proved: dict[str, float], why: str
) -> None:
    one = generation(tmp_path, 1, folder)
    prove(tmp_path / folder, **proved)

    async def scenario() -> None:
        residency = Residency(engine, tmp_path)
        with pytest.raises(EngineError, match=why):
            await residency.ensure(one)
        assert await loaded(engine) == set()
        assert residency.resident == []

    asyncio.run(scenario())


def test_a_weak_adapter_that_is_applied_serves(engine: Endpoint, tmp_path: Path) -> None:
    one = generation(tmp_path, 1, "weak")
    prove(tmp_path / "weak", base=0.0001, adapted=0.0051)
    assert asyncio.run(Residency(engine, tmp_path).ensure(one)) is not None


def test_how_much_the_base_model_may_round_is_a_setting(engine: Endpoint, tmp_path: Path) -> None:
    one = generation(tmp_path, 1)
    prove(tmp_path / "adapter-1", base=0.05, adapted=0.3)
    with pytest.raises(EngineError, match="another base model"):
        asyncio.run(Residency(engine, tmp_path, tolerance=0.04).ensure(one))
    assert asyncio.run(Residency(engine, tmp_path).ensure(one)) is not None


@pytest.mark.parametrize("text", ["{", "[]", '{"dtype": "float32"}'])
def test_a_proof_that_cannot_be_read_is_no_proof(engine: Endpoint, tmp_path: Path, text: str) -> None:
    one = generation(tmp_path, 1)
    (tmp_path / "adapter-1" / PROOF).write_text(text)
    with pytest.raises(EngineError, match="cannot be read as a proof"):
        asyncio.run(Residency(engine, tmp_path).ensure(one))
    assert engine.server.calls == []


def test_a_proof_of_other_weights_is_no_proof(engine: Endpoint, tmp_path: Path) -> None:
    one, _ = generation(tmp_path, 1), generation(tmp_path, 2)
    prove(tmp_path / "adapter-2")
    (tmp_path / "adapter-2" / PROOF).rename(tmp_path / "adapter-1" / PROOF)
    with pytest.raises(EngineError, match="other weights"):
        asyncio.run(Residency(engine, tmp_path).ensure(one))


def test_the_engines_own_words_are_passed_on_when_it_refuses(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EngineError, match="max_lora_rank 16"):
            await Residency(engine, tmp_path).ensure(generation(tmp_path, 1, "refused"))

    asyncio.run(scenario())


def test_the_base_model_is_always_there(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        residency = Residency(engine, tmp_path)
        assert await residency.ensure(BASE) is None
        async with residency.using(BASE):
            assert residency.resident == []

    asyncio.run(scenario())


def test_many_requests_at_once_load_an_adapter_once(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        one = generation(tmp_path, 1)
        residency = Residency(engine, tmp_path)
        seen: list[int] = []

        async def use() -> None:
            async with residency.using(one):
                await asyncio.sleep(0.01)
                seen.append(residency.in_flight(one))

        await asyncio.gather(*(use() for _ in range(8)))
        assert max(seen) == 8
        assert residency.in_flight(one) == 0

    asyncio.run(scenario())
    assert len(engine.server.calls) == 1


def test_a_further_adapter_takes_the_place_of_the_one_used_longest_ago(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second, third = (generation(tmp_path, n) for n in (1, 2, 3))
        residency = Residency(engine, tmp_path, max_loras=2)
        await residency.ensure(first)
        await residency.ensure(second)
        await residency.ensure(first)
        await residency.ensure(third)
        assert residency.resident == [third.served_name, first.served_name]
        assert await loaded(engine) == {third.served_name, first.served_name}

    asyncio.run(scenario())


def test_champion_and_previous_stay_when_an_older_one_is_asked_for(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        previous, champion, candidate, older = (generation(tmp_path, n) for n in (1, 2, 3, 4))
        residency = Residency(engine, tmp_path, max_loras=3)
        for each in (previous, champion, candidate):
            await residency.ensure(each)
        residency.keep(champion, previous)
        await residency.ensure(older)
        assert set(residency.resident) == {previous.served_name, champion.served_name, older.served_name}

    asyncio.run(scenario())


def test_an_adapter_in_use_is_not_evicted_but_waited_for(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = (generation(tmp_path, n) for n in (1, 2))
        residency = Residency(engine, tmp_path, max_loras=1)
        order: list[str] = []

        async def hold() -> None:
            async with residency.using(first):
                await asyncio.sleep(0.2)
                order.append("first ended")

        async def other() -> None:
            async with residency.using(second):
                order.append("second began")

        holding = asyncio.create_task(hold())
        while not residency.in_flight(first):
            await asyncio.sleep(0.01)
        await asyncio.gather(holding, other())
        assert order == ["first ended", "second began"]

    asyncio.run(scenario())


def test_an_engine_that_starts_again_gets_its_adapters_back_while_a_further_one_waits_for_a_place(
    engine: Endpoint, tmp_path: Path
) -> None:
    async def scenario() -> None:
        first, second = (generation(tmp_path, n) for n in (1, 2))
        residency = Residency(engine, tmp_path, max_loras=1)
        async with residency.using(first):
            waiting = asyncio.create_task(residency.ensure(second))
            await asyncio.sleep(0.05)
            async with asyncio.timeout(10):
                await residency.restore()
            assert residency.resident == [first.served_name]
        await waiting
        assert residency.resident == [second.served_name]

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(6))
def test_a_place_that_is_taken_again_before_the_waiting_one_gets_to_it_is_waited_for_anew(
    engine: Endpoint, tmp_path: Path, turns: int
) -> None:
    async def scenario() -> None:
        first, second = (generation(tmp_path, n) for n in (1, 2))
        residency = Residency(engine, tmp_path, max_loras=1)
        async with residency.using(first):
            waiting = asyncio.create_task(residency.ensure(second))
            await asyncio.sleep(0.05)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with residency.using(first):
            await asyncio.sleep(0.05)
        assert await waiting is not None

    asyncio.run(scenario())


def test_when_every_place_stays_in_use_the_wait_ends_with_an_error(
    engine: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "DRAIN_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        residency = Residency(engine, tmp_path, max_loras=1)
        async with residency.using(generation(tmp_path, 1)):
            with pytest.raises(EngineError, match="in use"):
                await residency.ensure(generation(tmp_path, 2))

    asyncio.run(scenario())


def test_dropping_waits_for_the_last_request(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        one = generation(tmp_path, 1)
        residency = Residency(engine, tmp_path)
        async with residency.using(one):
            dropping = asyncio.create_task(residency.drop(one))
            await asyncio.sleep(0.1)
            assert await loaded(engine) == {one.served_name}
        await dropping
        assert await loaded(engine) == set()

    asyncio.run(scenario())


def test_after_a_switch_what_is_not_kept_is_unloaded_once_its_last_request_has_ended(
    engine: Endpoint, tmp_path: Path
) -> None:
    async def scenario() -> None:
        oldest, previous, champion = (generation(tmp_path, n) for n in (1, 2, 3))
        residency = Residency(engine, tmp_path, max_loras=4)
        for each in (oldest, previous, champion):
            await residency.ensure(each)
        async with residency.using(oldest):
            residency.settle(champion, previous)
            await asyncio.sleep(0.05)
            assert oldest.served_name in await loaded(engine)
            await residency.ensure(generation(tmp_path, 4))  # draining holds nobody up
        while oldest.served_name in await loaded(engine):
            await asyncio.sleep(0.01)
        assert {previous.served_name, champion.served_name} <= await loaded(engine)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_is_wanted_again_before_it_has_drained_stays(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = (generation(tmp_path, n) for n in (1, 2))
        residency = Residency(engine, tmp_path)
        await residency.ensure(one)
        async with residency.using(one):
            residency.settle(two)
            await asyncio.sleep(0)
            residency.settle(one)
        await asyncio.sleep(0.05)
        assert await loaded(engine) == {one.served_name}

    asyncio.run(scenario())


def test_what_is_expected_comes_in_with_the_engine_and_serves_nothing_unproved(
    engine: Endpoint, tmp_path: Path
) -> None:
    class Starting(Endpoint):
        async def wait_ready(self, timeout: float) -> None:
            await residency.restore()

    one, two = (generation(tmp_path, n) for n in (1, 2))
    residency = Residency(Starting(engine.server), tmp_path, max_loras=1)
    residency.expect(BASE, one, two)

    async def scenario() -> None:
        found = await residency.ensure(one)
        assert found is not None
        assert found.max_delta == pytest.approx(0.25)
        assert await loaded(engine) == {one.served_name}

    asyncio.run(scenario())


def test_an_engine_that_came_back_gets_its_adapters_again(engine: Endpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = (generation(tmp_path, n) for n in (1, 2))
        residency = Residency(engine, tmp_path)
        await residency.ensure(one)
        await residency.ensure(two)
        engine.server.adapters.clear()
        (tmp_path / "adapter-2" / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(EngineError, match="changed on disk"):
            await residency.restore()
        assert await loaded(engine) == {one.served_name}
        assert residency.resident == [one.served_name]

    asyncio.run(scenario())


def test_an_engine_that_is_away_is_waited_for(engine: Endpoint, tmp_path: Path) -> None:
    class Away(Endpoint):
        waits = 0

        async def wait_ready(self, timeout: float) -> None:
            self.waits += 1
            if self.waits > 1:
                self.base_url = engine.base_url

    async def scenario() -> None:
        away = Away(engine.server)
        away.base_url = "http://127.0.0.1:9/v1"
        one = generation(tmp_path, 1)
        residency = Residency(away, tmp_path)
        await residency.ensure(one)
        assert residency.resident == [one.served_name]

    asyncio.run(scenario())
